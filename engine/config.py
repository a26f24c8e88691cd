"""Configuration of one engine process."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum

from segue.config import require, require_positive
from segue.scheduler.policy import PolicyName


class LoadFormat(Enum):
    """Where the model's weights come from: its folder's safetensors files, or chance (``DUMMY``, for benchmarks)."""

    AUTO = "auto"
    DUMMY = "dummy"


class HandoffMode(Enum):
    """How a layer's source is chosen while its adapter is loading.

    ``PLANNER`` takes for each layer what a plan from expected times says, by a measured profile if there is one, else
    by cautious figures; both are corrected by what passes take. ``AUTO`` is the engine's choice, which is the planner.
    ``FIXED`` runs exactly ``cpu_layers`` layers on the CPU. ``STREAM`` waits for each layer, ``LOAD_FIRST`` for the
    whole adapter. These three are for tests and benchmarks.
    """

    AUTO = "auto"
    PLANNER = "planner"
    FIXED = "fixed"
    STREAM = "stream"
    LOAD_FIRST = "load_first"


@dataclass(frozen=True, slots=True, kw_only=True)
class HandoffConfig:
    """Where a cold prefill's LoRA deltas are computed.

    ``harm_weight``: how much a second that others lose counts for the planner, beside one of the prefill's own.
    """

    mode: str = HandoffMode.AUTO.value
    cpu_layers: int = 0
    harm_weight: float = 1.0

    def __post_init__(self) -> None:
        known = [mode.value for mode in HandoffMode]
        require(self.mode in known, "handoff.mode", f"must be one of {', '.join(known)}, is {self.mode!r}")
        require(self.cpu_layers >= 0, "handoff.cpu_layers", f"must not be negative, is {self.cpu_layers}")
        require(
            0 <= self.harm_weight < math.inf,
            "handoff.harm_weight",
            f"must be finite and not negative, is {self.harm_weight}",
        )

    @property
    def helps(self) -> bool:
        """Whether CPU workers may compute deltas."""
        return HandoffMode(self.mode) not in (HandoffMode.STREAM, HandoffMode.LOAD_FIRST)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """One engine: a base model on a device, its page pool, its adapter store and its CPU LoRA workers.

    ``pages`` counts the pages of the unified pool and ``page_tokens`` the tokens of a page's KV. Without ``pages`` the
    pool takes ``memory_fraction`` of the device memory that is free beside the model, less what the engine computes
    with; on the CPU a quarter of the available memory, 4 GiB at most. ``prefix_cache`` keeps
    the KV of ended requests for those that begin with the same tokens, until its pages are needed. ``host_store_bytes``
    bounds the adapter weights kept in host memory. ``copy_bytes_per_second`` throttles copies to the device (None: as
    fast as it goes); the rows that CPU workers exchange are charged to the same budget. ``read_threads`` read adapters'
    files; None: 8, or half as many as there are cores, the workers' among them. A version whose file has not
    answered a read for ``read_stall_seconds`` fails.

    ``budget_tokens`` bounds the rows of one pass, and ``chunk_tokens`` the rows of prompts that ride in a step with
    requests that decode. ``max_passes`` bounds the passes of loading adapters under way, and ``layers_per_step`` how
    many layers each of them advances between two steps with decodes (None: what costs those half of what rows of
    prompts in the step would, at least two). Adapters in host memory that begin to land
    together share a pass of ``merged_rows`` rows; None does where the device computes beside the engine, 0 is a pass
    for each. ``runs_ahead`` enqueues a step before the tokens of the one before are read; None does where the device
    computes beside the engine. ``measure_device_time`` has the state tell how long the device computes and waits.

    ``policy`` says who goes first: "slo" goes by targets, slack and tenants' shares, "fcfs" by arrival; for requests
    without targets of one tenant they are the same. Of ``max_waiting`` one tenant may have ``tenant_queue_share``, and
    beyond it all together those tenants still may queue that have less than an equal part. With ``max_adapters`` the
    policy "slo" admits requests for so many adapters at a time, as long as nobody waits for long.

    ``cpu_workers`` may be 0: then every adapter is served by streaming; worker i is pinned to ``cpu_cores[i]`` where
    given, and is replaced after ``cpu_stall_seconds`` without progress on a job. ``cpu_decode``: a request whose
    adapter finds no pages is served by the workers alone until there are some. ``torch_threads`` is for the CPU
    device's own matrix products. ``profile_path`` is a file of ``segue calibrate``: what steps, copies and the CPU's
    help cost on this machine with this model. ``poison_freed_pages`` fills freed pages with NaN and
    ``check_invariants`` verifies every manager after every step; both are for tests.
    """

    model_dir: str
    load_format: str = LoadFormat.AUTO.value
    device: str = "cpu"
    dtype: str = "float32"
    page_tokens: int = 16
    pages: int | None = None
    memory_fraction: float = 0.9
    max_context_tokens: int | None = None
    budget_tokens: int = 512
    chunk_tokens: int = 128
    prefix_cache: bool = True
    max_running: int = 64
    max_waiting: int = 1024
    policy: str = PolicyName.SLO.value
    tenant_queue_share: float = 1.0
    max_adapters: int | None = None
    max_lora_rank: int = 256
    host_store_bytes: int = 256 << 20
    copy_bytes_per_second: float | None = None
    read_threads: int | None = None
    read_stall_seconds: float = 10.0
    torch_threads: int = 1
    cpu_workers: int = 2
    cpu_cores: tuple[int, ...] = ()
    cpu_slots: int = 16
    cpu_stall_seconds: float = 1.0
    profile_path: str | None = None
    cpu_decode: bool = True
    max_passes: int = 16
    layers_per_step: int | None = None
    merged_rows: int | None = None
    runs_ahead: bool | None = None
    record_ahead: bool = True
    measure_device_time: bool = False
    poison_freed_pages: bool = False
    check_invariants: bool = False
    handoff: HandoffConfig = field(default_factory=HandoffConfig)

    def __post_init__(self) -> None:
        require(self.device in ("cpu", "cuda"), "device", f"must be 'cpu' or 'cuda', is {self.device!r}")
        formats = [item.value for item in LoadFormat]
        require(
            self.load_format in formats, "load_format", f"must be one of {', '.join(formats)}, is {self.load_format!r}"
        )
        known = ("float32", "bfloat16", "float16")
        require(self.dtype in known, "dtype", f"must be one of {', '.join(known)}, is {self.dtype!r}")
        require_positive(
            self,
            "page_tokens",
            "memory_fraction",
            "budget_tokens",
            "chunk_tokens",
            "max_running",
            "max_waiting",
            "max_lora_rank",
            "host_store_bytes",
            "read_stall_seconds",
            "torch_threads",
            "cpu_slots",
            "cpu_stall_seconds",
            "max_passes",
        )
        if self.layers_per_step is not None:
            require_positive(self, "layers_per_step")
        require((self.merged_rows or 0) >= 0, "merged_rows", f"must not be negative, is {self.merged_rows}")
        require(self.cpu_workers >= 0, "cpu_workers", f"must not be negative, is {self.cpu_workers}")
        require(self.memory_fraction <= 1, "memory_fraction", f"must be at most 1, is {self.memory_fraction}")
        policies = tuple(PolicyName)
        require(self.policy in policies, "policy", f"must be one of {', '.join(policies)}, is {self.policy!r}")
        share = self.tenant_queue_share
        require(0 < share <= 1, "tenant_queue_share", f"must be above 0 and at most 1, is {share}")
        if self.max_adapters is not None:
            require_positive(self, "max_adapters")
        if self.pages is not None:
            require_positive(self, "pages")
        if self.max_context_tokens is not None:
            require_positive(self, "max_context_tokens")
        if self.copy_bytes_per_second is not None:
            require_positive(self, "copy_bytes_per_second")
        if self.read_threads is not None:
            require_positive(self, "read_threads")

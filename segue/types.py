"""The values that users of the SDK meet: what they send and what comes back. Plain, immutable, free of protobuf."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum


class FinishReason(Enum):
    """Why an answer ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"


class Tier(Enum):
    """Where an adapter's weights were when its request arrived; ``NONE`` is the base model."""

    NONE = "none"
    DEVICE = "device"
    HOST = "host"
    DISK = "disk"


class LoraSource(Enum):
    """What computed a layer's LoRA deltas in a prefill; ``NONE`` is the base model."""

    NONE = "none"
    DEVICE = "device"
    CPU = "cpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class SLO:
    """Service level targets of one request, in milliseconds. ``None`` is no target."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    reject_on_miss: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One chat message."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Token counts of one request."""

    prompt_tokens: int
    completion_tokens: int
    cached_prompt_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTiming:
    """One layer of the first prefill. Seconds count from the request's arrival at the server.

    ``landed_seconds`` is when the layer's adapter weights were on the device: None if they never were,
    0 if they were there before.
    """

    layer: int
    source: LoraSource
    start_seconds: float
    end_seconds: float
    landed_seconds: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Where a request's time went. Seconds count from its arrival at the server.

    ``tpot_seconds`` is the mean time per token after the first, None for a single token. ``cpu_layers`` counts the
    layers of the first prefill whose deltas the CPU computed, ``cpu_tokens`` the later tokens that were decoded with
    CPU help, and ``prefill_attempts`` is more than 1 when a worker was lost or the request was preempted.
    """

    tier: Tier
    queue_seconds: float
    ttft_seconds: float
    tpot_seconds: float | None
    total_seconds: float
    cpu_layers: int
    layers: tuple[LayerTiming, ...] = ()
    prefill_attempts: int = 1
    cpu_tokens: int = 0

    @property
    def handover_layer(self) -> int | None:
        """The first layer after a CPU layer whose deltas came from the device, or None."""
        previous = LoraSource.NONE
        for layer in self.layers:
            if previous is LoraSource.CPU and layer.source is LoraSource.DEVICE:
                return layer.layer
            previous = layer.source
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """A generated token's natural-log probability, and those of the most likely tokens at its place."""

    token_id: int
    logprob: float
    top: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """One piece of a streamed answer. ``text`` never ends within a character."""

    text: str
    token_ids: tuple[int, ...]
    index: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """A whole answer. ``alternatives`` are the other answers of a request that asked for more than one."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    timing: Timing
    request_id: str
    adapter_version: str
    logprobs: tuple[TokenLogprob, ...] = ()
    alternatives: tuple[Reply, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterInfo:
    """An adapter that the server knows. ``problem`` says why it cannot be served; empty if it can.

    ``pinned`` says that the server's configuration keeps it on the device.
    """

    name: str
    version: str
    tier: Tier
    rank: int
    target_modules: tuple[str, ...]
    weight_bytes: int
    users: int
    problem: str = ""
    pinned: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerInfo:
    """What a server is and holds. ``cpu_workers_ready`` counts the CPU LoRA workers that can take work now."""

    model: str
    device: str
    dtype: str
    version: str
    layers: int
    vocab_size: int
    context_tokens: int
    page_tokens: int
    pages: int
    cpu_workers: int
    cpu_workers_ready: int
    max_lora_rank: int
    copy_bytes_per_second: float | None = None

"""The messages between the front end and the engine: msgpack over an inherited socket pair, one frame each.

All times are seconds of CLOCK_MONOTONIC, which both processes share. Request numbers and adapter version ids are given
by the front end and are never reused within an engine's life.
"""

from __future__ import annotations

import msgspec

from segue.engine.config import EngineConfig
from segue.engine.lora.manifest import AdapterManifest
from segue.engine.sampling_params import SamplingParams
from segue.errors import SegueError
from segue.types import FinishReason, Tier, Timing, TokenLogprob


class Start(msgspec.Struct, frozen=True, tag=True):
    """The first message to an engine."""

    config: EngineConfig


class Submit(msgspec.Struct, frozen=True, tag=True):
    """A request that has been validated: ``prompt_token_ids`` fits the context with ``max_tokens``.

    ``adapter_version_id`` names a version sent before in OpenVersion; None is the base model. Generation ends after
    any of the sampling's ``stop_token_ids``, which is not part of the answer's text.

    ``ttft_seconds`` from ``arrival_seconds`` on and ``tpot_seconds`` are targets; with ``reject_on_miss`` a request
    that would miss one is refused at once. Nobody waits for the answer after ``deadline_seconds``.
    """

    number: int
    prompt_token_ids: list[int]
    max_tokens: int
    arrival_seconds: float
    sampling: SamplingParams
    adapter_version_id: int | None = None
    tenant: str = ""
    priority: int = 0
    ttft_seconds: float | None = None
    tpot_seconds: float | None = None
    reject_on_miss: bool = False
    deadline_seconds: float | None = None


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """Stop a request wherever it is. Answered by Finished with CANCELLED unless it had ended."""

    number: int


class OpenVersion(msgspec.Struct, frozen=True, tag=True):
    """A new adapter version; its open weights file travels beside the message as a file descriptor.

    A ``pinned`` version is brought to the device at once and is not evicted from there.
    """

    manifest: AdapterManifest
    pinned: bool = False


class CloseVersion(msgspec.Struct, frozen=True, tag=True):
    """No new request will name this version. It leaves the engine when its last user ends."""

    version_id: int


class Evict(msgspec.Struct, frozen=True, tag=True):
    """Drop a version's weights from device and host as soon as nothing uses them. It stays known."""

    version_id: int


class Preload(msgspec.Struct, frozen=True, tag=True):
    """Bring a version's weights to the device ahead of any request."""

    version_id: int


class GetState(msgspec.Struct, frozen=True, tag=True):
    """Ask for a State message with this number."""

    number: int


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """End the engine. Closing the socket means the same."""


class StartProgress(msgspec.Struct, frozen=True, tag=True):
    """How far a stage of the engine's start has come, before Ready; a few times a second.

    ``unit`` is what ``done`` and ``total`` count: "bytes", or a word to be read after them. Stages follow one another.
    """

    stage: str
    done: int
    total: int
    unit: str = ""

    @property
    def is_complete(self) -> bool:
        return self.done >= self.total


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The engine serves from now on."""

    model: str
    device: str
    dtype: str
    layers: int
    vocab_size: int
    context_tokens: int
    page_tokens: int
    pages: int
    cpu_workers: int


class StartFailed(msgspec.Struct, frozen=True, tag=True):
    """The engine cannot start; ``message`` is one line for the operator."""

    message: str


class NewTokens(msgspec.Struct, frozen=True, array_like=True):
    """Tokens of one request that a step brought, with their log probabilities where asked for."""

    number: int
    token_ids: list[int]
    logprobs: list[TokenLogprob] = []


class Finished(msgspec.Struct, frozen=True, array_like=True):
    """A request ended well or was cancelled. The KV of ``cached_prompt_tokens`` came from the prefix cache."""

    number: int
    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    cached_prompt_tokens: int
    timing: Timing


class Failed(msgspec.Struct, frozen=True, array_like=True):
    """A request ended in an error: ``reason`` is a SegueError's reason. ``retry_after_seconds`` is there where the
    engine knows when to come again."""

    number: int
    reason: str
    message: str
    retry_after_seconds: float | None = None

    @classmethod
    def of(cls, number: int, error: SegueError) -> Failed:
        return cls(number, error.reason, error.message, error.retry_after_seconds)


class StepOutput(msgspec.Struct, frozen=True, tag=True):
    """All that one step brought. A request's last tokens come no later than its Finished."""

    tokens: list[NewTokens] = []
    finished: list[Finished] = []
    failed: list[Failed] = []


class VersionState(msgspec.Struct, frozen=True):
    """Where one adapter version is and how many requests hold it."""

    version_id: int
    tier: Tier
    users: int


class DeviceTime(msgspec.Struct, frozen=True):
    """What ``batches`` that have ended took on the device, and how long it waited between them at most, since the first
    began."""

    batches: int
    busy_seconds: float
    idle_seconds: float


class State(msgspec.Struct, frozen=True, tag=True):
    """A snapshot of the engine, in answer to GetState.

    ``kv_pages`` are in use by requests; ``cached_pages`` keep prefixes that no request uses, until pages are needed.
    ``device_time`` is there where the configuration has it measured. ``refusals`` counts requests that were refused
    when they arrived, by their SegueError's reason.
    """

    number: int
    waiting: int
    running: int
    prefills: int
    free_pages: int
    adapter_pages: int
    kv_pages: int
    cached_pages: int
    host_free_bytes: int
    cpu_workers_ready: int
    worker_restarts: int
    steps: int
    versions: list[VersionState]
    device_time: DeviceTime | None = None
    refusals: dict[str, int] = {}


class VersionFailed(msgspec.Struct, frozen=True, tag=True):
    """A version turned out not to be servable (truncated, NaN, changed while read); its users were failed.

    ``may_pass``: what it was made of is not to blame (a disk that does not answer).
    """

    version_id: int
    message: str
    may_pass: bool = False


ToEngine = Start | Submit | Cancel | OpenVersion | CloseVersion | Evict | Preload | GetState | Shutdown
ToFrontEnd = StartProgress | Ready | StartFailed | StepOutput | State | VersionFailed

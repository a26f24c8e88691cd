"""The jobs of the threads that move weights, and what they report.

The threads report each job with completions; they change no state of the store's. Whatever goes wrong in them is
reported as a failure of the job.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

from segue.engine.device import StreamSpan
from segue.engine.lora.adapter_path import FileIdentity
from segue.engine.lora.file_runs import ReadRuns
from segue.engine.lora.host_plan import HostPlan, PlannedLayer
from segue.engine.lora.landing import LandingPlace, LandLayers
from segue.gpu_kernels.landing import land_matrices

_LOGGER = logging.getLogger(__name__)


class WeightsError(Exception):
    """The weights cannot be served. The message says why and may be shown to users."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferOps:
    """The two operations that move bytes; tests put slow or failing ones in their place.

    ``read_runs`` reads a part of a file from Python; without it parts are read in compiled code.
    """

    read_runs: ReadRuns | None = None
    land: LandLayers = land_matrices


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReadJob:
    """Read a whole adapter into host memory at ``copy_offset``, layer by layer."""

    version_id: int
    descriptor: int
    identity: FileIdentity
    plan: HostPlan
    copy_offset: int


@dataclass(slots=True, kw_only=True, eq=False)
class CopyLoad:
    """The copies of an adapter's layers from host memory, from ``copy_offset`` on, to its pages.

    Layers below ``ready`` are in host memory, and jobs were made of those below ``taken``. ``need`` numbers the pass
    that waits for them, in the order in which passes began; while none does it is infinite, and loads go by their
    ``arrival``. Of a load that ``is_cancelled`` no further job is begun, and what waits ends before all others.
    ``by_thread``: its copies are carried out by a thread beside the loop.
    """

    layers: tuple[PlannedLayer, ...]
    place: LandingPlace
    arrival: int
    copy_offset: int = 0
    ready: int = 0
    taken: int = 0
    need: float = math.inf
    is_cancelled: bool = False
    by_thread: bool = False

    @property
    def is_needed(self) -> bool:
        return self.need != math.inf


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CopyJob:
    """Copy ``layers``, which follow one another, from host memory to their pages."""

    load: CopyLoad
    first_layer: int
    layers: tuple[PlannedLayer, ...]

    @property
    def numbers(self) -> range:
        """The layers' numbers."""
        return range(self.first_layer, self.first_layer + len(self.layers))

    @property
    def host_bytes(self) -> int:
        """What the link carries."""
        return self.layers[-1].host_start + self.layers[-1].host_bytes - self.layers[0].host_start


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRead:
    """A layer is in host memory and its values are finite; all layers before it are reported before it."""

    job: ReadJob
    layer: int
    monotonic_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadFailed:
    """A read job cannot be completed. Reads of it may still be under way: it has not ended.

    ``may_pass``: the weights are not to blame, and another time they may be read.
    """

    job: ReadJob
    failure: str
    may_pass: bool
    monotonic_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadEnded:
    """Nothing reads for a job any more. Verified, if all was read and the file stayed the same; else it has failed or
    was cancelled. ``seconds`` are since its first read began."""

    job: ReadJob
    verified: bool
    seconds: float
    monotonic_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyEnqueued:
    """The device has a job, which has landed when it is through with ``span``."""

    job: CopyJob
    span: StreamSpan
    monotonic_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyEnded:
    """A copy job has ended: landed, cancelled (neither), or failed. ``seconds`` are those the link was busy with it."""

    job: CopyJob
    landed: bool = False
    failure: str | None = None
    seconds: float = 0.0
    monotonic_seconds: float


ReadReport = LayerRead | ReadFailed | ReadEnded
Completion = ReadReport | CopyEnqueued | CopyEnded


def failure_message(error: Exception, doing: str) -> str:
    """Why weights could not be ``doing``, as users may see it; the log has what they may not."""
    if isinstance(error, WeightsError):
        return str(error)
    if isinstance(error, MemoryError):
        return f"there is not enough memory for the weights to be {doing}"
    if isinstance(error, OSError) and error.strerror:
        return f"the weights could not be {doing}: {error.strerror}"
    _LOGGER.error("adapter weights could not be %s", doing, exc_info=error)
    return f"internal error while the weights were {doing}"

"""CPU LoRA workers: shared memory, job ring, numba kernels, watchdog. No torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if __name__ != "segue.cpu_lora":
    raise ImportError("this folder is the package segue.cpu_lora: import it as segue.cpu_lora")

if TYPE_CHECKING:
    from segue.cpu_lora.config import CpuLoraConfig as CpuLoraConfig
    from segue.cpu_lora.elements import ElementType as ElementType
    from segue.cpu_lora.jobs import DeltaTask as DeltaTask
    from segue.cpu_lora.jobs import Job as Job
    from segue.cpu_lora.jobs import JobState as JobState
    from segue.cpu_lora.layout import SharedLayout as SharedLayout
    from segue.cpu_lora.memory import SharedMemory as SharedMemory
    from segue.cpu_lora.pool import WorkerPool as WorkerPool
    from segue.cpu_lora.ring import JobRing as JobRing
    from segue.cpu_lora.slots import Share as Share
    from segue.cpu_lora.workers import WorkerEvent as WorkerEvent
    from segue.cpu_lora.workers import WorkerEventKind as WorkerEventKind

# Resolved on first use: a configuration must not cost the import of numba.
_HOMES = {
    "CpuLoraConfig": "config",
    "ElementType": "elements",
    "DeltaTask": "jobs",
    "Job": "jobs",
    "JobState": "jobs",
    "SharedLayout": "layout",
    "SharedMemory": "memory",
    "WorkerPool": "pool",
    "JobRing": "ring",
    "Share": "slots",
    "WorkerEvent": "workers",
    "WorkerEventKind": "workers",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)

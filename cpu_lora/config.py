"""Settings of the CPU LoRA workers."""

from __future__ import annotations

from dataclasses import dataclass

from segue.config import require, require_positive


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuLoraConfig:
    """Sizes of the shared memory and behaviour of the workers.

    Attributes:
        workers: worker processes; 0 keeps the adapter store and computes nothing.
        row_bytes: largest rows of one job, in bytes.
        delta_bytes: largest deltas of one job, in bytes.
        store_bytes: size of the host adapter store, in bytes.
        slots: jobs that can be in flight at once.
        max_tasks: tasks of one job.
        cores: worker i is pinned to ``cores[i]``; empty leaves the workers unpinned, and an idle one then naps for
            50 us at a time instead of only yielding.
        min_rows_per_share: rows below which a job is not split further, where it is not said how many workers share it.
        stall_seconds: a worker with work and without progress for this long is killed.

    Raises:
        ConfigError: names the field.
    """

    workers: int
    row_bytes: int
    delta_bytes: int
    store_bytes: int
    slots: int = 16
    max_tasks: int = 192
    cores: tuple[int, ...] = ()
    min_rows_per_share: int = 4
    stall_seconds: float = 1.0

    def __post_init__(self) -> None:
        require(0 <= self.workers <= 1024, "workers", f"must be 0 to 1024, is {self.workers}")
        require_positive(
            self,
            "row_bytes",
            "delta_bytes",
            "store_bytes",
            "slots",
            "max_tasks",
            "min_rows_per_share",
            "stall_seconds",
        )
        require(
            not self.cores or len(self.cores) == self.workers,
            "cores",
            f"must name one core for each of the {self.workers} workers or be empty, names {len(self.cores)}",
        )
        require(all(core >= 0 for core in self.cores), "cores", f"must not be negative: {self.cores}")

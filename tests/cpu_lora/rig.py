"""A pool of real workers with adapters in its store, and looking at processes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from segue.cpu_lora import (
    CpuLoraConfig,
    DeltaTask,
    ElementType,
    JobRing,
    SharedLayout,
    SharedMemory,
    WorkerPool,
)


def process_is_gone(pid: int) -> bool:
    """Whether no process runs under ``pid`` any more; a zombie no longer runs."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_until(condition: Callable[[], bool], timeout_seconds: float = 20.0) -> bool:
    """Look every few milliseconds until ``condition`` holds; returns whether it does."""
    deadline_seconds = time.monotonic() + timeout_seconds
    while not condition():
        if time.monotonic() > deadline_seconds:
            return False
        time.sleep(0.003)
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """A [rank, in] and B [out, rank] of one module, and where they lie in the store."""

    a: npt.NDArray[Any]
    b: npt.NDArray[Any]
    a_offset_bytes: int
    b_offset_bytes: int
    scale: float

    def task(self, row_start: int, row_stop: int, out_offset: int = 0) -> DeltaTask:
        return DeltaTask(
            row_start=row_start,
            row_stop=row_stop,
            out_offset=out_offset,
            out_features=self.b.shape[0],
            rank=self.a.shape[0],
            a_offset_bytes=self.a_offset_bytes,
            b_offset_bytes=self.b_offset_bytes,
            scale=self.scale,
            dtype=ElementType.of(self.a.dtype),
        )

    def delta(self, rows: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        return self.scale * (rows.astype(np.float64) @ self.a.astype(np.float64).T) @ self.b.astype(np.float64).T


@dataclass(slots=True)
class Rig:
    """A memory, a pool of real workers and a ring."""

    memory: SharedMemory
    pool: WorkerPool
    ring: JobRing
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(7))
    used_bytes: int = 0

    def put(self, array: npt.NDArray[Any]) -> int:
        """Copy an array to the store; returns its byte offset."""
        offset, raw = self.used_bytes, np.ascontiguousarray(array).view(np.uint8).reshape(-1)
        self.memory.store[offset : offset + raw.size] = raw
        self.used_bytes = offset + -(-raw.size // 8) * 8
        return offset

    def adapter(self, rank: int, in_features: int, out_features: int, scale: float = 0.5) -> Adapter:
        a = self.rng.standard_normal((rank, in_features), dtype=np.float32)
        b = self.rng.standard_normal((out_features, rank), dtype=np.float32)
        return Adapter(a=a, b=b, a_offset_bytes=self.put(a), b_offset_bytes=self.put(b), scale=scale)

    def rows(self, row_count: int, in_features: int) -> npt.NDArray[np.float32]:
        return self.rng.standard_normal((row_count, in_features), dtype=np.float32)

    def compute(self, adapter: Adapter, rows: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
        """Post one job for one adapter, wait for it and return a copy of its deltas."""
        job = self.ring.post(rows, [adapter.task(0, len(rows))], adapter.b.shape[0])
        assert job is not None
        self.ring.signal(job)
        assert self.ring.wait([job], 20)
        deltas = job.deltas.copy()
        self.ring.release(job)
        return deltas


@contextmanager
def running_rigs() -> Iterator[Callable[..., Rig]]:
    """What starts a rig with CpuLoraConfig's ``settings``; all are closed, and checked for leftovers, at the end."""
    rigs: list[Rig] = []

    def start(**settings: Any) -> Rig:
        sizes = {"row_bytes": 1 << 18, "delta_bytes": 1 << 18, "store_bytes": 1 << 22}
        config = CpuLoraConfig(**(sizes | settings))
        memory = SharedMemory.create(SharedLayout.plan(config))
        memory.allocate_store(config.store_bytes)
        pool = WorkerPool(config, memory)
        rig = Rig(memory, pool, JobRing(pool))
        rigs.append(rig)
        pool.start()
        assert pool.wait_ready(config.workers, 120), pool.events
        return rig

    yield start
    for rig in rigs:
        pids = [*rig.pool.worker_pids, *([rig.pool.zygote_pid] if rig.pool.zygote_pid else [])]
        rig.pool.close()
        assert rig.pool.failure is None
        assert all(process_is_gone(pid) for pid in pids)
        rig.memory.close()
    assert not [name for name in os.listdir("/dev/shm") if "segue" in name]

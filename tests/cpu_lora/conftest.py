"""Real worker pools for the tests, with nothing left behind."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from segue.cpu_lora import CpuLoraConfig, JobRing, SharedLayout, SharedMemory, WorkerPool
from tests.cpu_lora.rig import Rig, process_is_gone


@pytest.fixture
def start_rig() -> Iterator[Callable[..., Rig]]:
    """Start pools with ``start_rig(workers=..., ...)``; all are closed, and checked for leftovers, after the test."""
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

from __future__ import annotations

import os
from pathlib import Path

import pytest

from segue.engine.config import EngineConfig
from segue.engine.settings import default_read_threads, read_limits


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (2, 1), (3, 1), (4, 2), (16, 8), (17, 8), (200, 8)])
def test_half_of_the_cores_read_and_no_more_than_keep_memory_busy(cores: int, threads: int) -> None:
    assert default_read_threads(cores) == threads


def test_readers_run_on_the_cores_of_workers_that_the_engine_keeps_away_from(tmp_path: Path) -> None:
    """The engine has one core, and three workers have others; those that it could not have had are only named here."""
    before = os.sched_getaffinity(0)
    own = min(before)
    workers = (own + 1, own + 2, own + 3)
    config = EngineConfig(model_dir=str(tmp_path), cpu_workers=3, cpu_cores=workers)
    os.sched_setaffinity(0, {own})
    try:
        limits = read_limits(config)
    finally:
        os.sched_setaffinity(0, before)
    assert limits.cores == {own, *workers}
    assert limits.threads == 2

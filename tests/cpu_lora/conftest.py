"""Real worker pools for the tests, with nothing left behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.cpu_lora.rig import Rig, running_rigs


@pytest.fixture
def start_rig() -> Iterator[Callable[..., Rig]]:
    """Start pools with ``start_rig(workers=..., ...)``; all are closed, and checked for leftovers, after the test."""
    with running_rigs() as start:
        yield start

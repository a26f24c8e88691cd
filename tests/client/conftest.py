from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from tests.client.rig import AsyncDriver, Driver, SyncDriver


@pytest.fixture(scope="session")
def runner() -> Iterator[asyncio.Runner]:
    """One event loop for all tests: gRPC's asyncio side dislikes many."""
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(params=["sync", "async"])
def driver(request: pytest.FixtureRequest, runner: asyncio.Runner) -> Driver:
    """Each of the two clients."""
    return SyncDriver() if request.param == "sync" else AsyncDriver(runner)

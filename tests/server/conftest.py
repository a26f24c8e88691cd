from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from segue import Client
from tests.server.rig import LoopThread, Rig, running_server


@pytest.fixture(scope="session")
def loop() -> Iterator[LoopThread]:
    """One loop for all servers of a run: gRPC's asyncio side dislikes many."""
    thread = LoopThread()
    yield thread
    thread.close()


@pytest.fixture
def rig(loop: LoopThread, tmp_path: Path) -> Iterator[Rig]:
    with running_server(loop, tmp_path) as running:
        yield running


@pytest.fixture
def client(rig: Rig) -> Client:
    return rig.client()

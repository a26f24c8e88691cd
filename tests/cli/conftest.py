from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.rig import LoopThread, Rig, running_server


@pytest.fixture(scope="session")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    loop = LoopThread()
    with running_server(loop, tmp_path_factory.mktemp("cli")) as running:
        yield running
    loop.close()


@pytest.fixture
def target(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> str:
    """The commands talk to the rig's server without being told."""
    monkeypatch.setenv("SEGUE_SERVER", rig.target)
    return rig.target


@pytest.fixture
def model_dir(rig: Rig) -> Path:
    return rig.model_dir

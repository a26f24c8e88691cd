from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.descriptors import open_descriptors
from tests.engine.lora.store_rig import MakeRig, StoreRig


@pytest.fixture
def make_rig(tmp_path: Path) -> Iterator[MakeRig]:
    """Builds rigs; at the end all that they held must have come back, descriptors and threads included."""
    before = open_descriptors()
    rigs: list[StoreRig] = []

    def make(**options: Any) -> StoreRig:
        root = tmp_path / f"root{len(rigs)}"
        root.mkdir()
        rigs.append(StoreRig(root=root, **options))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()
    assert open_descriptors() == before, "a descriptor was left open"


@pytest.fixture
def rig(make_rig: MakeRig) -> StoreRig:
    return make_rig()

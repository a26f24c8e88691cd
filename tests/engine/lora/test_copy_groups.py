"""Layers that are there together come by one copy, the more of them the more came before."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch

from segue.engine.lora.copier import GROUP_BYTES, CopierThread
from segue.engine.lora.host_plan import PlannedLayer
from segue.engine.lora.landing import LandingPlace
from segue.engine.lora.link import LinkThrottle
from segue.engine.lora.transfer import Completion, CopyEnded, CopyEnqueued, CopyJob

PATIENCE_SECONDS = 20.0


class FakeEvent:
    """Has passed."""

    def synchronize(self) -> None:
        return


class FakeLander:
    """Notes which layers it is asked to bring together; the first time it waits until ``go`` is set."""

    is_ahead = True

    def __init__(self) -> None:
        self.go = threading.Event()
        self.groups: list[list[int]] = []

    def start(self, layers: Sequence[PlannedLayer], first_layer: int, _offset: int, _place: object) -> Any:
        assert self.go.wait(PATIENCE_SECONDS)
        self.groups.append(list(range(first_layer, first_layer + len(layers))))
        assert [item.host_start for item in layers] == [
            layers[0].host_start + place * layers[0].host_bytes for place in range(len(layers))
        ]
        return FakeEvent()


class Rig:
    """A copier with ``loads`` loads of ``layers`` layers, all put before the first copy begins."""

    def __init__(self, layers: int, layer_bytes: int, loads: int = 1, bytes_per_second: float | None = None) -> None:
        self.lander = FakeLander()
        self.completions: list[Completion] = []
        self._all = threading.Semaphore(0)
        self._copier = CopierThread(
            lander=cast(Any, self.lander),
            link=LinkThrottle(bytes_per_second),
            report=self._report,
            wake=lambda: None,
        )
        self.jobs = [self._job(layer, layer_bytes, place) for place in self._places(loads) for layer in range(layers)]
        for job in self.jobs:
            self._copier.put(job)
        self.lander.go.set()
        for _ in self.jobs:
            assert self._all.acquire(timeout=PATIENCE_SECONDS)
        self._copier.close()

    def _places(self, count: int) -> list[LandingPlace]:
        table = torch.zeros(1, dtype=torch.int64)
        return [LandingPlace(page_table=table, tables=(), behind=None) for _ in range(count)]

    def _job(self, layer: int, layer_bytes: int, place: LandingPlace) -> CopyJob:
        planned = PlannedLayer(modules=(), host_start=layer * layer_bytes, host_bytes=layer_bytes)
        return CopyJob(
            version_id=1, layer=layer, planned=planned, copy_offset=0, place=place, cancelled=threading.Event()
        )

    def _report(self, completion: Completion) -> None:
        self.completions.append(completion)
        if isinstance(completion, CopyEnded):
            self._all.release()


@pytest.mark.parametrize(
    ("layers", "layer_bytes", "expected"),
    [
        (9, 1, [[0], [1], [2, 3], [4, 5, 6, 7], [8]]),
        (9, 0, [[0], [1], [2, 3], [4, 5, 6, 7], [8]]),
        (8, GROUP_BYTES // 3, [[0], [1], [2, 3], [4, 5, 6], [7]]),
        (4, GROUP_BYTES + 1, [[0], [1], [2], [3]]),
    ],
)
def test_groups_grow_up_to_their_bytes(layers: int, layer_bytes: int, expected: list[list[int]]) -> None:
    rig = Rig(layers, layer_bytes)
    assert rig.lander.groups == expected
    enqueued = [item.job for item in rig.completions if isinstance(item, CopyEnqueued)]
    ended = [item for item in rig.completions if isinstance(item, CopyEnded)]
    assert enqueued == rig.jobs
    assert [item.job for item in ended] == rig.jobs
    assert all(item.landed for item in ended)


def test_layers_of_two_loads_are_not_mixed() -> None:
    rig = Rig(4, 1, loads=2)
    assert sorted(rig.lander.groups) == [[0], [0], [1], [1], [2, 3], [2, 3]]
    assert rig.lander.groups[:2] == [[0], [0]], "the first layer of each before the second of any"


def test_a_throttled_link_carries_layer_by_layer() -> None:
    assert Rig(5, 1, bytes_per_second=1e9).lander.groups == [[0], [1], [2], [3], [4]]

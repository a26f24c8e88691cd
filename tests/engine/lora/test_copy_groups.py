"""Which copies come next, how many layers one of them brings, and how much the link is given before it is through."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch

from segue.engine.device import StreamSpan
from segue.engine.lora.copier import CopierThread, CopyPump
from segue.engine.lora.copy_queue import GROUP_BYTES, CopyQueue
from segue.engine.lora.host_plan import PlannedLayer
from segue.engine.lora.landing import LandingPlace
from segue.engine.lora.landings import Landings
from segue.engine.lora.link import LinkThrottle
from segue.engine.lora.transfer import Completion, CopyEnded, CopyEnqueued, CopyJob, CopyTurn

PATIENCE_SECONDS = 20.0


class FakeEvent:
    """Has passed when ``is_done`` says so."""

    is_done = False

    def query(self) -> bool:
        return self.is_done

    def synchronize(self) -> None:
        self.is_done = True

    def elapsed_time(self, _ended: object) -> float:
        return 1.0


class FakeLander:
    """Notes which layers of which load it is asked to bring together."""

    def __init__(self) -> None:
        self.groups: list[tuple[int, list[int]]] = []
        self.events: list[FakeEvent] = []

    def start(self, layers: Sequence[PlannedLayer], first_layer: int, copy_offset: int, _place: object) -> Any:
        assert [item.host_start for item in layers] == [
            layers[0].host_start + place * layers[0].host_bytes for place in range(len(layers))
        ]
        self.groups.append((copy_offset, list(range(first_layer, first_layer + len(layers)))))
        self.events.append(FakeEvent())
        return StreamSpan(cast(Any, FakeEvent()), cast(Any, self.events[-1]))


def jobs_of(load: int, layers: int, layer_bytes: int, turn: CopyTurn | None = None) -> list[CopyJob]:
    """Of one load, which has its number as the offset of its host copy."""
    table = torch.zeros(1, dtype=torch.int64)
    place = LandingPlace(page_table=table, rows=table, starts=(), behind=None)
    turn = turn or CopyTurn(load)
    cancelled = threading.Event()
    return [
        CopyJob(
            version_id=load,
            layer=layer,
            planned=PlannedLayer(modules=(), host_start=layer * layer_bytes, host_bytes=layer_bytes),
            copy_offset=load,
            place=place,
            turn=turn,
            cancelled=cancelled,
        )
        for layer in range(layers)
    ]


class Rig:
    """A pump with everything put before the first copy."""

    def __init__(self, *loads: list[CopyJob]) -> None:
        self.lander = FakeLander()
        self.landings = Landings()
        self.pump = CopyPump(cast(Any, self.lander), self.landings)
        for job in (job for jobs in loads for job in jobs):
            self.pump.put(job)

    def enqueue_all(self) -> list[CopyEnqueued]:
        enqueued = []
        while isinstance(copy := self.pump.enqueue(), CopyEnqueued):
            self.landings.put(copy)
            enqueued.append(copy)
        assert copy == ()
        return enqueued

    def enqueue_each_behind_the_last(self) -> list[list[int]]:
        """The layers of each copy, where the link has nothing before it."""
        groups = []
        while isinstance(copy := self.pump.enqueue(), CopyEnqueued):
            groups.append([job.layer for job in copy.jobs])
        return groups


@pytest.mark.parametrize(
    ("layers", "layer_bytes", "expected"),
    [
        (9, 1, [[0], [1], [2, 3], [4, 5, 6, 7], [8]]),
        (8, GROUP_BYTES // 3, [[0], [1], [2, 3], [4, 5, 6], [7]]),
        (4, GROUP_BYTES + 1, [[0], [1], [2], [3]]),
    ],
)
def test_groups_grow_up_to_their_bytes(layers: int, layer_bytes: int, expected: list[list[int]]) -> None:
    assert Rig(jobs_of(1, layers, layer_bytes)).enqueue_each_behind_the_last() == expected


def test_what_waits_for_the_link_anyway_comes_together() -> None:
    rig = Rig(jobs_of(1, 4, 100), jobs_of(2, 4, 100))
    rig.enqueue_all()
    assert rig.lander.groups == [(1, [0]), (1, [1]), (1, [2, 3]), (2, [0, 1, 2, 3])]


def test_loads_that_one_pass_waits_for_go_on_side_by_side() -> None:
    turns = [CopyTurn(load, need=1) for load in (1, 2)]
    rig = Rig(*(jobs_of(load, 3, GROUP_BYTES, turn) for load, turn in enumerate(turns, 1)))
    rig.enqueue_all()
    assert rig.lander.groups == [(load, [layer]) for layer in range(3) for load in (1, 2)]


def test_what_a_pass_waits_for_overtakes() -> None:
    queue = CopyQueue()
    loads = {load: jobs_of(load, 2, GROUP_BYTES) for load in (1, 2, 3)}
    for job in (job for jobs in loads.values() for job in jobs):
        queue.put(job)
    first = queue.take_group(0)
    assert [job.version_id for job in first] == [1]
    assert not queue.is_needed
    queue.hasten(loads[3][0].turn, 1)
    queue.hasten(loads[2][0].turn, 2)
    assert queue.is_needed
    order = [job.version_id for _ in range(5) for job in queue.take_group(0)]
    assert order == [3, 3, 2, 2, 1]
    assert queue.take_group(0) == ()


def test_layers_that_come_later_keep_the_turn_of_their_load() -> None:
    queue = CopyQueue()
    early, late = jobs_of(1, 2, GROUP_BYTES), jobs_of(2, 2, GROUP_BYTES)
    for job in (early[0], *late):
        queue.put(job)
    assert queue.take_group(0) == (early[0],)
    queue.put(early[1])
    assert queue.take_group(0) == (early[1],)
    queue.hasten(early[0].turn, 1)
    assert queue.take_group(0) == (late[0],)


def test_the_link_is_given_no_more_than_a_few_milliseconds_of_work() -> None:
    """More of it where a pass waits; and it goes on when something has landed."""
    rig = Rig(jobs_of(1, 40, GROUP_BYTES))
    assert len(rig.enqueue_all()) == 2
    assert rig.landings.ahead_bytes == 2 * GROUP_BYTES
    for event in rig.lander.events:
        event.is_done = True
    assert [(end.job.layer, end.landed) for end in rig.landings.take_landed()] == [(0, True), (1, True)]
    assert rig.landings.ahead_bytes == 0
    assert len(rig.enqueue_all()) == 2

    needed = Rig(jobs_of(1, 40, GROUP_BYTES, CopyTurn(1, need=1)))
    assert len(needed.enqueue_all()) == 8
    small = Rig(*(jobs_of(load, 1, 1) for load in range(100)))
    assert len(small.enqueue_all()) == 64


def test_what_was_cancelled_is_not_enqueued() -> None:
    jobs = jobs_of(1, 3, 1)
    rig = Rig(jobs)
    rig.enqueue_all()
    assert len(rig.lander.groups) == 3
    rig = Rig(jobs)
    jobs[0].cancelled.set()
    ends: list[CopyEnded] = []
    while isinstance(ended := rig.pump.enqueue(), tuple) and ended:
        ends += ended
    assert [(end.job, end.landed, end.failure) for end in ends] == [(job, False, None) for job in jobs]
    assert rig.lander.groups == []


def test_copies_of_one_group_share_its_time_by_their_bytes() -> None:
    rig = Rig(jobs_of(1, 4, 10))
    rig.enqueue_all()
    for event in rig.lander.events:
        event.is_done = True
    assert [end.seconds for end in rig.landings.take_landed()] == pytest.approx([1e-3, 1e-3, 5e-4, 5e-4])
    assert len(rig.landings) == 0


def test_a_throttled_link_carries_layer_by_layer() -> None:
    lander = FakeLander()
    all_there = threading.Semaphore(0)
    completions: list[Completion] = []

    def report(completion: Completion) -> None:
        completions.append(completion)
        all_there.release()

    copier = CopierThread(lander=cast(Any, lander), link=LinkThrottle(1e9), report=report, wake=lambda: None)
    jobs = jobs_of(1, 5, 10)
    for job in jobs:
        copier.put(job)
    for _ in jobs:
        assert all_there.acquire(timeout=PATIENCE_SECONDS)
    copier.close()
    assert lander.groups == [(1, [layer]) for layer in range(5)]
    assert [item.jobs for item in completions if isinstance(item, CopyEnqueued)] == [(job,) for job in jobs]

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
from segue.engine.lora.link_throttle import LinkThrottle
from segue.engine.lora.transfer import Completion, CopyEnded, CopyEnqueued, CopyLoad

PATIENCE_SECONDS = 20.0


class FakeEvent:
    """Has passed when ``is_done`` says so."""

    is_done = False

    def query(self) -> bool:
        return self.is_done

    def elapsed_time(self, _ended: object) -> float:
        return 1.0


class FakeLander:
    """Notes which layers of which load, by its host copy's offset, it is asked to bring together."""

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


def load_of(number: int, layers: int, layer_bytes: int) -> CopyLoad:
    """The load of that arrival, with its number as the offset of its host copy."""
    table = torch.zeros(1, dtype=torch.int64)
    planned = tuple(
        PlannedLayer(modules=(), host_start=layer * layer_bytes, host_bytes=layer_bytes) for layer in range(layers)
    )
    place = LandingPlace(page_table=table, rows=table, starts=(), behind=None)
    return CopyLoad(layers=planned, place=place, arrival=number, copy_offset=number)


def queue_of(*loads: CopyLoad) -> CopyQueue:
    """All their layers are in host memory."""
    queue = CopyQueue()
    for load in loads:
        queue.put(load, len(load.layers))
    return queue


def take_all(queue: CopyQueue, short_bytes: int = 0) -> list[tuple[int, list[int]]]:
    """The loads' numbers and layers of each group."""
    groups = []
    while (job := queue.take_group(short_bytes)) is not None:
        groups.append((job.load.arrival, list(job.numbers)))
    return groups


class Rig:
    """A pump with the loads put before the first copy."""

    def __init__(self, *loads: CopyLoad, bytes_per_second: float) -> None:
        self.bytes_per_second = bytes_per_second
        self.lander = FakeLander()
        self.landings = Landings()
        self.pump = CopyPump(cast(Any, self.lander), self.landings)
        for load in loads:
            self.pump.queue.put(load, len(load.layers))

    def enqueue_all(self) -> int:
        """How many copies the link takes."""
        count = 0
        while isinstance(copy := self.pump.enqueue(self.bytes_per_second), CopyEnqueued):
            self.landings.put(copy)
            count += 1
        assert copy is None
        return count


@pytest.mark.parametrize(
    ("layers", "layer_bytes", "expected"),
    [
        (12, 1, [[0], [1, 2], [3, 4, 5], [6, 7], [8], [9], [10], [11]]),
        (
            24,
            GROUP_BYTES // 4,
            [
                [0],
                [1, 2],
                [3, 4, 5, 6],
                [7, 8, 9, 10],
                [11, 12, 13, 14],
                [15, 16, 17],
                [18, 19],
                [20],
                [21],
                [22],
                [23],
            ],
        ),
        (4, GROUP_BYTES + 1, [[0], [1], [2], [3]]),
    ],
)
def test_groups_grow_up_to_their_bytes(layers: int, layer_bytes: int, expected: list[list[int]]) -> None:
    assert take_all(queue_of(load_of(1, layers, layer_bytes))) == [(1, group) for group in expected]


def test_what_waits_for_the_link_anyway_comes_together() -> None:
    rig = Rig(load_of(1, 4, 100), load_of(2, 4, 100), bytes_per_second=4e5)
    rig.enqueue_all()
    assert rig.lander.groups == [(1, [0]), (1, [1, 2]), (1, [3]), (2, [0, 1, 2, 3])]


def test_the_last_layers_of_a_load_that_is_alone_come_by_small_copies() -> None:
    load = load_of(1, 32, GROUP_BYTES // 32)
    alone = take_all(queue_of(load))
    sizes = [len(layers) for _, layers in alone]
    assert sizes == [1, 2, 6, 7, 5, 3, 2, 2, 1, 1, 1, 1]
    both = take_all(queue_of(load_of(1, 32, GROUP_BYTES // 32), load_of(2, 32, GROUP_BYTES // 32)))
    assert [len(layers) for number, layers in both if number == 1] == [1, 2, 6, 18, 5]


def test_the_first_layers_may_wait_for_what_the_host_does_next() -> None:
    """The link carries four and a half layers meanwhile."""
    rig = Rig(load_of(1, 32, 10), bytes_per_second=18e4)
    rig.enqueue_all()
    assert rig.lander.groups[:2] == [(1, [0, 1, 2, 3]), (1, list(range(4, 12)))]


def test_loads_that_one_pass_waits_for_go_on_side_by_side() -> None:
    loads = [load_of(number, 3, GROUP_BYTES) for number in (1, 2)]
    queue = queue_of(*loads)
    for load in loads:
        queue.hasten(load, 1)
    assert take_all(queue) == [(number, [layer]) for layer in range(3) for number in (1, 2)]


def test_what_a_pass_waits_for_overtakes() -> None:
    loads = {number: load_of(number, 2, GROUP_BYTES) for number in (1, 2, 3)}
    queue = queue_of(*loads.values())
    assert queue.take_group(0) is not None
    assert not queue.is_needed
    queue.hasten(loads[3], 1)
    queue.hasten(loads[2], 2)
    assert queue.is_needed
    assert take_all(queue) == [(3, [0]), (3, [1]), (2, [0]), (2, [1]), (1, [1])]


def test_layers_that_come_later_keep_the_turn_of_their_load() -> None:
    queue = CopyQueue()
    early, late = load_of(1, 3, GROUP_BYTES), load_of(2, 1, GROUP_BYTES)
    queue.put(early, 1)
    queue.put(late, 1)
    assert queue.take_group(0) is not None
    queue.put(early, 2)
    job = queue.take_group(0)
    assert job is not None
    assert (job.load, job.numbers) == (early, range(1, 2))
    # A pass waits for layers that have yet to come.
    queue.hasten(early, 1)
    assert not queue.is_needed
    queue.put(early, 3)
    assert queue.is_needed
    assert take_all(queue) == [(1, [2]), (2, [0])]


def test_the_link_is_given_no_more_than_a_few_milliseconds_of_work() -> None:
    """More of it where a pass waits; and it goes on when something has landed."""
    fast = GROUP_BYTES / 1e-3
    rig = Rig(load_of(1, 40, GROUP_BYTES), bytes_per_second=fast)
    assert rig.enqueue_all() == 2
    assert rig.landings.ahead_bytes == 2 * GROUP_BYTES
    for event in rig.lander.events:
        event.is_done = True
    landed = [(end.job.numbers, end.landed) for end in rig.landings.take_landed()]
    assert landed == [(range(1), True), (range(1, 2), True)]
    assert rig.landings.ahead_bytes == len(rig.landings) == 0
    assert rig.enqueue_all() == 2

    needed = load_of(1, 40, GROUP_BYTES)
    rig = Rig(needed, bytes_per_second=fast)
    rig.pump.queue.hasten(needed, 1)
    assert rig.enqueue_all() == 5
    assert Rig(load_of(1, 40, GROUP_BYTES), bytes_per_second=1.0).enqueue_all() == 1, "one at a time, however slow"
    assert Rig(*(load_of(number, 1, 1) for number in range(100)), bytes_per_second=fast).enqueue_all() == 64


def test_what_was_cancelled_is_not_enqueued() -> None:
    load = load_of(1, 3, 1)
    rig = Rig(load, bytes_per_second=1e9)
    load.is_cancelled = True
    layers: list[int] = []
    while isinstance(ended := rig.pump.enqueue(1.0), CopyEnded):
        assert (ended.landed, ended.failure) == (False, None)
        layers += ended.job.numbers
    assert layers == [0, 1, 2]
    assert rig.lander.groups == []


def test_a_throttled_link_carries_layer_by_layer() -> None:
    lander = FakeLander()
    all_there = threading.Semaphore(0)
    completions: list[Completion] = []

    def report(completion: Completion) -> None:
        completions.append(completion)
        all_there.release()

    copier = CopierThread(lander=cast(Any, lander), link=LinkThrottle(1e9), report=report, wake=lambda: None)
    copier.queue.put(load_of(1, 5, 10), 5)
    for _ in range(5):
        assert all_there.acquire(timeout=PATIENCE_SECONDS)
    copier.close()
    assert lander.groups == [(1, [layer]) for layer in range(5)]
    assert [item.job.numbers for item in completions if isinstance(item, CopyEnqueued)] == [
        range(layer, layer + 1) for layer in range(5)
    ]

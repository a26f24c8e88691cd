"""Requests whose adapters find no pages: on the CPU at once, on the device when there are pages."""

from __future__ import annotations

import math
from dataclasses import replace

from segue.scheduler.batch import steps_to_pages
from segue.scheduler.plan import AdapterPages, PassPlan, PassRows
from tests.scheduler.fakes import LIMITS, FakeCpuService, FakeResidency, admitted, decoding, plan, queued

NEEDS = dict.fromkeys(range(6), 10)


def residency(*resident: int) -> FakeResidency:
    """Adapters of ten pages each; those that are resident are warm and in use."""
    return FakeResidency(needs=NEEDS, resident={*resident}, warm={*resident}, in_use={*resident})


def workers_for(*versions: int) -> FakeCpuService:
    return FakeCpuService(versions={*versions}, held=NEEDS)


def test_one_joins_on_the_cpu_where_its_adapter_finds_no_room() -> None:
    step = plan([queued(1, version_id=0)], free_pages=9, residency=residency(), cpu=workers_for(0))
    (admission,) = step.admit
    assert (admission.number, admission.adapter_pages) == (1, 0)
    assert step.passes == (PassPlan(rows=(PassRows(1, 0, 4),), version_ids=(0,)),)


def test_with_room_the_adapter_gets_its_pages() -> None:
    step = plan([queued(1, version_id=0)], free_pages=12, residency=residency(), cpu=workers_for(0))
    assert step.admit[0].adapter_pages == 10


def test_it_waits_without_workers_after_lost_passes_and_without_room_for_its_kv() -> None:
    request = queued(1, version_id=0)
    assert plan([request], free_pages=9, residency=residency(), cpu=workers_for()).admit == ()
    lost = replace(request, cpu_allowed=False)
    assert plan([lost], free_pages=9, residency=residency(), cpu=workers_for(0)).admit == ()
    assert plan([request], free_pages=1, residency=residency(), cpu=workers_for(0)).admit == ()


def test_half_of_the_passes_are_left_to_adapters_that_load() -> None:
    most = LIMITS.max_passes // 2
    waiting = [queued(number, version_id=number) for number in range(most + 1)]
    step = plan(waiting, free_pages=9, residency=residency(), cpu=workers_for(*NEEDS))
    assert [item.number for item in step.admit] == list(range(most))
    running = [decoding(number, 6, pages=2, version_id=number) for number in range(most)]
    full = plan([queued(9, version_id=5)], running, free_pages=9, residency=residency(), cpu=workers_for(*NEEDS))
    assert full.admit == ()
    same = plan([queued(9, version_id=0)], running, free_pages=9, residency=residency(), cpu=workers_for(*NEEDS))
    assert [item.number for item in same.admit] == [9]


def test_it_decodes_in_passes_of_its_own() -> None:
    warm = decoding(1, 6, pages=2, version_id=1)
    step = plan(
        [], [warm, decoding(2, 6, pages=2, version_id=0)], free_pages=9, residency=residency(1), cpu=workers_for(0)
    )
    assert step.batch == (PassRows(1, 5, 1),)
    assert step.passes == (PassPlan(rows=(PassRows(2, 5, 1),), version_ids=(0,)),)


def test_it_goes_over_before_newcomers_are_admitted() -> None:
    running = [decoding(1, 6, pages=2, version_id=0)]
    step = plan([queued(2, version_id=1)], running, free_pages=12, residency=residency(), cpu=workers_for(0, 1))
    assert step.adapters == (AdapterPages(0, 10),)
    assert [(item.number, item.adapter_pages) for item in step.admit] == [(2, 0)]


def test_it_takes_no_pages_that_others_need_to_decode() -> None:
    grows = decoding(1, 5, pages=1, version_id=1)
    running = [grows, decoding(2, 6, pages=2, version_id=0)]
    assert plan([], running, free_pages=12, residency=residency(1), cpu=workers_for(0)).adapters == (
        AdapterPages(0, 10),
    )
    step = plan([], running, free_pages=11, residency=residency(1), cpu=workers_for(0))
    assert step.grow == (1,)
    assert step.adapters == ()


def test_the_oldest_without_workers_takes_pages_from_the_youngest() -> None:
    running = [
        decoding(1, 6, pages=2, version_id=0),
        decoding(2, 30, pages=8, version_id=1),
        decoding(3, 30, pages=8, version_id=2),
    ]
    step = plan([queued(4)], running, free_pages=4, residency=residency(), cpu=workers_for())
    assert step.preempt == (3,)
    assert step.adapters == (AdapterPages(0, 10),)
    assert step.admit == ()
    assert [item.version_ids for item in step.passes] == [(0,)]
    assert all(rows.number != 3 for rows in step.batch)


def test_one_that_is_not_the_oldest_waits_without_workers() -> None:
    running = [decoding(1, 6, pages=2, version_id=1), decoding(2, 6, pages=2, version_id=0)]
    step = plan([], running, free_pages=4, residency=residency(1), cpu=workers_for())
    assert (step.preempt, step.adapters, step.passes) == ((), (), ())


def test_the_oldest_in_a_pass_is_waited_for() -> None:
    running = [
        admitted(1, 6, pages=2, computed_tokens=5, version_id=0, in_flight=True),
        decoding(2, 30, pages=8, version_id=1),
    ]
    step = plan([], running, free_pages=4, residency=residency(1), cpu=workers_for())
    assert (step.preempt, step.adapters) == ((), ())


def test_it_waits_where_pages_come_free_sooner() -> None:
    """The one that runs has five steps left, and a step takes a second."""
    running = [replace(decoding(1, 6, pages=2, version_id=1), expected_tokens=5)]
    for seconds, joins in ((4.9, True), (5.1, False)):
        cpu = FakeCpuService(versions={0}, seconds=seconds, held=NEEDS)
        step = plan([queued(2, version_id=0)], running, free_pages=9, residency=residency(1), cpu=cpu)
        assert bool(step.admit) == joins


def test_when_pages_come_free() -> None:
    """Own pages with each request, an adapter's with its last user, in the order in which they must have ended."""
    running = [
        replace(decoding(1, 6, pages=2, version_id=1), expected_tokens=40),
        replace(decoding(2, 6, pages=3, version_id=1), expected_tokens=4),
        replace(decoding(3, 6, pages=5, version_id=None), expected_tokens=20),
    ]
    steps = [steps_to_pages(running, missing, NEEDS.__getitem__) for missing in (3, 4, 8, 9, 20, 21)]
    assert steps == [4, 20, 20, 40, 40, math.inf]

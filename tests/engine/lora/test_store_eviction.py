from __future__ import annotations

import shutil

import pytest
import torch

from segue.engine.lora.events import LoadFailed, Verified
from segue.engine.lora.states import LayerState
from segue.types import Tier
from tests.descriptors import open_descriptors
from tests.engine.lora.adapter_folders import MODEL, random_tensors
from tests.engine.lora.store_rig import MakeRig, StoreRig, assert_same, expected

ABSENT, READING, HOST, LANDING, _ENQUEUED, LANDED = LayerState
TENSORS_PER_LAYER = 8
ADAPTER_BYTES = sum(tensor.numel() for tensor in random_tensors().values()) * 4


def land(rig: StoreRig, name: str) -> int:
    version = rig.add(name)
    rig.start_copy(version)
    rig.drain_until(lambda: rig.store.is_landed(version) and rig.store.is_verified(version))
    return version


def read(rig: StoreRig, name: str) -> int:
    version = rig.add(name)
    rig.store.start_load(version)
    rig.drain_until(lambda: rig.store.is_verified(version))
    return version


# -- pages -------------------------------------------------------------------------------------------------------------


def test_evicted_pages_come_back_and_the_host_copy_stays(rig: StoreRig) -> None:
    version = land(rig, "one")
    rig.store.evict_device(version)
    rig.check()
    assert rig.pool.free_pages == rig.pool.pages
    assert rig.states(version) == [HOST] * 3
    assert rig.store.tier(version) is Tier.HOST
    assert rig.store.landed_seconds(version) == (None, None, None)
    rig.start_copy(version)
    rig.drain_until(lambda: rig.store.is_landed(version))
    assert_same(rig.landed(version, 2), expected(random_tensors(), 2, torch.float32))


def test_pages_evicted_while_a_copy_writes_them_come_back_after_it(rig: StoreRig) -> None:
    version = read(rig, "one")
    rig.copies.shut()
    rig.start_copy(version)
    needed = rig.store.device_pages(version)
    rig.wait_until_a_copy_waits()
    rig.store.evict_device(version)
    rig.drain()
    assert not rig.store.has_pages(version)
    assert rig.states(version) == [HOST] * 3
    assert rig.pool.free_pages == rig.pool.pages - needed
    rig.start_copy(version)
    rig.drain()
    assert rig.states(version) == [LANDING] * 3
    assert rig.store.device_pages_held == 2 * needed
    rig.copies.open()
    rig.drain_until(lambda: rig.store.is_landed(version))
    assert rig.store.device_pages_held == needed
    for layer in range(MODEL.layers):
        assert_same(rig.landed(version, layer), expected(random_tensors(), layer, torch.float32))


def test_pages_evicted_during_the_load_leave_the_load_alone(rig: StoreRig) -> None:
    version = rig.add("one")
    rig.reads.shut()
    rig.start_copy(version)
    rig.reads.allow(1)
    rig.drain_until(lambda: rig.states(version)[0] is LANDED)
    rig.store.evict_device(version)
    rig.check()
    assert rig.states(version) == [HOST, READING, READING]
    assert rig.pool.free_pages == rig.pool.pages
    rig.reads.open()
    rig.drain_until(lambda: rig.store.is_verified(version))
    assert rig.states(version) == [HOST] * 3


def test_candidates_are_those_whose_pages_are_free_at_once(rig: StoreRig) -> None:
    landed, cold = land(rig, "landed"), read(rig, "cold")
    landing = read(rig, "landing")
    rig.copies.shut()
    rig.start_copy(landing)
    rig.store.acquire(landed)
    rig.store.acquire(landed)
    (candidate,) = rig.store.evictable()
    assert cold != candidate.version_id == landed
    assert candidate.pages == rig.store.device_pages(landed)
    assert candidate.users == 2
    assert candidate.recent_uses == pytest.approx(2.0, abs=0.1)
    assert candidate.idle_seconds >= 0.0
    with_host = candidate.bring_back_seconds
    rig.store.evict_host(landed)
    rig.drain()
    (candidate,) = rig.store.evictable()
    assert candidate.bring_back_seconds > with_host > 0.0


# -- host bytes --------------------------------------------------------------------------------------------------------


def test_a_complete_device_copy_outlives_the_host_copy(rig: StoreRig) -> None:
    version = land(rig, "one")
    rig.store.evict_host(version)
    rig.check()
    assert rig.host_bytes_held == 0
    assert rig.states(version) == [LANDED] * 3
    assert rig.store.is_verified(version)
    assert not rig.store.is_in_host(version, 0)
    assert_same(rig.landed(version, 1), expected(random_tensors(), 1, torch.float32))
    rig.store.evict_device(version)
    rig.check()
    assert rig.states(version) == [ABSENT] * 3
    assert not rig.store.is_verified(version)
    assert rig.store.tier(version) is Tier.DISK


def test_an_incomplete_device_copy_goes_with_the_host_copy(rig: StoreRig) -> None:
    version = read(rig, "one")
    rig.copies.shut()
    rig.start_copy(version)
    rig.wait_until_a_copy_waits()
    rig.store.evict_host(version)
    rig.drain()
    assert rig.states(version) == [ABSENT] * 3
    assert rig.host_bytes_held > 0, "the copy under way reads them"
    assert rig.store.device_pages_held > 0
    rig.copies.open()
    rig.drain_until(lambda: rig.host_bytes_held == 0)
    assert rig.pool.free_pages == rig.pool.pages


def test_host_bytes_evicted_while_they_are_read_come_back_after_the_read(rig: StoreRig) -> None:
    version = rig.add("one")
    rig.reads.shut()
    rig.store.start_load(version)
    rig.wait_until_a_read_waits()
    rig.store.evict_host(version)
    rig.drain()
    assert rig.states(version) == [ABSENT] * 3
    assert rig.host_bytes_held > 0
    rig.store.start_load(version)
    rig.check()
    assert rig.states(version) == [READING] * 3
    assert rig.host_bytes_held >= 2 * ADAPTER_BYTES
    rig.reads.open()
    rig.drain_until(lambda: rig.store.is_verified(version))
    assert ADAPTER_BYTES <= rig.host_bytes_held < ADAPTER_BYTES + 64
    assert_same(rig.in_host(version, 2), expected(random_tensors(), 2, torch.float32))
    assert sum(isinstance(event, Verified) for event in rig.events) == 1


def test_a_held_host_copy_stays_until_it_is_dropped(rig: StoreRig) -> None:
    version = read(rig, "one")
    rig.store.hold_host(version)
    rig.store.hold_host(version)
    rig.store.evict_host(version)
    rig.drain()
    assert_same(rig.in_host(version, 0), expected(random_tensors(), 0, torch.float32))
    rig.store.drop_host(version)
    rig.check()
    assert rig.store.is_in_host(version, 0)
    rig.store.drop_host(version)
    rig.check()
    assert rig.host_bytes_held == 0


def test_a_new_copy_calls_off_an_eviction_that_has_to_wait(rig: StoreRig) -> None:
    version = read(rig, "one")
    rig.store.hold_host(version)
    rig.store.evict_host(version)
    rig.copies.shut()
    rig.start_copy(version)
    rig.store.drop_host(version)
    rig.check()
    rig.copies.open()
    rig.drain_until(lambda: rig.store.is_landed(version))


# -- a full host store -------------------------------------------------------------------------------------------------


@pytest.fixture
def tight(make_rig: MakeRig) -> StoreRig:
    """A host store with room for two adapters."""
    return make_rig(host_bytes=2 * ADAPTER_BYTES + 1024)


def test_the_host_copy_unused_for_longest_makes_room(tight: StoreRig) -> None:
    old, recent = read(tight, "old"), read(tight, "recent")
    tight.store.acquire(old)
    tight.store.release(old)
    read(tight, "new")
    assert tight.store.tier(old) is Tier.HOST
    assert tight.store.tier(recent) is Tier.DISK


def test_the_host_copy_of_a_landed_adapter_makes_room_while_it_is_used(tight: StoreRig) -> None:
    versions = [land(tight, name) for name in ("one", "two")]
    for version in versions:
        tight.store.acquire(version)
    read(tight, "new")
    assert [tight.store.tier(version) for version in versions] == [Tier.DEVICE, Tier.DEVICE]
    assert [tight.store.is_in_host(version, 0) for version in versions] == [False, True]


def test_a_load_waits_for_room_and_starts_when_there_is(tight: StoreRig) -> None:
    held = [read(tight, "one"), read(tight, "two")]
    for version in held:
        tight.store.hold_host(version)
    waiting = tight.add("new")
    tight.store.start_load(waiting)
    for _ in range(3):
        tight.drain()
    assert tight.states(waiting) == [ABSENT] * 3
    tight.store.drop_host(held[1])
    tight.drain_until(lambda: tight.store.is_verified(waiting))
    assert [tight.store.tier(version) for version in held] == [Tier.HOST, Tier.DISK]


def test_what_a_queued_request_needs_is_kept_from_others_that_only_wait(tight: StoreRig) -> None:
    queued = [read(tight, "one"), read(tight, "two")]
    for version in queued:
        tight.store.acquire(version)
    new = tight.add("new")
    tight.store.acquire(new)
    tight.store.start_load(new)
    tight.drain()
    assert [tight.store.tier(version) for version in queued] == [Tier.HOST, Tier.HOST]
    assert tight.states(new) == [ABSENT] * 3
    tight.start_copy(new)
    tight.drain_until(lambda: tight.store.is_landed(new))
    assert sorted(tight.store.tier(version).value for version in queued) == ["disk", "host"]


def test_a_pass_is_served_before_loads_that_came_earlier(tight: StoreRig) -> None:
    held = [read(tight, "one"), read(tight, "two")]
    for version in held:
        tight.store.hold_host(version)
    early, late = tight.add("early"), tight.add("late")
    tight.store.acquire(early)
    tight.store.start_load(early)
    tight.start_copy(late)
    tight.drain()
    tight.reads.shut()
    tight.store.drop_host(held[0])
    tight.drain()
    assert tight.states(late) == [READING] * 3
    assert tight.states(early) == [ABSENT] * 3


def test_a_load_that_nobody_wants_any_more_stops_waiting(tight: StoreRig) -> None:
    held = [read(tight, "one"), read(tight, "two")]
    for version in held:
        tight.store.hold_host(version)
    for name, give_up in (("cancelled", tight.store.release), ("evicted", tight.store.evict_host)):
        version = tight.add(name)
        tight.store.acquire(version)
        tight.store.start_load(version)
        give_up(version)
        tight.check()
        for item in held:
            tight.store.drop_host(item)
        tight.drain()
        assert tight.states(version) == [ABSENT] * 3
        for item in held:
            tight.store.hold_host(item)


# -- users and the end of a version ------------------------------------------------------------------------------------


def test_a_release_during_the_load_lets_it_go_on(rig: StoreRig) -> None:
    version = rig.add("one")
    rig.reads.shut()
    rig.store.acquire(version)
    rig.start_copy(version)
    rig.wait_until_a_read_waits()
    rig.store.release(version)
    rig.check()
    rig.reads.open()
    rig.drain_until(lambda: rig.store.is_landed(version))


def test_a_closed_version_leaves_when_its_last_user_ends(rig: StoreRig) -> None:
    descriptors = open_descriptors()
    version = land(rig, "one")
    rig.store.acquire(version)
    rig.store.close_version(version)
    rig.check()
    assert rig.store.users(version) == 1
    assert_same(rig.landed(version, 0), expected(random_tensors(), 0, torch.float32))
    rig.store.release(version)
    rig.check()
    assert rig.store.users(version) == 0
    with pytest.raises(KeyError):
        rig.store.tier(version)
    assert rig.host_bytes_held == 0
    assert rig.pool.free_pages == rig.pool.pages
    assert open_descriptors() == descriptors


def test_a_version_closed_while_it_is_read_and_copied_leaves_after_its_jobs(rig: StoreRig) -> None:
    version = rig.add("one")
    rig.reads.shut()
    rig.copies.shut()
    rig.start_copy(version)
    rig.reads.allow(1)
    rig.drain_until(lambda: rig.states(version)[0] is LANDING)
    rig.wait_until_a_copy_waits()
    rig.wait_until_a_read_waits()
    rig.store.close_version(version)
    rig.drain()
    assert rig.store.device_pages_held > 0
    assert rig.host_bytes_held > 0
    rig.copies.open()
    rig.drain_until(lambda: rig.store.device_pages_held == 0)
    assert rig.host_bytes_held > 0
    rig.reads.open()
    rig.drain_until(lambda: rig.host_bytes_held == 0)
    with pytest.raises(KeyError):
        rig.store.tier(version)
    assert not any(isinstance(event, LoadFailed) for event in rig.events)


def test_old_content_is_served_to_the_end_beside_the_new(rig: StoreRig) -> None:
    old_tensors, new_tensors = random_tensors(seed=1), random_tensors(seed=2)
    old = rig.add("one", old_tensors)
    rig.store.acquire(old)
    shutil.rmtree(rig.root / "one")
    new = rig.add("one", new_tensors)
    for version in (new, old):
        rig.start_copy(version)
    rig.drain_until(lambda: rig.store.is_verified(new) and rig.store.is_verified(old))
    rig.drain_until(lambda: rig.store.is_landed(new) and rig.store.is_landed(old))
    assert_same(rig.landed(old, 1), expected(old_tensors, 1, torch.float32))
    assert_same(rig.landed(new, 1), expected(new_tensors, 1, torch.float32))


def test_close_ends_with_jobs_under_way(make_rig: MakeRig) -> None:
    rig = make_rig(copy_bytes_per_second=1.0)
    version = read(rig, "one")
    rig.start_copy(version)
    evicted = read(rig, "two")
    rig.start_copy(evicted)
    rig.store.evict_device(evicted)
    rig.reads.shut()
    rig.store.start_load(rig.add("three"))
    rig.close()
    assert rig.pool.free_pages == rig.pool.pages

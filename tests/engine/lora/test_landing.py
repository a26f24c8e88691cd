"""Layers are enqueued ahead of the device, each with an event of its own, and have landed when the device is there."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Sequence

import pytest
import torch

from segue.engine.lora.events import LayerEnqueued, LayerLanded, LoadFailed
from segue.engine.lora.landing import pieces
from segue.engine.lora.states import LayerState
from segue.gpu_kernels.land_layers import land_layers
from segue.gpu_kernels.landing import LANDING_WORDS, land_matrices
from tests.engine.lora.adapter_folders import MODEL, peft_config, random_tensors
from tests.engine.lora.fake_streams import FakeStream, FakeStreams
from tests.engine.lora.store_rig import SLOW_LINK, MakeRig, StoreRig, assert_same, expected

# By one copy each: see CopyQueue.
GROUPS = [range(layer, layer + 1) for layer in range(MODEL.layers)]
LANDERS = [land_matrices] if torch.cuda.is_available() else [land_matrices, land_layers]


@pytest.fixture
def streams() -> FakeStreams:
    return FakeStreams()


@pytest.fixture
def on_streams(make_rig: MakeRig, streams: FakeStreams) -> StoreRig:
    return make_rig(streams=streams, staging_bytes=1 << 20, expected_copy_bytes_per_second=SLOW_LINK)


def in_host(rig: StoreRig, name: str = "one") -> int:
    """Verified, and without pages."""
    version = rig.add(name)
    rig.store.start_load(version)
    rig.drain_until(lambda: rig.store.is_verified(version))
    return version


def start(rig: StoreRig, name: str = "one") -> int:
    """In host memory, and enqueued as a whole."""
    version = in_host(rig, name)
    rig.start_copy(version)
    rig.drain_until(lambda: LayerState.LANDING not in rig.states(version))
    return version


def events(rig: StoreRig, version: int) -> Sequence[torch.cuda.Event | None]:
    return [rig.store.landing_event(version, layer) for layer in range(MODEL.layers)]


def have_passed(events: Sequence[torch.cuda.Event | None]) -> list[bool]:
    return [event.query() for event in events if event is not None]  # type: ignore[no-untyped-call]


def test_all_layers_are_enqueued_before_the_device_has_begun(on_streams: StoreRig, streams: FakeStreams) -> None:
    version = start(on_streams)
    assert on_streams.states(version) == [LayerState.ENQUEUED] * MODEL.layers
    each = events(on_streams, version)
    assert None not in each
    assert len(set(each)) == len(GROUPS)
    assert not any(have_passed(each))
    assert on_streams.store.landed_seconds(version) == (None,) * MODEL.layers
    assert not on_streams.store.is_landed(version)
    assert on_streams.store.evictable() == ()
    assert on_streams.pool.data.isnan().all()
    streams.go_on_as_far_as_possible()
    assert on_streams.states(version) == [LayerState.ENQUEUED] * MODEL.layers, "nobody has drained"
    on_streams.drain_until(lambda: on_streams.store.is_landed(version))
    assert events(on_streams, version) == [None] * MODEL.layers
    assert None not in on_streams.store.landed_seconds(version)
    seen = [type(event) for event in on_streams.events if isinstance(event, LayerEnqueued | LayerLanded)]
    assert seen == [LayerEnqueued] * MODEL.layers + [LayerLanded] * MODEL.layers


@pytest.mark.parametrize("land", LANDERS)
def test_a_layer_is_there_behind_its_event(make_rig: MakeRig, streams: FakeStreams, land: object) -> None:
    rig = make_rig(streams=streams, land=land, expected_copy_bytes_per_second=SLOW_LINK)
    version = start(rig)
    tensors = random_tensors()
    streams.go_on(streams.loop)
    streams.go_on(streams.loop)
    for group in GROUPS:
        layer_events = events(rig, version)[group.start : group.stop]
        assert streams.go_on(streams.copying)
        assert have_passed(layer_events) == [False] * len(group)
        assert streams.go_on(streams.landing)
        assert have_passed(layer_events) == [True] * len(group)
        for layer in group:
            assert_same(rig.landed(version, layer), expected(tensors, layer, torch.float32))
        rig.drain()
        assert rig.states(version)[: group.stop] == [LayerState.LANDED] * group.stop
        assert rig.states(version)[group.stop :] == [LayerState.ENQUEUED] * (MODEL.layers - group.stop)


def test_copies_wait_once_for_what_used_the_pages_before(on_streams: StoreRig, streams: FakeStreams) -> None:
    version = start(on_streams)
    (fence,) = streams.fences
    waits = [work.after.count(fence) for work in streams.copying.work]
    assert waits == [1, 0, 0]
    assert not streams.go_on(streams.copying)
    assert not streams.go_on(streams.landing)
    while not fence.is_done:
        assert streams.go_on(streams.loop)
    streams.go_on_as_far_as_possible()
    on_streams.drain_until(lambda: on_streams.store.is_landed(version))


@pytest.mark.parametrize("slots", [1, 2])
def test_layers_are_copied_beside_the_landing_of_those_before(make_rig: MakeRig, slots: int) -> None:
    """And no further ahead than there is staging memory."""
    streams = FakeStreams(staging_slots=slots)
    rig = make_rig(streams=streams, staging_bytes=1 << 20, expected_copy_bytes_per_second=SLOW_LINK)
    version = start(rig)
    while streams.go_on(streams.loop):
        pass
    assert [streams.go_on(streams.copying) for _ in GROUPS] == [True, slots > 1, False]
    assert streams.go_on(streams.landing)
    assert streams.go_on(streams.copying)
    streams.go_on_as_far_as_possible()
    rig.drain_until(lambda: rig.store.is_landed(version))
    for layer in range(MODEL.layers):
        assert_same(rig.landed(version, layer), expected(random_tensors(), layer, torch.float32))


def test_pages_of_one_that_was_evicted_come_back_when_the_device_has_done_with_them(
    on_streams: StoreRig, streams: FakeStreams
) -> None:
    version = start(on_streams)
    needed = on_streams.store.device_pages(version)
    old = set(events(on_streams, version))
    on_streams.store.evict_device(version)
    on_streams.drain()
    assert on_streams.states(version) == [LayerState.HOST] * MODEL.layers
    assert events(on_streams, version) == [None] * MODEL.layers
    assert on_streams.pool.free_pages == on_streams.pool.pages - needed
    on_streams.start_copy(version)
    on_streams.drain_until(lambda: LayerState.LANDING not in on_streams.states(version))
    assert not old & set(events(on_streams, version)), "an event is fresh for each load"
    assert on_streams.store.device_pages_held == 2 * needed
    on_streams.store.evict_host(version)
    on_streams.store.evict_device(version)
    on_streams.drain()
    assert on_streams.host_bytes_held > 0
    streams.go_on_as_far_as_possible()
    on_streams.drain_until(lambda: on_streams.pool.free_pages == on_streams.pool.pages)
    assert on_streams.host_bytes_held == 0


def test_the_throttle_holds_events_back(make_rig: MakeRig) -> None:
    rig = make_rig(streams=FakeStreams(driven_by_waiting=True), copy_bytes_per_second=1e6)
    version = in_host(rig)
    layer_seconds = rig.host_bytes_held / MODEL.layers / 1e6
    begin = time.monotonic()
    rig.start_copy(version)
    rig.drain_until(lambda: rig.store.is_landed(version))
    enqueued = [event.monotonic_seconds for event in rig.events if isinstance(event, LayerEnqueued)]
    assert len(enqueued) == MODEL.layers
    for layer, seconds in enumerate(enqueued):
        assert seconds - begin >= (layer + 1) * layer_seconds - 1e-3


def test_a_device_that_fails_fails_the_version(on_streams: StoreRig, streams: FakeStreams) -> None:
    version = start(on_streams)
    streams.landing.work[1].error = RuntimeError("secret detail")
    streams.go_on_as_far_as_possible()
    on_streams.drain_until(lambda: any(isinstance(event, LoadFailed) for event in on_streams.events))
    (failure,) = (event for event in on_streams.events if isinstance(event, LoadFailed))
    assert (failure.version_id, failure.message) == (
        version,
        "internal error while the weights were copied to the device",
    )
    on_streams.drain_until(lambda: on_streams.pool.free_pages == on_streams.pool.pages)
    other = start(on_streams, "two")
    streams.go_on_as_far_as_possible()
    on_streams.drain_until(lambda: on_streams.store.is_landed(other))


def test_each_layer_has_its_own_rows_of_the_table(on_streams: StoreRig, streams: FakeStreams) -> None:
    version = on_streams.add("one", *one_module_in_the_middle())
    on_streams.start_copy(version)
    device = on_streams.store._adapters[version].device
    assert device is not None
    place = device.load.place
    streams.go_on_as_far_as_possible()
    assert [len(place.table(layer, 1)) for layer in range(MODEL.layers)] == [4, 1, 4]
    assert [place.table(layer, 1)[0, -1] for layer in range(MODEL.layers)] == [0, 1, 2]
    assert len(place.table(1, 2)) == 5
    # Kernels are compiled for pointers that are multiples of 16 bytes.
    assert (place.rows.storage_offset() - place.page_table.storage_offset()) % 2 == 0
    assert place.rows.shape[1] == LANDING_WORDS


def one_module_in_the_middle() -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    tensors = {
        name: tensor for name, tensor in random_tensors().items() if ".layers.1." not in name or "q_proj" in name
    }
    targets = [f"{layer}.self_attn.{name}" for layer in (0, 2) for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    return tensors, peft_config(target_modules=[*targets, "1.self_attn.q_proj"])


@pytest.mark.parametrize(
    ("start", "stop", "expected_pieces"),
    [
        (0, 0, []),
        (5, 9, [(5, 9)]),
        (5, 10, [(5, 10)]),
        (10, 20, [(10, 20)]),
        (9, 31, [(9, 10), (10, 20), (20, 30), (30, 31)]),
    ],
)
def test_no_piece_of_a_copy_crosses_an_extent(start: int, stop: int, expected_pieces: list[tuple[int, int]]) -> None:
    assert list(pieces(start, stop, 10)) == expected_pieces


def test_a_load_from_host_memory_is_enqueued_by_who_asks_for_it(make_rig: MakeRig, streams: FakeStreams) -> None:
    """No other thread has a part in it, and the next step of the engine finds all layers enqueued."""
    rig = make_rig(streams=streams, expected_copy_bytes_per_second=SLOW_LINK)
    version = in_host(rig)
    rig.start_copy(version)
    assert rig.states(version) == [LayerState.LANDING] * MODEL.layers
    for group in GROUPS:
        assert rig.states(version)[group.start :] == [LayerState.LANDING] * (MODEL.layers - group.start)
        assert rig.store.enqueue_copies()
    assert not rig.store.enqueue_copies()
    assert rig.states(version) == [LayerState.ENQUEUED] * MODEL.layers
    assert None not in events(rig, version)
    assert rig.pool.data.isnan().all()
    streams.go_on_as_far_as_possible()
    rig.drain_until(lambda: rig.store.is_landed(version))
    for layer in range(MODEL.layers):
        assert_same(rig.landed(version, layer), expected(random_tensors(), layer, torch.float32))


def test_layers_that_come_from_disk_are_enqueued_as_they_come(make_rig: MakeRig, streams: FakeStreams) -> None:
    rig = make_rig(streams=streams)
    version = rig.add("one")
    rig.start_copy(version)
    streams.driven_by_waiting = True
    rig.drain_until(lambda: rig.store.is_landed(version))
    for layer in range(MODEL.layers):
        assert_same(rig.landed(version, layer), expected(random_tensors(), layer, torch.float32))


def test_an_error_of_the_device_at_once_fails_the_version(make_rig: MakeRig, streams: FakeStreams) -> None:
    rig = make_rig(streams=streams)
    version = in_host(rig)

    def refuse_copies(stream: FakeStream) -> Callable[[], None]:
        if stream is streams.copying:
            raise OSError(errno.EIO, "no more")
        return lambda: None

    streams.before_work = refuse_copies
    rig.start_copy(version)
    rig.drain_until(lambda: any(isinstance(event, LoadFailed) for event in rig.events))
    (failure,) = (event for event in rig.events if isinstance(event, LoadFailed))
    assert failure.version_id == version
    assert failure.message == "the weights could not be copied to the device: no more"
    assert not any(isinstance(event, LayerEnqueued | LayerLanded) for event in rig.events)
    streams.go_on_as_far_as_possible()
    rig.drain_until(lambda: rig.pool.free_pages == rig.pool.pages)


def test_what_has_landed_is_told_although_nothing_else_is_under_way(make_rig: MakeRig, streams: FakeStreams) -> None:
    """Whoever enqueues sees copies that have landed meanwhile; nobody is woken to drain them."""
    rig = make_rig(streams=streams, enqueues=False)
    version = in_host(rig)
    rig.start_copy(version)
    while rig.store.enqueue_copies():
        pass
    streams.go_on_as_far_as_possible()
    assert not rig.store.enqueue_copies()
    assert not rig.store.is_landed(version)
    assert rig.store.awaits_landings
    rig.drain()
    assert rig.store.is_landed(version)
    assert not rig.store.awaits_landings


def test_pages_of_a_load_that_was_cancelled_are_not_forgotten(make_rig: MakeRig, streams: FakeStreams) -> None:
    rig = make_rig(streams=streams, enqueues=False)
    version = in_host(rig)
    rig.start_copy(version)
    rig.store.evict_device(version)
    assert not rig.store.enqueue_copies()
    assert rig.store.device_pages_held > 0
    assert rig.store.awaits_landings
    rig.drain()
    assert rig.store.device_pages_held == 0
    assert not rig.store.awaits_landings


def test_pages_of_a_load_that_was_cancelled_wait_for_no_others_copies(make_rig: MakeRig, streams: FakeStreams) -> None:
    """Not even for those that passes wait for, while the link has enough before it."""
    rig = make_rig(streams=streams, enqueues=False, expected_copy_bytes_per_second=1e3)
    needed, cancelled = in_host(rig, "one"), in_host(rig, "two")
    for version in (needed, cancelled):
        rig.start_copy(version)
    rig.store.begin_pass([needed])
    assert rig.store.enqueue_copies()
    assert not rig.store.enqueue_copies()
    assert LayerState.LANDING in rig.states(needed)
    rig.store.evict_device(cancelled)
    assert not rig.store.enqueue_copies()
    rig.drain()
    assert rig.store.device_pages_held == rig.store.device_pages(needed)
    assert LayerState.LANDING in rig.states(needed)

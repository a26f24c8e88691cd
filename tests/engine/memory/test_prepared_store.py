"""The host store is allocated and registered extent by extent, and nobody waits for more than is needed."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator

import pytest

from segue.cpu_lora import CpuLoraConfig, SharedLayout, SharedMemory
from segue.cpu_lora.layout import PAGE_BYTES
from segue.engine.device import CpuStreams
from segue.engine.memory.prepared_store import PreparedStore

EXTENT_BYTES = 4 * PAGE_BYTES
STORE_BYTES = 2 * EXTENT_BYTES + PAGE_BYTES + 100
PATIENCE_SECONDS = 20.0


class FakeRegistering(CpuStreams):
    """Remembers what is registered; lets through as many registrations as a test allows, and refuses one."""

    def __init__(self, allowed: int = 100, refused: int | None = None) -> None:
        self.ranges: list[tuple[int, int]] = []
        self.undone: list[int] = []
        self.allowed = threading.Semaphore(allowed)
        self.waits = threading.Event()
        self._refused = refused
        self._calls = 0

    def register_host(self, address: int, size_bytes: int) -> None:
        if not self.allowed.acquire(blocking=False):
            self.waits.set()
            assert self.allowed.acquire(timeout=PATIENCE_SECONDS)
        self._calls += 1
        if self._calls - 1 == self._refused:
            raise MemoryError("the device refuses")
        self.ranges.append((address, size_bytes))

    def unregister_host(self, address: int) -> None:
        self.undone.append(address)


@pytest.fixture
def memory() -> Iterator[SharedMemory]:
    config = CpuLoraConfig(workers=1, row_bytes=100, delta_bytes=100, store_bytes=STORE_BYTES)
    memory = SharedMemory.create(SharedLayout.plan(config))
    yield memory
    memory.close()


MakePrepared = Callable[[FakeRegistering], PreparedStore]


@pytest.fixture
def prepare(memory: SharedMemory) -> Iterator[MakePrepared]:
    made: list[tuple[PreparedStore, FakeRegistering]] = []

    def make(streams: FakeRegistering) -> PreparedStore:
        made.append((PreparedStore(memory, streams, EXTENT_BYTES), streams))
        return made[-1][0]

    yield make
    for prepared, streams in made:
        prepared.stop()
        streams.allowed.release(100)
        prepared.close()
        prepared.close()
        assert streams.undone == [address for address, _ in streams.ranges]


def test_all_of_the_memory_is_registered_once(memory: SharedMemory, prepare: MakePrepared) -> None:
    streams = FakeRegistering()
    prepared = prepare(streams)
    prepared.wait_until_ready(STORE_BYTES)
    assert prepared.store is memory.store
    end = memory.address
    for address, size_bytes in streams.ranges:
        assert address == end
        assert size_bytes % PAGE_BYTES == 0
        end += size_bytes
    assert end == memory.address + memory.size_bytes
    assert [size for _, size in streams.ranges[1:]] == [EXTENT_BYTES, EXTENT_BYTES, 2 * PAGE_BYTES]
    assert os.fstat(memory.fd).st_blocks * 512 >= memory.size_bytes


def test_what_is_ready_is_not_waited_for(memory: SharedMemory, prepare: MakePrepared) -> None:
    streams = FakeRegistering(allowed=2)
    prepared = prepare(streams)
    prepared.wait_until_ready(1)
    prepared.wait_until_ready(EXTENT_BYTES)
    assert streams.waits.wait(PATIENCE_SECONDS)
    prepared.wait_until_ready(EXTENT_BYTES)
    assert memory.allocated_store_bytes == 2 * EXTENT_BYTES
    got = threading.Event()

    def wait() -> None:
        prepared.wait_until_ready(EXTENT_BYTES + 1)
        got.set()

    waiter = threading.Thread(target=wait)
    waiter.start()
    assert not got.is_set()
    assert len(streams.ranges) == 2
    streams.allowed.release()
    waiter.join(PATIENCE_SECONDS)
    assert got.is_set()
    assert len(streams.ranges) >= 3


def test_a_later_extent_that_cannot_be_registered_is_used_as_it_is(
    prepare: MakePrepared, caplog: pytest.LogCaptureFixture
) -> None:
    streams = FakeRegistering(refused=2)
    with caplog.at_level(logging.WARNING):
        prepare(streams).wait_until_ready(STORE_BYTES)
    assert len(streams.ranges) == 2
    (record,) = caplog.records
    assert record.getMessage() == (
        f"copies from the host store's bytes from {EXTENT_BYTES} on are slower: the device refuses"
    )


def test_the_first_extent_must_be_registered(prepare: MakePrepared) -> None:
    with pytest.raises(MemoryError, match="is not there: the device refuses"):
        prepare(FakeRegistering(refused=1)).wait_until_ready(1)
    with pytest.raises(MemoryError, match="the device refuses"):
        prepare(FakeRegistering(refused=0))


def test_memory_that_the_machine_has_not_fails_who_needs_it(
    memory: SharedMemory, prepare: MakePrepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    allocate = memory.allocate_store

    def fake_allocate(stop_bytes: int) -> None:
        if stop_bytes > EXTENT_BYTES:
            raise MemoryError("no memory")
        allocate(stop_bytes)

    monkeypatch.setattr(memory, "allocate_store", fake_allocate)
    prepared = prepare(FakeRegistering())
    prepared.wait_until_ready(EXTENT_BYTES)
    with pytest.raises(MemoryError, match="is not there: no memory"):
        prepared.wait_until_ready(EXTENT_BYTES + 1)
    prepared.wait_until_ready(EXTENT_BYTES)


def test_nobody_waits_once_it_stops(prepare: MakePrepared) -> None:
    streams = FakeRegistering(allowed=2)
    prepared = prepare(streams)
    prepared.wait_until_ready(EXTENT_BYTES)
    errors: list[MemoryError] = []

    def wait() -> None:
        try:
            prepared.wait_until_ready(STORE_BYTES)
        except MemoryError as error:
            errors.append(error)

    waiter = threading.Thread(target=wait)
    waiter.start()
    prepared.stop()
    waiter.join(PATIENCE_SECONDS)
    assert [str(error) for error in errors] == ["host memory for adapters is not there: the engine stops"]


@pytest.mark.parametrize("extent_bytes", [0, -PAGE_BYTES, PAGE_BYTES + 1])
def test_extents_are_whole_pages(memory: SharedMemory, extent_bytes: int) -> None:
    with pytest.raises(ValueError, match=r"^extent_bytes: "):
        PreparedStore(memory, CpuStreams(), extent_bytes)

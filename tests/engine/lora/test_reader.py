"""Reads by several threads: whose turn it is, and what becomes of the others when one of them hangs."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from segue.engine.lora import reader
from segue.engine.lora.events import LayerHost, LoadFailed, Verified
from segue.engine.lora.file_runs import Target
from segue.engine.lora.manifest import Projection
from segue.engine.lora.reader import ReadLimits
from segue.engine.lora.states import LayerState
from segue.errors import AdapterRejectedError
from tests.engine.lora.adapter_folders import MODEL, random_tensors, tensor_name
from tests.engine.lora.fake_streams import PATIENCE_SECONDS
from tests.engine.lora.store_rig import NEVER_SECONDS, PATIENT_READS, MakeRig, assert_same, expected

# Four parts a layer.
SMALL_PARTS = replace(PATIENT_READS, part_bytes=1024)
IMPATIENT = ReadLimits(threads=2, stall_seconds=0.2, overdue_seconds=0.01, part_bytes=1024)


class FakeDisk:
    """Reads of the files in ``hung`` do not come back until they are let go. ``seen`` are the folders read from."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self._hung: set[str] = set()
        self._waiting = 0
        self._changed = threading.Condition()

    def hang(self, *names: str) -> None:
        with self._changed:
            self._hung.update(names)

    def let_go(self) -> None:
        with self._changed:
            self._hung.clear()
            self._changed.notify_all()

    def wait_until_some_hang(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self._waiting >= count, PATIENCE_SECONDS)

    def read(self, target: Target, descriptor: int, runs: npt.NDArray[np.int64], offset: int) -> int:
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).parent.name
        with self._changed:
            self.seen.append(name)
            self._waiting += 1
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: name not in self._hung, PATIENCE_SECONDS)
            self._waiting -= 1
        return target.read(descriptor, runs, offset)


class DiskRig:
    """A store whose files lie on a FakeDisk."""

    def __init__(self, make_rig: MakeRig, limits: ReadLimits, **options: Any) -> None:
        self.disk = FakeDisk()
        self.rig = make_rig(read_limits=limits, read_runs=self.disk.read, **options)
        self.store = self.rig.store

    def add(self, *names: str) -> list[int]:
        return [self.rig.add(name) for name in names]

    def wait_verified(self, *versions: int) -> None:
        self.rig.drain_until(lambda: all(self.store.is_verified(version) for version in versions))

    def wait_failed(self, count: int) -> list[LoadFailed]:
        self.rig.drain_until(lambda: len(self.failures) >= count)
        return self.failures

    @property
    def failures(self) -> list[LoadFailed]:
        return [event for event in self.rig.events if isinstance(event, LoadFailed)]


@pytest.fixture
def make_disk_rig(make_rig: MakeRig) -> Iterator[Callable[..., DiskRig]]:
    rigs: list[DiskRig] = []

    def make(limits: ReadLimits, **options: Any) -> DiskRig:
        rigs.append(DiskRig(make_rig, limits, **options))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.disk.let_go()


MakeDiskRig = Callable[..., DiskRig]


# -- whose turn it is --------------------------------------------------------------------------------------------------


def test_adapters_that_come_together_are_read_layer_by_layer_side_by_side(make_disk_rig: MakeDiskRig) -> None:
    rig = make_disk_rig(PATIENT_READS)
    versions = rig.add("first", *"abc")
    rig.disk.hang("first")
    for version in versions:
        rig.rig.start_copy(version)
    rig.disk.wait_until_some_hang(1)
    rig.disk.let_go()
    rig.wait_verified(*versions)
    assert [name for name in rig.disk.seen if name != "first"] == list("abcabcabc")


def test_what_a_pass_waits_for_is_read_before_what_only_may_be_needed(make_disk_rig: MakeDiskRig) -> None:
    rig = make_disk_rig(PATIENT_READS)
    first, fetched_ahead, *needed = rig.add("first", "ahead", "a", "b")
    rig.disk.hang("first")
    for version in (first, fetched_ahead):
        rig.store.start_load(version)
    rig.disk.wait_until_some_hang(1)
    for version in needed:
        rig.rig.start_copy(version)
    rig.disk.let_go()
    rig.wait_verified(fetched_ahead, *needed)
    seen = [name for name in rig.disk.seen if name != "first"]
    assert seen == ["ahead", *"ababab", "ahead", "ahead"]


def test_a_prefetch_that_a_pass_comes_to_wait_for_goes_on_at_once(make_disk_rig: MakeDiskRig) -> None:
    rig = make_disk_rig(PATIENT_READS)
    ahead, other = rig.add("ahead", "other")
    rig.disk.hang("ahead")
    rig.store.start_load(ahead)
    rig.disk.wait_until_some_hang(1)
    rig.rig.start_copy(other)
    rig.rig.start_copy(ahead)
    rig.disk.let_go()
    rig.wait_verified(ahead, other)
    assert rig.disk.seen == ["ahead", "ahead", "other", "ahead", "other", "other"]


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("part_bytes", [100, 1024, 1 << 20])
def test_layers_are_reported_in_order_however_their_parts_end(
    make_disk_rig: MakeDiskRig, threads: int, part_bytes: int
) -> None:
    rig = make_disk_rig(ReadLimits(threads=threads, part_bytes=part_bytes))
    tensors = random_tensors()
    versions = rig.add(*"abc")
    for version in versions:
        rig.rig.start_copy(version)
    rig.rig.drain_until(lambda: all(rig.store.is_landed(version) for version in versions))
    rig.wait_verified(*versions)
    for version in versions:
        layers = [e.layer for e in rig.rig.events if isinstance(e, LayerHost) and e.version_id == version]
        assert layers == list(range(MODEL.layers))
        for layer in layers:
            assert_same(rig.rig.in_host(version, layer), expected(tensors, layer, torch.float32))
            assert_same(rig.rig.landed(version, layer), expected(tensors, layer, torch.float32))


def test_a_layer_is_not_there_before_all_its_parts_are(make_disk_rig: MakeDiskRig) -> None:
    rig = make_disk_rig(SMALL_PARTS)
    (version,) = rig.add("a")
    rig.rig.reads.shut()
    rig.store.start_load(version)
    for done in range(4):
        rig.rig.wait_until_a_read_waits()
        rig.rig.drain()
        assert not rig.store.is_in_host(version, 0), f"there after {done} of 4 parts"
        rig.rig.reads.allow(1)
        rig.rig._wait(lambda done=done: len(rig.disk.seen) > done)  # type: ignore[misc]
    rig.rig.drain_until(lambda: rig.store.is_in_host(version, 0))


@pytest.mark.parametrize("limits", [PATIENT_READS, SMALL_PARTS, replace(SMALL_PARTS, threads=3)])
@pytest.mark.parametrize("keep", [0.0, 0.4])
def test_a_disk_that_brings_less_than_it_was_asked_for_is_read_on(
    make_rig: MakeRig, limits: ReadLimits, keep: float
) -> None:
    def read_some(target: Target, descriptor: int, runs: npt.NDArray[np.int64], offset: int) -> int:
        return int(target.read(descriptor, runs, offset) * keep)

    rig = make_rig(read_limits=limits, read_runs=read_some)
    tensors = random_tensors()
    version = rig.add("one", tensors)
    rig.start_copy(version)
    rig.drain_until(lambda: rig.store.is_landed(version) and rig.store.is_verified(version))
    for layer in range(MODEL.layers):
        assert_same(rig.landed(version, layer), expected(tensors, layer, torch.float32))


# -- reads that hang ---------------------------------------------------------------------------------------------------


def test_a_read_that_hangs_fails_its_version_and_no_other(make_disk_rig: MakeDiskRig) -> None:
    rig = make_disk_rig(IMPATIENT)
    hung, *others = rig.add("hung", *"abcd")
    rig.disk.hang("hung")
    rig.store.acquire(hung)
    rig.rig.start_copy(hung)
    rig.disk.wait_until_some_hang(IMPATIENT.threads)
    for version in others:
        rig.rig.start_copy(version)
    rig.rig.drain_until(lambda: all(rig.store.is_landed(version) for version in others))
    (failure,) = rig.wait_failed(1)
    assert failure.version_id == hung
    assert "the disk did not answer for 0.2 seconds" in failure.message
    with pytest.raises(AdapterRejectedError, match="did not answer"):
        rig.store.start_load(hung)
    rig.wait_verified(*others)
    assert not any(isinstance(event, Verified) and event.version_id == hung for event in rig.rig.events)


def test_bytes_and_descriptor_of_a_hung_read_come_back_when_it_does_and_no_sooner(make_disk_rig: MakeDiskRig) -> None:
    rig = make_disk_rig(IMPATIENT)
    (version,) = rig.add("hung")
    rig.disk.hang("hung")
    rig.store.acquire(version)
    rig.rig.start_copy(version)
    rig.wait_failed(1)
    rig.store.release(version)
    rig.rig.check()
    assert rig.store.device_pages_held == 0
    assert rig.rig.host_bytes_held > 0, "the kernel may still write there"
    rig.disk.let_go()
    rig.rig.drain_until(lambda: rig.rig.host_bytes_held == 0)
    with pytest.raises(KeyError):
        rig.store.tier(version)


def test_a_read_that_comes_back_in_time_is_as_any_other(make_disk_rig: MakeDiskRig) -> None:
    rig = make_disk_rig(replace(IMPATIENT, stall_seconds=NEVER_SECONDS))
    version, other = rig.add("slow", "other")
    rig.disk.hang("slow")
    rig.rig.start_copy(version)
    rig.disk.wait_until_some_hang(IMPATIENT.threads)
    rig.rig.start_copy(other)
    rig.rig.drain_until(lambda: rig.store.is_landed(other))
    rig.disk.let_go()
    rig.rig.drain_until(lambda: rig.store.is_landed(version))
    rig.wait_verified(version)
    assert rig.failures == []


def test_threads_that_stood_in_go_when_the_others_are_back(make_disk_rig: MakeDiskRig) -> None:
    rig = make_disk_rig(replace(IMPATIENT, stall_seconds=NEVER_SECONDS))
    versions = rig.add(*"abc")
    rig.disk.hang(*"abc")
    for version in versions:
        rig.rig.start_copy(version)
    pool = rig.store._mover._reader
    rig.rig._wait(lambda: len(pool._threads) > 2 * IMPATIENT.threads)
    rig.disk.let_go()
    rig.wait_verified(*versions)
    rig.rig._wait(lambda: len(pool._threads) == IMPATIENT.threads)
    assert all(rig.store.is_verified(version) for version in versions)


def test_what_cannot_even_begin_because_all_hangs_fails_as_well(
    make_disk_rig: MakeDiskRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "_MOST_STAND_INS", 0)
    rig = make_disk_rig(replace(IMPATIENT, threads=1))
    versions = rig.add("hung", *"abc")
    rig.disk.hang("hung")
    for version in versions:
        rig.store.acquire(version)
        rig.store.start_load(version)
    failures = rig.wait_failed(4)
    assert sorted(failure.version_id for failure in failures) == sorted(versions)
    assert rig.disk.seen == ["hung"]
    rig.disk.let_go()
    (later,) = rig.add("later")
    rig.store.start_load(later)
    rig.wait_verified(later)


def test_memory_that_is_not_ready_is_no_stall(make_disk_rig: MakeDiskRig) -> None:
    rig = make_disk_rig(replace(IMPATIENT, threads=1))
    ready = threading.Event()
    waits = threading.Event()

    def wait_until_ready(_stop_bytes: int) -> None:
        waits.set()
        assert ready.wait(PATIENCE_SECONDS)

    rig.store._mover._reader._make_touchable = wait_until_ready
    (version,) = rig.add("a")
    rig.store.start_load(version)
    assert waits.wait(PATIENCE_SECONDS)
    pool = rig.store._mover._reader
    pool._look(time.monotonic() + NEVER_SECONDS)
    rig.rig.drain()
    assert rig.failures == []
    ready.set()
    rig.wait_verified(version)


def test_a_store_can_be_closed_while_a_read_hangs(make_disk_rig: MakeDiskRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "_JOIN_SECONDS", 0.1)
    rig = make_disk_rig(IMPATIENT)
    (version,) = rig.add("hung")
    rig.disk.hang("hung")
    rig.rig.start_copy(version)
    rig.disk.wait_until_some_hang(1)
    rig.store.close()
    assert rig.rig.pool.free_pages == rig.rig.pool.pages


# -- what goes wrong while several threads read ------------------------------------------------------------------------


def test_a_bad_value_keeps_its_layer_and_all_later_ones_from_being_used(make_disk_rig: MakeDiskRig) -> None:
    rig = make_disk_rig(replace(SMALL_PARTS, threads=4))
    tensors = random_tensors()
    tensors[tensor_name(1, Projection.V, "B")][3, 1] = torch.nan
    bad = rig.rig.add("bad", tensors)
    (good,) = rig.add("good")
    rig.store.acquire(bad)
    for version in (bad, good):
        rig.rig.start_copy(version)
    (failure,) = rig.wait_failed(1)
    assert "layer 1 v_proj lora_B holds NaN" in failure.message
    rig.rig.drain_until(lambda: rig.store.is_landed(good))
    rig.wait_verified(good)
    assert all(event.layer == 0 for event in rig.rig.events if isinstance(event, LayerHost) and event.version_id == bad)
    assert rig.rig.states(bad)[1:] == [LayerState.ABSENT] * (MODEL.layers - 1)


def test_a_file_cut_short_while_several_threads_read_it_fails_once(make_disk_rig: MakeDiskRig) -> None:
    rig = make_disk_rig(replace(SMALL_PARTS, threads=4))
    version, other = rig.add("cut", "other")
    rig.disk.hang("cut")
    rig.store.start_load(version)
    rig.disk.wait_until_some_hang(4)
    os.truncate(rig.rig.root / "cut" / "adapter_model.safetensors", 2000)
    rig.disk.let_go()
    (failure,) = rig.wait_failed(1)
    assert "the weights file is truncated: it ends within layer 0" in failure.message
    rig.store.start_load(other)
    rig.wait_verified(other)
    assert len(rig.failures) == 1

"""Reads in compiled code, as an engine has them: nothing here stands between the threads and the files."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from segue.engine.lora.events import LayerHost, LoadFailed, Verified
from segue.engine.lora.manifest import Projection
from segue.engine.lora.part_reader import PartReader
from segue.engine.lora.read_parts import ReadPart
from segue.engine.lora.reader import ReadLimits
from segue.engine.lora.transfer import ReadJob
from tests.engine.lora.adapter_folders import MODEL, random_tensors, tensor_name
from tests.engine.lora.fake_streams import PATIENCE_SECONDS
from tests.engine.lora.store_rig import PATIENT_READS, MakeRig, StoreRig, assert_same, expected

SMALL_PARTS = replace(PATIENT_READS, part_bytes=1024)
NAMES = "abcdefgh"


@pytest.fixture
def in_python(monkeypatch: pytest.MonkeyPatch) -> list[ReadPart]:
    """The parts that Python was needed for."""
    parts: list[ReadPart] = []
    real_read = PartReader.read

    def fake_read(self: PartReader, job: ReadJob, part: ReadPart) -> None:
        parts.append(part)
        real_read(self, job, part)

    monkeypatch.setattr(PartReader, "read", fake_read)
    return parts


def ready_rig(make_rig: MakeRig, limits: ReadLimits, **options: object) -> StoreRig:
    """One whose memory may be touched."""
    rig = make_rig(read_limits=limits, gates_reads=False, **options)
    rig.memory.touchable_bytes = rig.host_bytes
    return rig


def hold_memory(rig: StoreRig) -> Callable[[], None]:
    """Have a first read wait for memory; what is put before the call of what this returns is put before any is read."""
    waits, ready = threading.Event(), threading.Event()

    def wait_until_ready(_stop_bytes: int) -> None:
        waits.set()
        assert ready.wait(PATIENCE_SECONDS)

    rig.memory.touchable_bytes = 0
    rig.store._mover._reader._make_touchable = wait_until_ready
    rig.store.start_load(rig.add("first"))
    assert waits.wait(PATIENCE_SECONDS)

    def go() -> None:
        rig.memory.touchable_bytes = rig.host_bytes
        ready.set()

    return go


def order_of(rig: StoreRig, names: dict[int, str]) -> str:
    """Whose layers came, by the moments at which they did."""
    layers = [event for event in rig.events if isinstance(event, LayerHost) and event.version_id in names]
    moments = sorted((event.monotonic_seconds, names[event.version_id]) for event in layers)
    return "".join(name for _, name in moments)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("part_bytes", [100, 1024, 1 << 20])
def test_adapters_arrive_whole_and_in_order_without_python(
    make_rig: MakeRig, in_python: list[ReadPart], threads: int, part_bytes: int
) -> None:
    rig = ready_rig(make_rig, replace(PATIENT_READS, threads=threads, part_bytes=part_bytes))
    contents = {rig.add(name, random_tensors(seed=seed)): random_tensors(seed=seed) for seed, name in enumerate(NAMES)}
    for version in contents:
        rig.store.start_load(version)
    rig.drain_until(lambda: all(rig.store.is_verified(version) for version in contents))
    assert in_python == []
    for version, tensors in contents.items():
        came = [event for event in rig.events if isinstance(event, LayerHost) and event.version_id == version]
        assert [event.layer for event in came] == list(range(MODEL.layers))
        assert all(earlier.monotonic_seconds <= later.monotonic_seconds for earlier, later in pairwise(came))
        for layer in range(MODEL.layers):
            assert_same(rig.in_host(version, layer), expected(tensors, layer, torch.float32))


def test_what_came_together_is_read_side_by_side_and_what_may_be_needed_later(make_rig: MakeRig) -> None:
    rig = ready_rig(make_rig, PATIENT_READS)
    go = hold_memory(rig)
    names = {rig.add(name): name for name in "pabc"}
    ahead, *needed = names
    rig.store.start_load(ahead)
    for version in needed:
        rig.start_copy(version)
    go()
    rig.drain_until(lambda: all(rig.store.is_verified(version) for version in names))
    assert order_of(rig, names) == "pabc" + "abc" * (MODEL.layers - 1) + "p" * (MODEL.layers - 1)


def test_what_a_pass_comes_to_wait_for_is_hastened(make_rig: MakeRig) -> None:
    rig = ready_rig(make_rig, PATIENT_READS)
    go = hold_memory(rig)
    names = {rig.add(name): name for name in "pqa"}
    ahead, hastened, needed = names
    rig.store.start_load(ahead)
    rig.store.start_load(hastened)
    rig.start_copy(needed)
    rig.start_copy(hastened)
    go()
    rig.drain_until(lambda: all(rig.store.is_verified(version) for version in names))
    assert order_of(rig, names) == "pqa" + "qa" * (MODEL.layers - 1) + "p" * (MODEL.layers - 1)


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("file_dtype", [torch.float16, torch.bfloat16])
def test_only_what_has_another_dtype_takes_python(
    make_rig: MakeRig, in_python: list[ReadPart], threads: int, file_dtype: torch.dtype
) -> None:
    rig = ready_rig(make_rig, replace(SMALL_PARTS, threads=threads))
    tensors = random_tensors()
    other = {tensor_name(layer, Projection.V, matrix) for layer in range(MODEL.layers) for matrix in "AB"}
    tensors = {name: tensor.to(file_dtype) if name in other else tensor for name, tensor in tensors.items()}
    version = rig.add("mixed", tensors)
    rig.store.start_load(version)
    rig.drain_until(lambda: rig.store.is_verified(version))
    assert sorted(part.converted.label for part in in_python if part.converted is not None) == sorted(
        f"layer {layer} v_proj lora_{matrix}" for layer in range(MODEL.layers) for matrix in "AB"
    )
    assert len(in_python) == len(other)
    for layer in range(MODEL.layers):
        assert_same(rig.in_host(version, layer), expected(tensors, layer, torch.float32))


@pytest.mark.parametrize("threads", [1, 4])
def test_a_value_that_is_not_finite_is_named_and_others_are_read(make_rig: MakeRig, threads: int) -> None:
    rig = ready_rig(make_rig, replace(SMALL_PARTS, threads=threads))
    tensors = random_tensors()
    tensors[tensor_name(1, Projection.V, "B")][3, 1] = torch.inf
    bad, *good = [rig.add("bad", tensors), *(rig.add(name) for name in NAMES)]
    rig.store.acquire(bad)
    for version in (bad, *good):
        rig.store.start_load(version)
    rig.drain_until(lambda: all(rig.store.is_verified(version) for version in good))
    rig.drain_until(lambda: any(isinstance(event, LoadFailed) for event in rig.events))
    (failure,) = [event for event in rig.events if isinstance(event, LoadFailed)]
    assert failure.version_id == bad
    assert "layer 1 v_proj lora_B holds NaN or infinite values in float32" in failure.message
    came = [event.layer for event in rig.events if isinstance(event, LayerHost) and event.version_id == bad]
    assert came in ([], [0])


@pytest.mark.parametrize("problem", ["truncated", "no file"])
def test_a_file_that_cannot_be_read_fails_with_the_reason(make_rig: MakeRig, problem: str) -> None:
    rig = ready_rig(make_rig, replace(SMALL_PARTS, threads=4))
    version, other = rig.add("one"), rig.add("two")
    rig.store.acquire(version)
    if problem == "truncated":
        os.truncate(rig.root / "one" / "adapter_model.safetensors", 2000)
    else:
        folder = os.open(rig.root, os.O_RDONLY)
        os.dup2(folder, rig.store._adapters[version].descriptor)
        os.close(folder)
    for item in (version, other):
        rig.store.start_load(item)
    rig.drain_until(lambda: rig.store.is_verified(other))
    rig.drain_until(lambda: any(isinstance(event, LoadFailed) for event in rig.events))
    (failure,) = [event for event in rig.events if isinstance(event, LoadFailed)]
    wanted = "truncated: it ends within layer 0" if problem == "truncated" else "could not be read: Is a directory"
    assert wanted in failure.message
    rig.store.release(version)
    rig.drain_until(lambda: len(rig.store._mover.extents.taken) == 1)


def test_a_read_that_is_cancelled_ends_and_gives_its_bytes_back(make_rig: MakeRig) -> None:
    rig = ready_rig(make_rig, replace(SMALL_PARTS, threads=3))
    versions = [rig.add(name) for name in NAMES]
    for turn in range(50):
        version = versions[turn % len(versions)]
        rig.store.start_load(version)
        rig.store.evict_host(version)
        rig.drain_until(lambda: rig.host_bytes_held == 0)
        rig.store.start_load(version)
        rig.drain_until(lambda version=version: rig.store.is_verified(version))  # type: ignore[misc]
        rig.store.evict_host(version)
    rig.drain()
    assert rig.host_bytes_held == 0
    # Whatever a read had got to when it was cancelled, nobody was told of a version that failed.
    assert not [event for event in rig.events if isinstance(event, LoadFailed)]
    assert sum(isinstance(event, Verified) for event in rig.events) >= 50


def test_readers_run_on_the_cores_that_they_are_given(make_rig: MakeRig) -> None:
    before = os.sched_getaffinity(0)
    core = max(before)
    rig = ready_rig(make_rig, replace(PATIENT_READS, threads=2, cores=frozenset({core})))
    pool = rig.store._mover._reader
    threads = [thread.native_id for thread in (*pool._threads, pool._watch)]
    assert [os.sched_getaffinity(thread) for thread in threads if thread is not None] == [{core}] * 3
    assert os.sched_getaffinity(0) == before

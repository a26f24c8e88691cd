from __future__ import annotations

import os
import random
from collections import Counter

import pytest
import torch
from torch import Tensor

from segue.engine.lora.events import LoadFailed
from segue.engine.lora.manifest import Projection
from segue.engine.lora.reader import ReadLimits
from segue.engine.lora.states import LayerState
from segue.engine.memory.pages import OutOfPagesError
from tests.descriptors import open_descriptors
from tests.engine.lora.adapter_folders import MODEL, peft_config, random_tensors, tensor_name
from tests.engine.lora.store_rig import MakeRig, StoreRig, assert_same, expected

STEPS = 200
NAMES = tuple("abcdefgh")
RANKS = (1, 2, 4, 8, 16)
BROKEN_NAME = "h"


class Churn:
    """Does what an engine might do, in random order, and keeps its own books of users, holds and contents."""

    def __init__(self, rig: StoreRig, seed: int) -> None:
        self.rig = rig
        self.random = random.Random(seed)
        self.tensors: dict[int, dict[str, Tensor]] = {}
        self.current: dict[str, int] = {}
        self.users: Counter[int] = Counter()
        self.holds: Counter[int] = Counter()
        self.failed: set[int] = set()
        self.done: Counter[str] = Counter()
        self.writes = 0
        for name in NAMES:
            self.write(name)

    def write(self, name: str) -> None:
        """Publish new content under the name; the old version is closed."""
        self.writes += 1
        rank = self.random.choice(RANKS)
        tensors = random_tensors(rank=rank, seed=self.writes)
        if name == BROKEN_NAME:
            tensors[tensor_name(2, Projection.O, "B")][0, 0] = torch.nan
        old = self.current.get(name)
        self.current[name] = self.rig.add(name, tensors, peft_config(r=rank))
        self.tensors[self.current[name]] = tensors
        if old is not None:
            self.rig.store.close_version(old)

    def step(self) -> None:
        action = self.random.choice(
            [
                self.acquire,
                self.acquire,
                self.release,
                self.load,
                self.load,
                self.copy,
                self.copy,
                self.evict_device,
                self.evict_host,
                self.hold,
                self.drop,
                self.replace,
                self.touch,
                self.gates,
                self.gates,
            ]
        )
        if action():
            self.done[action.__name__] += 1
        # The threads get a little time now and then, so that a step meets jobs in every stage.
        if self.random.random() < 0.5:
            self.rig.wakes.clear()
            self.rig.wakes.wait(0.005)
        for event in self.rig.drain():
            if isinstance(event, LoadFailed):
                self.failed.add(event.version_id)
        self.compare()

    def acquire(self) -> bool:
        version = self.some_version()
        if version in self.failed:
            return False
        self.rig.store.acquire(version)
        self.users[version] += 1
        return True

    def release(self) -> bool:
        version = self.some(self.users)
        if version is None:
            return False
        self.rig.store.release(version)
        self.users[version] -= 1
        return True

    def load(self) -> bool:
        version = self.some_version()
        if version in self.failed:
            return False
        self.rig.store.start_load(version)
        return True

    def copy(self) -> bool:
        version = self.some_version()
        if version in self.failed or self.rig.store.has_pages(version):
            return False
        try:
            self.rig.start_copy(version)
        except OutOfPagesError:
            self.done["out of pages"] += 1
            return False
        return True

    def evict_device(self) -> bool:
        self.rig.store.evict_device(self.some_version())
        return True

    def evict_host(self) -> bool:
        self.rig.store.evict_host(self.some_version())
        return True

    def hold(self) -> bool:
        sound = [version for version in self.current.values() if version not in self.failed]
        present = [version for version in sound if self.rig.store.is_in_host(version, 0)]
        if not present:
            return False
        version = self.random.choice(present)
        self.rig.store.hold_host(version)
        self.holds[version] += 1
        return True

    def drop(self) -> bool:
        version = self.some(self.holds)
        if version is None:
            return False
        self.rig.store.drop_host(version)
        self.holds[version] -= 1
        return True

    def replace(self) -> bool:
        self.write(self.random.choice(NAMES))
        return True

    def touch(self) -> bool:
        """An owner writes in place: a read under way fails."""
        if self.random.random() < 0.7:
            return False
        os.utime(self.rig.root / self.random.choice(NAMES) / "adapter_model.safetensors")
        return True

    def gates(self) -> bool:
        gate = self.random.choice([self.rig.reads, self.rig.copies])
        if self.random.random() < 0.5:
            gate.open()
        else:
            gate.shut()
            gate.allow(self.random.randrange(30))
        return True

    def some_version(self) -> int:
        return self.current[self.random.choice(NAMES)]

    def some(self, counts: Counter[int]) -> int | None:
        present = sorted(version for version, count in counts.items() if count > 0)
        return self.random.choice(present) if present else None

    def compare(self) -> None:
        """Every layer that is somewhere holds the content of its own version."""
        for version in {*self.current.values(), *(+self.users)}:
            if version in self.failed:
                continue
            layer = self.random.randrange(MODEL.layers)
            wanted = expected(self.tensors[version], layer, torch.float32)
            if self.rig.store.is_in_host(version, layer):
                assert_same(self.rig.in_host(version, layer), wanted)
            if self.rig.store.layer_state(version, layer) is LayerState.LANDED:
                assert_same(self.rig.landed(version, layer), wanted)
                self.done["compared on the device"] += 1

    def wind_down(self) -> None:
        self.rig.reads.open()
        self.rig.copies.open()
        for version in self.current.values():
            self.rig.store.close_version(version)
        for version in (+self.users).elements():
            self.rig.store.release(version)
            self.rig.check()
        for version in (+self.holds).elements():
            self.rig.store.drop_host(version)
            self.rig.check()
        self.rig.drain_until(lambda: self.rig.host_bytes_held == 0 and self.rig.store.device_pages_held == 0)


@pytest.mark.parametrize(("read_threads", "gates_reads"), [(1, True), (3, True), (3, False)])
@pytest.mark.parametrize("seed", range(6))
def test_random_use_keeps_every_invariant_and_gives_everything_back(
    make_rig: MakeRig, seed: int, read_threads: int, gates_reads: bool
) -> None:
    largest = sum(tensor.numel() for tensor in random_tensors(rank=max(RANKS)).values()) * 4
    rig = make_rig(
        host_bytes=2 * largest + 1000,
        pages=90,
        read_limits=ReadLimits(threads=read_threads, part_bytes=1000),
        gates_reads=gates_reads,
    )
    before = open_descriptors()
    churn = Churn(rig, seed)
    for _ in range(STEPS):
        churn.step()
    churn.wind_down()
    assert rig.pool.free_pages == rig.pool.pages
    for version in churn.tensors:
        with pytest.raises(KeyError):
            rig.store.tier(version)
    assert open_descriptors() == before
    for action in ("acquire", "release", "load", "copy", "evict_device", "evict_host", "hold", "drop", "replace"):
        assert churn.done[action] > 0, action
    assert churn.done["compared on the device"] > 0

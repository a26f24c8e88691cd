"""The residency of adapters in every order of calls, reads, copies and failures, against a model of who holds what."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from segue.engine.device import CpuStreams, DeviceStreams
from segue.engine.lora.states import LayerState
from segue.errors import AdapterRejectedError
from segue.types import Tier
from tests.engine.lora.residency_model import Version
from tests.engine.lora.stepped_rig import STEPPED_MODEL, FakeSteps, SteppedRig, write_version
from tests.engine.lora.store_rig import assert_same

# A failure is shrunk for minutes before it is shown.
pytestmark = pytest.mark.timeout(600)

LAYERS = STEPPED_MODEL.layers
# More than one adapter's job takes: one before it, one for each matrix and, of a read, one after each layer.
MOST_STEPS = 1 + 2 * LAYERS + LAYERS + 3
# An adapter of rank r takes 512 r bytes of the host store and r / 2 pages: the largest three never fit together.
RANKS = (2, 4, 8)
TOO_LARGE_RANK = 16
HOST_BYTES = 6 * 1024 + 40
POOL_PAGES = 9
MOST_VERSIONS = 4
MOST_FAULTS = 2
MOST_ROUNDS = 400


def rule_on(condition: str, **draws: Any) -> Callable[[Callable[..., None]], Any]:
    """A rule about one of the known versions for which an attribute is true."""
    version = st.runner().flatmap(lambda machine: st.sampled_from([v for v in machine.known if getattr(v, condition)]))

    some = precondition(lambda machine: any(getattr(v, condition) for v in machine.known))
    as_rule: Callable[[Callable[..., None]], Callable[..., None]] = rule(version=version, **draws)
    return lambda function: some(as_rule(function))


class ResidencyMachine(RuleBasedStateMachine):
    """The threads go on only when a rule says so: every order of events can come up."""

    def __init__(self, streams: DeviceStreams | None = None) -> None:
        super().__init__()
        self.folder = TemporaryDirectory()
        self.descriptors = len(os.listdir("/proc/self/fd"))
        root = Path(self.folder.name)
        self.rig = SteppedRig(root=root, host_bytes=HOST_BYTES, pages=POOL_PAGES, streams=streams or CpuStreams())
        self.store = self.rig.store
        self.known: list[Version] = []
        self.registered = 0
        self.marks = 0
        self.faults = 0

    @initialize(ranks=st.lists(st.sampled_from(RANKS), min_size=2, max_size=3))
    def register_some(self, ranks: list[int]) -> None:
        for rank in ranks:
            self.register(rank, None)

    # -- versions and their users --------------------------------------------------------------------------------------

    def write(self, rank: int, nan_layer: int | None = None) -> tuple[Version, int]:
        self.registered += 1
        path = self.rig.root / str(self.registered)
        manifest, contents, descriptor = write_version(path, self.registered, rank, nan_layer)
        return Version(manifest=manifest, contents=contents, path=path, nan_layer=nan_layer), descriptor

    @precondition(lambda self: len(self.known) < MOST_VERSIONS)
    @rule(rank=st.sampled_from(RANKS), nan_layer=st.sampled_from([None, None, None, *range(LAYERS)]))
    def register(self, rank: int, nan_layer: int | None) -> None:
        version, descriptor = self.write(rank, nan_layer)
        self.store.register(version.manifest, descriptor)
        self.known.append(version)

    @rule_on("number")
    def make_calls_that_are_refused(self, version: Version) -> None:
        """What they must change is nothing, but that the descriptors are closed."""
        too_large, descriptor = self.write(TOO_LARGE_RANK)
        with pytest.raises(AdapterRejectedError, match="the host store has"):
            self.store.register(too_large.manifest, descriptor)
        with pytest.raises(ValueError, match="known already"):
            self.store.register(version.manifest, os.open(version.path, os.O_RDONLY))
        if version.users == 0:
            with pytest.raises(ValueError, match="no users"):
                self.store.release(version.number)
        if not version.held:
            with pytest.raises(ValueError, match="not held"):
                self.store.drop_host(version.number)
        if version.failed:
            with pytest.raises(AdapterRejectedError):
                self.store.acquire(version.number)
            with pytest.raises(AdapterRejectedError):
                self.store.start_load(version.number)
            with pytest.raises(AdapterRejectedError):
                self.store.start_copy(version.number, ())

    @rule_on("takes_new_work")
    def acquire(self, version: Version) -> None:
        self.store.acquire(version.number)
        version.users += 1

    @rule_on("users")
    def release(self, version: Version) -> None:
        self.store.release(version.number)
        version.users -= 1

    @rule_on("number")
    def close_version(self, version: Version) -> None:
        self.store.close_version(version.number)
        version.closed = True

    # -- loading and evicting ------------------------------------------------------------------------------------------

    @rule_on("takes_new_work")
    def start_load(self, version: Version) -> None:
        self.store.start_load(version.number)

    @rule_on("takes_new_work")
    def start_copy(self, version: Version) -> None:
        needed = self.store.device_pages(version.number)
        if self.rig.pool.free_pages < needed:
            return
        pages = self.rig.pool.allocate(needed, f"v{version.number}")
        if version.has_pages:
            with pytest.raises(ValueError, match="has its pages"):
                self.store.start_copy(version.number, pages)
            self.rig.pool.free(pages)
            return
        self.store.start_copy(version.number, pages)
        version.has_pages, version.may_lose_pages, version.host_is_to_go = True, False, False

    @rule_on("takes_new_work")
    def admit(self, version: Version) -> None:
        """What an engine does for a request: count it, make sure that its adapter comes."""
        self.acquire(version)
        self.start_copy(version)

    @rule_on("has_pages")
    def evict_device(self, version: Version) -> None:
        at_once = {candidate.version_id: candidate.pages for candidate in self.store.evictable()}
        free_pages = self.rig.pool.free_pages
        self.store.evict_device(version.number)
        freed = self.rig.pool.free_pages - free_pages
        assert freed == at_once.get(version.number, 0), "the pages of candidates, and no others, are free at once"
        assert not self.store.has_pages(version.number)
        version.has_pages = False

    @rule_on("number")
    def evict_host(self, version: Version) -> None:
        self.store.evict_host(version.number)
        version.may_lose_pages = version.has_pages
        version.host_is_to_go = bool(version.held)
        assert version.held or not self.is_known(version) or not self.store.is_in_host(version.number, 0)

    @rule_on("takes_new_work", holds=st.booleans(), host=st.booleans(), copies=st.booleans())
    def change_ones_mind(self, version: Version, holds: bool, host: bool, copies: bool) -> None:
        """An eviction that has to wait, for a reader, a copy or a hold, and a new load before it has come about."""
        if holds:
            self.hold_host(version)
        if host:
            self.evict_host(version)
        elif version.has_pages:
            self.evict_device(version)
        if not self.is_known(version):
            return
        self.check_pages(version)
        self.start_load(version)
        if copies:
            self.start_copy(version)

    @rule_on("number")
    def hold_host(self, version: Version) -> None:
        if not self.store.is_in_host(version.number, 0):
            return
        self.store.hold_host(version.number)
        present = [layer for layer in range(LAYERS) if self.store.is_in_host(version.number, layer)]
        version.held.append({layer: self.store.host_view(version.number, layer) for layer in present})

    @rule_on("held")
    def drop_host(self, version: Version) -> None:
        self.store.drop_host(version.number)
        version.held.pop()
        if not version.held and version.host_is_to_go:
            assert not self.is_known(version) or not self.store.is_in_host(version.number, 0)
            version.host_is_to_go = False

    # -- the pool's other users ----------------------------------------------------------------------------------------

    @rule(count=st.integers(1, 6))
    def grab_pages(self, count: int) -> None:
        for page in self.rig.pool.allocate(min(count, self.rig.pool.free_pages), "test"):
            self.marks -= 1
            self.rig.pool.data[:, page] = self.marks
            self.rig.grabbed[page] = self.marks

    @precondition(lambda self: self.rig.grabbed)
    @rule()
    def give_pages_back(self) -> None:
        self.rig.pool.free(self.rig.grabbed)
        self.rig.grabbed.clear()

    # -- files and devices that fail -----------------------------------------------------------------------------------

    @rule_on("is_sound", truncate=st.booleans())
    def spoil_file(self, version: Version, truncate: bool) -> None:
        """From now on no read that begins can be verified, nor one that has not come to its end."""
        self.drain()
        if truncate:
            os.truncate(version.path, os.path.getsize(version.path) - 4)
        else:
            os.utime(version.path, ns=(0, 0))
        version.spoilt = True
        version.stale = version.stale or self.rig.reader.is_idle

    @precondition(lambda self: self.faults < MOST_FAULTS)
    @rule(landing=st.booleans())
    def fail_next(self, landing: bool) -> None:
        self.faults += 1
        if landing:
            self.rig.next_landing_fails = True
        else:
            self.rig.next_read_fails = True

    @precondition(lambda self: self.faults < MOST_FAULTS and not self.rig.reader.is_idle)
    @rule()
    def stall_the_disk(self) -> None:
        """All reads fail, and the one that is under way goes on later all the same."""
        self.faults += 1
        for version in self.known:
            version.stalled = True
        self.rig.stall_reads()

    # -- time goes on --------------------------------------------------------------------------------------------------

    def states(self) -> dict[int, list[LayerState]]:
        return {version.number: self.rig.states(version.number) for version in self.known}

    def step(self, thread: FakeSteps, steps: int, drains: bool) -> None:
        before = self.states()
        for _ in range(steps):
            thread.step()
        assert self.states() == before, "a thread has changed a state"
        if drains:
            self.drain()

    @rule(steps=st.integers(1, MOST_STEPS), drains=st.booleans())
    def step_reader(self, steps: int, drains: bool) -> None:
        self.step(self.rig.reader, steps, drains)

    @rule(steps=st.integers(1, MOST_STEPS), drains=st.booleans())
    def step_copier(self, steps: int, drains: bool) -> None:
        self.step(self.rig.copier, steps, drains)

    @rule(reader_steps=st.integers(0, MOST_STEPS), copier_steps=st.integers(0, MOST_STEPS))
    def step_both(self, reader_steps: int, copier_steps: int) -> None:
        self.step(self.rig.reader, reader_steps, drains=True)
        self.step(self.rig.copier, copier_steps, drains=True)

    @rule()
    def drain(self) -> None:
        for event in self.rig.drain():
            (version,) = (version for version in self.known if version.number == event.version_id)
            version.apply(event)
        self.forget_those_that_left()

    @rule()
    def run_until_quiet(self) -> None:
        """The threads come to the end of their jobs: nothing waits for ever, and whatever can be loaded is."""
        for _ in range(MOST_ROUNDS):
            steps = [thread.step() for thread in self.rig.threads]
            # What has been read is queued when it is applied.
            self.drain()
            steps.append(self.run_device())
            self.drain()
            if not any(steps) and all(thread.is_idle for thread in self.rig.threads):
                break
        else:
            raise AssertionError("the store never comes to rest")
        assert not any(version.leaves and not version.held for version in self.known), "a version never leaves"
        for version in self.known:
            self.check_pages(version)
        if not any(self.keeps_host_bytes(version) for version in self.known):
            self.assert_complete([version for version in self.known if version.has_pages])
        assert self.store.device_pages_held == sum(
            self.store.device_pages(version.number) for version in self.known if version.has_pages
        )

    def run_device(self) -> bool:
        """Have it do all that can be enqueued; whether there was anything. The CPU does its work at once."""
        return False

    def keeps_host_bytes(self, version: Version) -> bool:
        """Whether a quiet version may keep another from loading."""
        return bool(version.held) or version.failed

    def assert_complete(self, versions: list[Version]) -> None:
        for version in versions:
            assert self.store.is_landed(version.number), f"{version} waits for nothing"
            assert self.store.is_verified(version.number)
            assert self.store.tier(version.number) is Tier.DEVICE

    # -- what always holds ---------------------------------------------------------------------------------------------

    def is_known(self, version: Version) -> bool:
        try:
            self.store.tier(version.number)
        except KeyError:
            return False
        return True

    def forget_those_that_left(self) -> None:
        gone = [version for version in self.known if not self.is_known(version)]
        for version in gone:
            assert version.leaves, f"{version} has vanished while it was wanted"
            assert not version.held, f"{version} has vanished while its host copy was held"
        self.known = [version for version in self.known if version not in gone]

    @invariant()
    def all_is_accounted_for(self) -> None:
        self.rig.check()
        self.forget_those_that_left()
        assert 0 <= self.rig.host_bytes_held <= self.rig.capacity_bytes
        for version in self.known:
            assert self.store.users(version.number) == version.users
            self.check_pages(version)
            self.check_contents(version)

    def check_pages(self, version: Version) -> None:
        has_pages = self.store.has_pages(version.number)
        if version.has_pages and not has_pages:
            assert version.may_lose_pages or version.leaves, f"{version} has lost its pages"
            version.has_pages = False
        assert has_pages == version.has_pages
        if not has_pages:
            version.layers_enqueued = version.layers_landed = 0

    def check_contents(self, version: Version) -> None:
        for layer, contents in enumerate(version.contents):
            is_in_host = self.store.is_in_host(version.number, layer)
            if is_in_host:
                assert_same(self.rig.in_host(version.number, layer), contents)
            if self.store.layer_state(version.number, layer) is LayerState.LANDED:
                assert_same(self.rig.landed(version.number, layer), contents)
            for held in version.held:
                if layer in held:
                    assert is_in_host, f"{version} has lost layer {layer} while its host copy was held"
                    assert self.store.host_view(version.number, layer) == held[layer]

    def teardown(self) -> None:
        try:
            for version in tuple(self.known):
                for _ in version.held:
                    self.store.drop_host(version.number)
                version.held.clear()
                self.close_version(version)
                while version.users:
                    self.release(version)
            self.run_until_quiet()
            assert self.known == []
            assert self.rig.host_bytes_held == 0
            assert self.rig.pool.free_pages + len(self.rig.grabbed) == POOL_PAGES
        finally:
            self.rig.close()
            self.folder.cleanup()
        assert len(os.listdir("/proc/self/fd")) <= self.descriptors, "a descriptor was left open"


ResidencyMachine.TestCase.settings = settings(max_examples=400, stateful_step_count=60, deadline=None)
TestResidency = ResidencyMachine.TestCase

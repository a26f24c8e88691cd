"""The residency of adapters on a device that lands layers beside the host, in every order that its streams allow."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import rule

from segue.engine.lora.states import LayerState
from tests.engine.lora.fake_streams import FakeStreams
from tests.engine.lora.residency_model import Version
from tests.engine.lora.store_rig import assert_same
from tests.engine.lora.test_residency_machine import MOST_STEPS, ResidencyMachine, rule_on

# A failure is shrunk for minutes before it is shown.
pytestmark = pytest.mark.timeout(600)

STREAMS = ("loop", "copying", "landing")


class StreamsMachine(ResidencyMachine):
    """Its streams go on when a rule says so, and as far as is needed when the host waits for one of their events."""

    def __init__(self) -> None:
        self.streams = FakeStreams(staging_slots=1, driven_by_waiting=True)
        super().__init__(self.streams)

    @rule(steps=st.integers(1, MOST_STEPS), which=st.lists(st.sampled_from(STREAMS), min_size=1, max_size=4))
    def go_on(self, steps: int, which: list[str]) -> None:
        before = self.states()
        for name in which:
            for _ in range(steps):
                self.streams.go_on(getattr(self.streams, name))
        assert self.states() == before

    @rule_on("takes_new_work", streams=st.integers(0, len(STREAMS)), uses=st.booleans())
    def enqueue(self, version: Version, streams: int, uses: bool) -> None:
        """The host is as far ahead of the device as it can be, and then each stream as far as it can be of the next."""
        self.admit(version)
        while any([self.rig.reader.step(), self.store.enqueue_copies()]):
            self.drain()
        for name in STREAMS[:streams]:
            while self.streams.go_on(getattr(self.streams, name)):
                pass
        if uses and self.is_known(version):
            self.use_what_is_enqueued(version)

    @rule(copies=st.integers(1, MOST_STEPS))
    def enqueue_next(self, copies: int) -> None:
        for _ in range(copies):
            self.store.enqueue_copies()
        self.drain()

    def run_device(self) -> bool:
        enqueued = self.store.enqueue_copies()
        self.streams.go_on_as_far_as_possible()
        return enqueued or self.store.awaits_landings

    @rule_on("has_pages")
    def use(self, version: Version) -> None:
        self.use_what_is_enqueued(version)

    def use_what_is_enqueued(self, version: Version) -> None:
        """Whoever waits for a layer's event finds the layer, although nobody has seen it land."""
        for layer, contents in enumerate(version.contents):
            event = self.store.landing_event(version.number, layer)
            enqueued = self.store.layer_state(version.number, layer) is LayerState.ENQUEUED
            assert (event is not None) == enqueued
            if event is not None:
                event.synchronize()
                assert_same(self.rig.landed(version.number, layer), contents)
                assert self.store.landed_seconds(version.number)[layer] is None


StreamsMachine.TestCase.settings = settings(max_examples=300, stateful_step_count=60, deadline=None)
TestResidencyOnStreams = StreamsMachine.TestCase

"""The residency of one adapter version: its states, which may follow which, and what holds its memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

import torch

from segue.engine.lora.host_plan import HostModule, HostPlan
from segue.engine.lora.landing import LandingTables
from segue.engine.lora.manifest import AdapterManifest
from segue.engine.lora.transfer import CopyLoad, ReadJob
from segue.engine.memory.adapter_layout import AdapterLayout
from segue.scheduler.placement import AdapterCost


class LayerState(Enum):
    """Where one layer of an adapter is.

    A LANDING one waits for its copy. The device has an ENQUEUED layer and lands it behind an event, and may
    use it behind that event. A LANDED layer may or may not be in host memory as well.
    """

    ABSENT = "absent"
    READING = "reading"
    HOST = "host"
    LANDING = "landing"
    ENQUEUED = "enqueued"
    LANDED = "landed"


UNDER_WAY = frozenset({LayerState.LANDING, LayerState.ENQUEUED})

LAYER_TRANSITIONS: Mapping[LayerState, frozenset[LayerState]] = {
    LayerState.ABSENT: frozenset({LayerState.READING}),
    LayerState.READING: frozenset({LayerState.HOST, LayerState.ABSENT}),
    LayerState.HOST: frozenset({LayerState.LANDING, LayerState.ABSENT}),
    LayerState.LANDING: frozenset({LayerState.ENQUEUED, LayerState.LANDED, LayerState.HOST}),
    LayerState.ENQUEUED: frozenset({LayerState.LANDED, LayerState.HOST}),
    LayerState.LANDED: frozenset({LayerState.HOST, LayerState.ABSENT}),
}


class ReadPhase(Enum):
    """How far the content of an adapter version is known.

    WAITING is for room in the host store. VERIFIED: a complete copy that was read while the file stayed the same is in
    host memory or on the device. FAILED is final.
    """

    UNREAD = "unread"
    WAITING = "waiting"
    READING = "reading"
    VERIFIED = "verified"
    FAILED = "failed"


PHASE_TRANSITIONS: Mapping[ReadPhase, frozenset[ReadPhase]] = {
    ReadPhase.UNREAD: frozenset({ReadPhase.WAITING}),
    ReadPhase.WAITING: frozenset({ReadPhase.READING, ReadPhase.UNREAD}),
    ReadPhase.READING: frozenset({ReadPhase.VERIFIED, ReadPhase.UNREAD, ReadPhase.FAILED}),
    ReadPhase.VERIFIED: frozenset({ReadPhase.UNREAD, ReadPhase.FAILED}),
    ReadPhase.FAILED: frozenset(),
}


@dataclass(slots=True, kw_only=True, eq=False)
class HostCopy:
    """An extent of the host store. ``reader`` fills it, ``copies`` copy jobs and ``holds`` CPU jobs read it."""

    offset: int
    reader: ReadJob | None
    ready_layers: int = 0
    copies: int = 0
    holds: int = 0

    @property
    def is_referenced(self) -> bool:
        return self.reader is not None or self.copies > 0 or self.holds > 0


@dataclass(slots=True, kw_only=True, eq=False)
class DeviceCopy:
    """Pages of the pool, and the ``load`` that fills them; the copies of ``copies`` layers are under way.

    ``landing_events`` has a layer's event while it is ENQUEUED.
    """

    pages: tuple[int, ...]
    load: CopyLoad
    landed_seconds: list[float | None]
    landing_events: list[torch.cuda.Event | None]
    copies: int = 0

    @classmethod
    def to_fill(cls, pages: tuple[int, ...], load: CopyLoad) -> DeviceCopy:
        """Pages in which none of the load's layers has landed."""
        nothing = [None] * len(load.layers)
        return cls(pages=pages, load=load, landed_seconds=[*nothing], landing_events=[*nothing])

    @property
    def is_complete(self) -> bool:
        return None not in self.landed_seconds


@dataclass(frozen=True, slots=True)
class HostLayer:
    """One layer in host memory."""

    modules: tuple[HostModule, ...]


@dataclass(slots=True, kw_only=True, eq=False)
class Adapter:
    """All that the store knows of one version. ``readers`` counts read jobs that use the descriptor."""

    manifest: AdapterManifest
    descriptor: int
    plan: HostPlan
    layout: AdapterLayout
    landing_tables: LandingTables
    layers: list[LayerState]
    cost: AdapterCost
    last_used_seconds: float
    phase: ReadPhase = ReadPhase.UNREAD
    failure: str = ""
    users: int = 0
    recent_uses: float = 0.0
    closed: bool = False
    evict_host_when_dropped: bool = False
    readers: int = 0
    host: HostCopy | None = None
    device: DeviceCopy | None = None

    @classmethod
    def on_disk(
        cls, manifest: AdapterManifest, descriptor: int, plan: HostPlan, layout: AdapterLayout, now: float
    ) -> Adapter:
        """A version that has just become known. ``plan`` and ``layout`` are those of the manifest."""
        return cls(
            manifest=manifest,
            descriptor=descriptor,
            plan=plan,
            layout=layout,
            landing_tables=LandingTables.of(plan, layout),
            layers=[LayerState.ABSENT] * len(manifest.layers),
            # Asked for with every row of every step, and a sum over all modules.
            cost=AdapterCost(manifest.version_id, manifest.max_rank, plan.host_bytes),
            last_used_seconds=now,
        )

    @property
    def version_id(self) -> int:
        return self.manifest.version_id

    @property
    def is_device_complete(self) -> bool:
        """Whether the device can serve without the host copy from now on."""
        return self.phase is ReadPhase.VERIFIED and self.device is not None and self.device.is_complete

    @property
    def needs_host(self) -> bool:
        """Whether a pass or a copy under way depends on the host copy."""
        return (self.device is not None and not self.is_device_complete) or (
            self.host is not None and self.host.holds > 0
        )

    def move_layer(self, layer: int, state: LayerState) -> None:
        """Raises RuntimeError for a step that the transition table does not have."""
        before = self.layers[layer]
        if state not in LAYER_TRANSITIONS[before]:
            raise RuntimeError(f"version {self.version_id} layer {layer}: {before.name} cannot become {state.name}")
        self.layers[layer] = state

    def move_phase(self, phase: ReadPhase) -> None:
        """Raises RuntimeError for a step that the transition table does not have."""
        if phase not in PHASE_TRANSITIONS[self.phase]:
            raise RuntimeError(f"version {self.version_id}: {self.phase.name} cannot become {phase.name}")
        self.phase = phase

    def check(self) -> None:
        """Raise AssertionError unless states, copies and counts agree."""
        where = f"version {self.version_id}"
        assert self.users >= 0, f"{where}: {self.users} users"
        states = self.layers
        if self.device is None:
            assert not {*UNDER_WAY, LayerState.LANDED} & set(states), f"{where}: landed without pages"
        else:
            landing = sum(state in UNDER_WAY for state in states)
            assert landing == self.device.copies, f"{where}: {landing} layers land, {self.device.copies} copies"
            events = [event is not None for event in self.device.landing_events]
            assert [state is LayerState.ENQUEUED for state in states] == events, f"{where}: events of layers"
            landed = [seconds is not None for seconds in self.device.landed_seconds]
            assert [state is LayerState.LANDED for state in states] == landed, f"{where}: landed layers"
            waits = self.host is not None or self.phase in (ReadPhase.WAITING, ReadPhase.FAILED)
            assert waits or self.device.is_complete, f"{where}: an incomplete device copy without a host copy"
        if self.host is None:
            assert not {LayerState.READING, LayerState.HOST, *UNDER_WAY} & set(states), f"{where}: host layers"
            assert self.phase is not ReadPhase.READING, f"{where}: reading into nothing"
            assert self.phase is not ReadPhase.VERIFIED or self.is_device_complete, f"{where}: verified but nowhere"
        else:
            assert self.host.holds >= 0, f"{where}: {self.host.holds} holds"
            assert self.phase in (ReadPhase.READING, ReadPhase.VERIFIED, ReadPhase.FAILED), f"{where}: {self.phase}"
            absent = LayerState.ABSENT if self.phase is ReadPhase.FAILED else LayerState.READING
            assert all(state is absent for state in states[self.host.ready_layers :]), f"{where}: unread layers"
            assert absent not in states[: self.host.ready_layers], f"{where}: a layer in host memory is {absent}"

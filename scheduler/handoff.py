"""Where a layer's LoRA deltas are computed while its adapter is still loading.

A cold prefill reaches its layers one after another while their weights stream in. When it reaches a layer, a policy
sees what has arrived and says: the device, the CPU workers, or wait. The device is always right once the layer has
landed, or is landing in an order that the prefill's stream can wait for; the CPU is possible once the layer's bytes are
in host memory and checked. What is best of it is said by a plan for all layers: see ``handoff_plan``.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import ClassVar, Protocol


class LayerSource(Enum):
    """The decision for one layer of one adapter."""

    DEVICE = "device"
    CPU = "cpu"
    WAIT = "wait"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerView:
    """What is known of a layer when a prefill reaches it.

    ``landed``: its weights are on the device. ``enqueued``: the device is bringing them, and what is enqueued behind
    that finds them. ``adapter_landed``: those of all layers have landed. ``in_host``: its bytes can be read by CPU
    workers. ``cpu_allowed`` is False after CPU workers failed this prefill too often. ``planned`` is what a plan says,
    None where there is none or it does not reach so far.
    """

    layer: int
    landed: bool
    enqueued: bool
    adapter_landed: bool
    in_host: bool
    ready_workers: int
    cpu_allowed: bool = True
    planned: LayerSource | None = None

    @property
    def device_possible(self) -> bool:
        return self.landed or self.enqueued

    @property
    def cpu_possible(self) -> bool:
        return self.in_host and self.ready_workers > 0 and self.cpu_allowed


class HandoffPolicy(Protocol):
    """Decides a layer's source. Pure: the same view gives the same answer."""

    @property
    def follows_plan(self) -> bool:
        """Whether it wants to see what a plan says."""
        ...

    def choose(self, view: LayerView) -> LayerSource: ...


@dataclass(frozen=True, slots=True)
class FollowPlan:
    """What the plan says, where that can be done.

    A layer that has landed comes from the device, whatever was planned. One that is planned for the CPU, and cannot be
    served there, waits for its weights; one that is not planned takes what can serve it first.
    """

    follows_plan: ClassVar[bool] = True

    def choose(self, view: LayerView) -> LayerSource:
        if view.landed:
            return LayerSource.DEVICE
        if view.planned is LayerSource.CPU and view.cpu_possible:
            return LayerSource.CPU
        if view.device_possible:
            return LayerSource.DEVICE
        return LayerSource.CPU if view.planned is None and view.cpu_possible else LayerSource.WAIT


@dataclass(frozen=True, slots=True)
class FixedHandover:
    """The first ``cpu_layers`` layers on the CPU although they may have landed, the others on the device.

    Where the CPU cannot serve, a layer waits for its weights like any other.
    """

    cpu_layers: int
    follows_plan: ClassVar[bool] = False

    def choose(self, view: LayerView) -> LayerSource:
        if view.layer < self.cpu_layers and view.cpu_possible:
            return LayerSource.CPU
        return LayerSource.DEVICE if view.device_possible else LayerSource.WAIT


@dataclass(frozen=True, slots=True)
class StreamLayers:
    """Never the CPU: each layer waits for its own weights."""

    follows_plan: ClassVar[bool] = False

    def choose(self, view: LayerView) -> LayerSource:
        return LayerSource.DEVICE if view.device_possible else LayerSource.WAIT


@dataclass(frozen=True, slots=True)
class LoadFirst:
    """Never the CPU: the first layer waits for the whole adapter."""

    follows_plan: ClassVar[bool] = False

    def choose(self, view: LayerView) -> LayerSource:
        return LayerSource.DEVICE if view.adapter_landed else LayerSource.WAIT

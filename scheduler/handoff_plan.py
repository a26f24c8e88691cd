"""The hand-over planner: for each layer of a cold prefill the device, the CPU or a wait, from expected times.

Layers are reached in order. On the device a layer waits until its weights have landed. On the CPU it needs its bytes in
host memory and takes its deltas' time besides; its rows share the link with the copies under way, so that every layer
that has not landed lands later by the time that the rows' bytes take. All times are in seconds from now on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from segue.scheduler.handoff import LayerSource

# Ways to a layer that are kept for each layer behind it. With layers of one kind there are at most that many.
_WAYS_PER_LAYER = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerOutlook:
    """What is expected of one layer of a prefill.

    ``landing_seconds``: when its weights are on the device if no CPU rows use the link from now on; 0 where they are,
    None where that is not known, infinite where they are not coming. ``in_host``: CPU workers can read its bytes.
    ``base_seconds`` is the layer without the deltas of an adapter that is loading, ``cpu_seconds`` what deltas from the
    CPU add to it over a link that carries nothing else, infinite where there is no help, and ``row_seconds`` the link's
    time for the rows on their way out and back.
    """

    landing_seconds: float | None
    in_host: bool
    base_seconds: float
    cpu_seconds: float
    row_seconds: float

    @property
    def cpu_possible(self) -> bool:
        return self.in_host and self.cpu_seconds < math.inf

    @property
    def is_known(self) -> bool:
        """Whether it can be said now how long the layer will take on some way."""
        return self.cpu_possible or (self.landing_seconds is not None and self.landing_seconds < math.inf)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillOutlook:
    """The layers from ``first_layer`` on that a prefill has before it, the first of them in ``start_seconds``.

    The link is busy with copies for ``link_busy_seconds``. Each layer on the CPU costs other requests ``harm_seconds``
    together, already weighted: they count like the prefill's own.
    """

    first_layer: int
    layers: tuple[LayerOutlook, ...]
    link_busy_seconds: float
    harm_seconds: float = 0.0
    start_seconds: float = 0.0

    @property
    def known_layers(self) -> tuple[LayerOutlook, ...]:
        """Those before the first of which nothing is known, as where a disk has not brought it."""
        for index, layer in enumerate(self.layers):
            if not layer.is_known:
                return self.layers[:index]
        return self.layers


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedLayer:
    """The prefill reaches the layer, begins it when it has what it needs, and ends it. WAIT is the device, later."""

    source: LayerSource
    reach_seconds: float
    start_seconds: float
    end_seconds: float

    @property
    def wait_seconds(self) -> float:
        return self.start_seconds - self.reach_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class HandoffPlan:
    """What is planned for the layers from ``first_layer`` on; those behind them are decided when they are reached.

    ``slack_seconds``: as long as no layer is reached, or lands, so much earlier or later, the plan stays the best.
    """

    first_layer: int
    layers: tuple[PlannedLayer, ...]
    harm_seconds: float
    slack_seconds: float = 0.0

    @property
    def finish_seconds(self) -> float:
        """When the last planned layer ends."""
        return self.layers[-1].end_seconds if self.layers else 0.0

    @property
    def cost_seconds(self) -> float:
        """What the planner minimises: the prefill's own time and the harm to others."""
        return self.finish_seconds + self.harm_seconds

    @property
    def cpu_layers(self) -> int:
        return sum(layer.source is LayerSource.CPU for layer in self.layers)

    def layer(self, layer: int) -> PlannedLayer | None:
        """What is planned for a layer of the model; None where it is not in the plan."""
        index = layer - self.first_layer
        return self.layers[index] if 0 <= index < len(self.layers) else None


def cpu_end_seconds(layer: LayerOutlook, start_seconds: float, busy_until_seconds: float) -> float:
    """When a layer on the CPU ends.

    Its rows share the link half and half with a copy under way: they are slower by the time that the link is still
    busy, at most by their own time again. So a layer that starts later never ends earlier.
    """
    sharing_seconds = min(layer.row_seconds, max(0.0, busy_until_seconds - start_seconds))
    delta_seconds = max(layer.cpu_seconds, layer.row_seconds + sharing_seconds)
    return start_seconds + layer.base_seconds + delta_seconds


def device_start_seconds(layer: LayerOutlook, reach_seconds: float, delay_seconds: float) -> float:
    """When a layer on the device begins; infinite where it does not land in a known time.

    ``delay_seconds`` is the link's time for the rows of CPU layers before it.
    """
    if layer.landing_seconds is None:
        return math.inf
    landing_seconds = layer.landing_seconds + delay_seconds if layer.landing_seconds > 0 else 0.0
    return max(reach_seconds, landing_seconds)


def follow(outlook: PrefillOutlook, on_cpu: Sequence[bool]) -> HandoffPlan:
    """The plan that takes the CPU for these of the known layers and the device for the others.

    Its times are infinite from a layer on that cannot be served so.
    """
    planned = []
    now, delay, harm = outlook.start_seconds, 0.0, 0.0
    for layer, cpu in zip(outlook.known_layers, on_cpu, strict=True):
        reach = now
        if cpu:
            source, start = LayerSource.CPU, reach if layer.cpu_possible else math.inf
            now = cpu_end_seconds(layer, start, outlook.link_busy_seconds + delay)
            delay += layer.row_seconds
            harm += outlook.harm_seconds
        else:
            start = device_start_seconds(layer, reach, delay)
            source = LayerSource.WAIT if start > reach else LayerSource.DEVICE
            now = start + layer.base_seconds
        planned.append(PlannedLayer(source=source, reach_seconds=reach, start_seconds=start, end_seconds=now))
    return HandoffPlan(first_layer=outlook.first_layer, layers=tuple(planned), harm_seconds=harm)


def plan_handoff(outlook: PrefillOutlook) -> HandoffPlan:
    """The plan with the least ``cost_seconds``.

    Never more than all on the CPU, and than streaming each layer, which is never later than a wait for the whole
    adapter. Exact where all layers have few kinds (numbers of row bytes); else the best of the ways that were kept.
    """
    layers = outlook.known_layers
    streamed = follow(outlook, (False,) * len(layers))
    help_costs = [
        max(layer.cpu_seconds, layer.row_seconds) + outlook.harm_seconds for layer in layers if layer.cpu_possible
    ]
    # A layer on the CPU costs its deltas whatever it saves, and all that there is to save are the waits.
    waits = sum(layer.wait_seconds for layer in streamed.layers) if streamed.cost_seconds < math.inf else math.inf
    least_cost = min(help_costs, default=math.inf)
    if not help_costs or waits <= least_cost:
        return replace(streamed, slack_seconds=least_cost - waits if waits < math.inf else 0.0)
    plans = [streamed, follow(outlook, _best_way(outlook, layers))]
    if all(layer.cpu_possible for layer in layers):
        plans.append(follow(outlook, (True,) * len(layers)))
    return min(plans, key=lambda plan: plan.cost_seconds)


@dataclass(frozen=True, slots=True)
class _Way:
    """A way to a layer's beginning, by the layer before. Of ways with the same delay the earlier one is never worse."""

    now: float
    delay: float
    cpu_layers: int
    on_cpu: bool = False
    before: _Way | None = None

    def sources(self) -> Iterator[bool]:
        """Of the layers up to here, the last one first, whether each is on the CPU."""
        way = self
        while way.before is not None:
            yield way.on_cpu
            way = way.before


def _best_way(outlook: PrefillOutlook, layers: Sequence[LayerOutlook]) -> tuple[bool, ...]:
    """By dynamic programming over the layers: what comes later depends on the time, the delay and the CPU layers."""
    ways = [_Way(outlook.start_seconds, 0.0, 0)]
    for layer in layers:
        best: dict[tuple[int, float], _Way] = {}
        for way in ways:
            for step in _steps(layer, way, outlook.link_busy_seconds):
                key = step.cpu_layers, round(step.delay, 9)
                if key not in best or step.now < best[key].now:
                    best[key] = step
        ways = sorted(best.values(), key=lambda way: way.now + way.cpu_layers * outlook.harm_seconds)
        del ways[_WAYS_PER_LAYER * len(layers) :]
    cheapest = min(ways, key=lambda way: way.now + way.cpu_layers * outlook.harm_seconds)
    return tuple(reversed(list(cheapest.sources())))


def _steps(layer: LayerOutlook, way: _Way, link_busy_seconds: float) -> Iterator[_Way]:
    start = device_start_seconds(layer, way.now, way.delay)
    if start < math.inf:
        yield _Way(start + layer.base_seconds, way.delay, way.cpu_layers, False, way)
    if layer.cpu_possible:
        end = cpu_end_seconds(layer, way.now, link_busy_seconds + way.delay)
        yield _Way(end, way.delay + layer.row_seconds, way.cpu_layers + 1, True, way)

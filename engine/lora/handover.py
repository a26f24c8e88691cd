"""Plans of cold passes: what is known of a pass's layers goes to the planner, and what happened corrects its costs."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

from segue.engine.lora.bridge import CpuBridge
from segue.engine.lora.manifest import Projection
from segue.engine.lora.points import POINT_PROJECTIONS
from segue.engine.lora.store import AdapterStore
from segue.engine.timeline import LayerRecord
from segue.scheduler.handoff import LayerSource
from segue.scheduler.handoff_costs import HandoffCosts
from segue.scheduler.handoff_plan import HandoffPlan, LayerOutlook, PrefillOutlook, plan_handoff

_LOG = logging.getLogger(__name__)
# A plan is made again when a layer is reached, or begun, earlier or later by more than this and this share of the rest.
_DRIFT_SECONDS = 100e-6
_DRIFT_SHARE = 0.1
# Versions of which it is kept what their layers take.
_REMEMBERED = 1024


@dataclass(frozen=True, slots=True)
class LayerWork:
    """What one layer's deltas on the CPU take: ``rank`` in ranks of q, k, v and o, and bytes of each row, out and
    back."""

    rank: int
    row_bytes: int


@dataclass(frozen=True, slots=True)
class _Entered:
    """A layer that the pass has entered, and whether the device could begin it at once."""

    source: LayerSource
    at_once: bool


def rank_elems(shapes: Mapping[Projection, tuple[int, int]]) -> int:
    """Elements of one rank of a layer's q, k, v and o, in and out together."""
    return sum(sum(shapes[projection]) for projection in (Projection.Q, Projection.K, Projection.V, Projection.O))


class HandoverPlanner:
    """Plans the passes of one engine, and learns from each that ends."""

    def __init__(
        self,
        *,
        store: AdapterStore,
        bridge: CpuBridge,
        costs: HandoffCosts,
        shapes: Mapping[Projection, tuple[int, int]],
        item_bytes: int,
        clock: Callable[[], float],
    ) -> None:
        """``shapes`` has each projection's (in, out) features, ``item_bytes`` are those of an element."""
        self.costs = costs
        self.clock = clock
        self._store = store
        self._bridge = bridge
        self._shapes = dict(shapes)
        self._rank_elems = rank_elems(shapes)
        self._item_bytes = item_bytes
        self._on_cpu: set[PassHandover] = set()
        self._passes: set[object] = set()
        self._work = lru_cache(_REMEMBERED)(self._work_of)

    def begin(self, user: object, version_id: int, rows: int, pass_rows: int, *, cpu_allowed: bool) -> PassHandover:
        """The hand-over of one adapter's ``rows`` in a pass of ``pass_rows``, which is ``user``. It must be ended or
        given up."""
        return PassHandover(self, user, version_id, rows, pass_rows, self._work(version_id), cpu_allowed=cpu_allowed)

    def cpu_layer_seconds(self, version_id: int, tokens: int) -> list[float]:
        """What each layer of a pass of so many rows takes whose deltas all come from the CPU."""
        cores = self.shared_cores(None)
        base_seconds = self.costs.base_seconds(tokens)
        return [
            base_seconds
            + max(self.costs.cpu_seconds(tokens, work.rank, cores), self._store.link_seconds(tokens * work.row_bytes))
            for work in self._work(version_id)
        ]

    def shared_cores(self, user: object) -> int:
        """Workers that a pass has beside those that have layers on the CPU, or plan to; 0 where there are none."""
        ready = self._bridge.ready_workers
        others = (self._passes | {handover.user for handover in self._on_cpu}) - {user}
        return max(1, ready // (1 + len(others))) if ready else 0

    def job_workers(self, user: object, layer: int, rows: Mapping[int, int]) -> int | None:
        """How many workers share each job of a layer that the pass ``user`` has entered, with so many rows of each
        version; None where nothing was measured of the workers. The pass counts until ``leave_workers``.
        """
        self._passes.add(user)
        ranks = {version_id: self._work(version_id)[layer].rank for version_id in rows}
        tokens = sum(rows.values())
        rank_tokens = sum(count * ranks[version_id] for version_id, count in rows.items())
        adapters = sum(rank > 0 for rank in ranks.values())
        rank = -(-rank_tokens // tokens)
        return self.costs.job_workers(tokens, rank, self.shared_cores(user), max(1, adapters))

    def leave_workers(self, user: object) -> None:
        """The pass has no layer on the CPU now."""
        self._passes.discard(user)

    def plan(self, handover: PassHandover, layer: int, start_seconds: float) -> HandoffPlan:
        """The plan for the layers from ``layer`` on, which begins in ``start_seconds``."""
        plan = plan_handoff(self._outlook(handover, layer, start_seconds))
        if plan.cpu_layers:
            self._on_cpu.add(handover)
        else:
            self._on_cpu.discard(handover)
        return plan

    def forget(self, handover: PassHandover) -> None:
        """The pass uses the workers no longer."""
        self._on_cpu.discard(handover)

    def _outlook(self, handover: PassHandover, first_layer: int, start_seconds: float) -> PrefillOutlook:
        store, costs = self._store, self.costs
        version_id, rows = handover.version_id, handover.rows
        others_on_cpu = len(self._on_cpu - {handover})
        cores = self.shared_cores(handover.user) if handover.cpu_allowed else 0
        base_seconds = costs.base_seconds(handover.pass_rows)
        landing = store.landing_seconds(version_id)
        layers = []
        for layer in range(first_layer, len(landing)):
            work = handover.work[layer]
            layers.append(
                LayerOutlook(
                    landing_seconds=landing[layer],
                    in_host=store.is_in_host(version_id, layer),
                    base_seconds=base_seconds,
                    cpu_seconds=costs.cpu_seconds(rows, work.rank, cores),
                    row_seconds=store.link_seconds(rows * work.row_bytes),
                )
            )
        cpu_seconds = max((item.cpu_seconds for item in layers if item.cpu_possible), default=0.0)
        row_seconds = max((item.row_seconds for item in layers), default=0.0)
        own_load = any(seconds is not None and 0 < seconds < math.inf for seconds in landing)
        others_loading = store.loads - own_load
        loading_seconds = others_loading * (row_seconds + costs.layer_host_seconds)
        harm_seconds = costs.harm_weight * (others_on_cpu * cpu_seconds + loading_seconds)
        return PrefillOutlook(
            first_layer=first_layer,
            layers=tuple(layers),
            link_busy_seconds=store.link_busy_seconds,
            harm_seconds=harm_seconds,
            start_seconds=start_seconds,
        )

    def _work_of(self, version_id: int) -> tuple[LayerWork, ...]:
        work = []
        for modules in self._store.device_layout(version_id).layers:
            elems = sum(module.rank * (module.in_features + module.out_features) for module in modules)
            present = {module.projection for module in modules}
            row_elems = 0
            for projections in POINT_PROJECTIONS.values():
                used = [projection for projection in projections if projection in present]
                if used:
                    row_elems += self._shapes[used[0]][0] + sum(self._shapes[projection][1] for projection in used)
            work.append(LayerWork(-(-elems // self._rank_elems), row_elems * self._item_bytes))
        return tuple(work)


class PassHandover:
    """The plan of one adapter's rows in a pass while it runs, and what became of it."""

    def __init__(
        self,
        planner: HandoverPlanner,
        user: object,
        version_id: int,
        rows: int,
        pass_rows: int,
        work: tuple[LayerWork, ...],
        *,
        cpu_allowed: bool,
    ) -> None:
        self.user = user
        self.version_id = version_id
        self.rows = rows
        self.pass_rows = pass_rows
        self.work = work
        self.cpu_allowed = cpu_allowed
        self._planner = planner
        self._plan: HandoffPlan | None = None
        self._plan_seconds = 0.0
        self._first: tuple[float, HandoffPlan] | None = None
        self._entered: list[_Entered] = []
        self._cores = 0
        self._plans = 0

    def planned(self, layer: int, layers_ahead: int) -> LayerSource | None:
        """What the plan says of a layer that is reached, and has not landed; None where nothing is known of it.

        The device has not done the last ``layers_ahead`` layers before it.
        """
        now = self._planner.clock()
        start_seconds = self._lead_seconds(layer, layers_ahead)
        if self._plan is None or self._is_stale(self._plan, layer, now + start_seconds):
            self._plan, self._plan_seconds = self._planner.plan(self, layer, start_seconds), now
            self._cores = self._planner.shared_cores(self.user)
            self._plans += 1
            if self._first is None and self._plan.layers:
                self._first = now, self._plan
        planned = self._plan.layer(layer)
        return None if planned is None else planned.source

    def enter(self, source: LayerSource, *, at_once: bool) -> None:
        """The pass enters its next layer; ``at_once``: on the CPU, or its weights had landed."""
        self._entered.append(_Entered(source, at_once))

    def conclude(
        self,
        requests: Sequence[int],
        records: Sequence[LayerRecord],
        lane_seconds: Callable[[], Sequence[float]],
    ) -> None:
        """The pass has ended well; ``requests`` wait for their first token.

        ``lane_seconds`` tells what its layers took on the device, where that is measured there: else ``records`` do.
        """
        self._planner.forget(self)
        if self._first is None:
            return
        on_device = lane_seconds()
        seconds = list(on_device) or [record.end_seconds - record.start_seconds for record in records]
        # On the device's own clock a layer that was waited for took the wait as well.
        known = [(layer, item) for layer, item in enumerate(self._entered) if item.at_once or not on_device]
        cpu = [(self.work[layer].rank, self._cores) for layer, item in known if item.source is LayerSource.CPU]
        if known and self.rows == self.pass_rows:
            # In a pass of several adapters a layer's time is not of one of them.
            measured = sum(seconds[layer] for layer, _ in known)
            self._planner.costs = self._planner.costs.learned(self.rows, len(known), cpu, measured)
        self._log(requests, records, sum(seconds[layer] for layer, _ in known))

    def give_up(self) -> None:
        """The pass ends without a result, or has ended."""
        self._planner.forget(self)

    def _lead_seconds(self, layer: int, layers_ahead: int) -> float:
        """How long the device will take for what it has not done, of whose first layer half is taken as done."""
        seconds = 0.0
        for index, before in enumerate(range(layer - layers_ahead, layer)):
            planned = None if self._plan is None else self._plan.layer(before)
            whole = (
                self._planner.costs.base_seconds(self.pass_rows)
                if planned is None
                else planned.end_seconds - planned.start_seconds
            )
            seconds += whole if index else whole / 2
        return seconds

    def _is_stale(self, plan: HandoffPlan, layer: int, reach_seconds: float) -> bool:
        """Whether the layer is reached at another time than was planned, by the clock, or there was no worker then."""
        planned = plan.layer(layer)
        if planned is None or (self._cores == 0 and self._planner.shared_cores(self.user) > 0):
            return True
        elapsed = reach_seconds - self._plan_seconds
        drift_seconds = max(_DRIFT_SECONDS, _DRIFT_SHARE * (plan.finish_seconds - planned.reach_seconds))
        allowed = max(drift_seconds, plan.slack_seconds)
        return elapsed > planned.start_seconds + allowed or elapsed < planned.reach_seconds - allowed

    def _log(self, requests: Sequence[int], records: Sequence[LayerRecord], layer_seconds: float) -> None:
        assert self._first is not None
        began, plan = self._first
        elapsed = (records[-1].end_seconds if records else self._planner.clock()) - began
        planned_layers = [item.source for item in plan.layers]
        scales = self._planner.costs.compute.scales
        _LOG.log(
            logging.INFO if requests else logging.DEBUG,
            "hand-over requests=%s version=%d rows=%d first_layer=%d planned=%s happened=%s planned_seconds=%.6f "
            "seconds=%.6f layer_seconds=%.6f plans=%d base_scale=%.3f cpu_scale=%.3f",
            ",".join(map(str, requests)),
            self.version_id,
            self.rows,
            plan.first_layer,
            _runs(planned_layers),
            _runs([item.source for item in self._entered]),
            plan.finish_seconds,
            elapsed,
            layer_seconds,
            self._plans,
            scales[0],
            scales[1],
        )


def _runs(sources: Sequence[LayerSource]) -> str:
    """The sources of layers in order: ``cpu:3,device:29``."""
    return ",".join(f"{source.value}:{len(list(run))}" for source, run in groupby(sources))

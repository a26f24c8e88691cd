"""What the cost model says of points that were not measured.

Each pass goes over its layers one after the other, and passes follow one another on the device; copies and disk reads
are in the order of arrival, layer by layer. When a layer is reached, its mode says where the deltas come from. Decodes
of others, and what overlaps between passes, are left out.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from segue.bench.coldstart.points import Mode, Point
from segue.bench.coldstart.view import TTFT, PointView
from segue.bench.random_checkpoints import TARGET_PROJECTIONS, Targets
from segue.engine.lora.manifest import Projection
from segue.engine.lora.points import POINT_PROJECTIONS
from segue.scheduler.cost_model import CostProfile, StepLoad
from segue.types import Tier


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterWidths:
    """Of one layer of an adapter: elements of one rank, those that one rank of q, k, v and o has, and elements that a
    row sends to CPU workers and back."""

    rank_elems: int
    qkvo_rank_elems: int
    row_elems: int

    @classmethod
    def of(cls, shapes: Mapping[Projection, tuple[int, int]], targets: Targets) -> AdapterWidths:
        """``shapes`` has each projection's (in, out) features."""
        present = TARGET_PROJECTIONS[targets]
        row_elems = 0
        for members in POINT_PROJECTIONS.values():
            used = [shapes[projection] for projection in members if projection in present]
            row_elems += used[0][0] + sum(out for _, out in used) if used else 0
        return cls(
            rank_elems=sum(sum(shapes[projection]) for projection in present),
            qkvo_rank_elems=sum(sum(shapes[projection]) for projection in TARGET_PROJECTIONS[Targets.QKVO]),
            row_elems=row_elems,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictor:
    """``shapes`` has each projection's (in, out) features, ``item_bytes`` are those of an element. Disks are read at
    ``read_bytes_per_second``, and a step computes at most ``budget_tokens`` rows."""

    profile: CostProfile
    shapes: Mapping[Projection, tuple[int, int]]
    item_bytes: int
    cores: int
    budget_tokens: int
    read_bytes_per_second: float

    def ttft_seconds(self, point: Point, mode: Mode) -> float:
        """The mean time to the first token of the requests that arrive."""
        if mode is Mode.WARM:
            return self._warm(point)
        layers = self.profile.layers
        compute_seconds = self.profile.prefill_seconds(self._load(point, 1)) / layers
        cpu_seconds = self._cpu_seconds(point)
        copy_seconds, read_seconds = self._copy_seconds(point), self._read_seconds(point)
        landed = device = 0.0
        ends = []
        for adapter in range(point.adapters):
            in_host = [read_seconds * (adapter * layers + layer + 1) for layer in range(layers)]
            landings = []
            for ready in in_host:
                landed = max(landed, ready) + copy_seconds
                landings.append(landed)
            for layer in range(layers):
                on_device = max(device, landings[-1 if mode is Mode.LOAD_FIRST else layer]) + compute_seconds
                on_cpu = max(device, in_host[layer]) + compute_seconds + cpu_seconds
                match mode:
                    case Mode.CPU:
                        device = on_cpu
                    case Mode.PLANNER:
                        device = min(on_device, on_cpu)
                    case _:
                        device = on_device
            ends.append(device)
        return statistics.fmean(ends)

    def _warm(self, point: Point) -> float:
        """Requests share steps, as many as the budget allows."""
        together = max(1, self.budget_tokens // point.prompt)
        now, ends = 0.0, []
        for start in range(0, point.adapters, together):
            count = min(together, point.adapters - start)
            now += self.profile.prefill_seconds(self._load(point, count))
            ends += [now] * count
        return statistics.fmean(ends)

    def _load(self, point: Point, requests: int) -> StepLoad:
        tokens = point.prompt * requests
        return StepLoad(
            tokens=tokens,
            context_tokens=requests * point.prompt * (point.prompt + 1) // 2,
            adapters=requests,
            adapter_bytes=requests * self._layer_bytes(point) * self.profile.layers,
            max_rank=point.rank,
            rank_tokens=point.rank * tokens,
        )

    def _layer_bytes(self, point: Point) -> int:
        return AdapterWidths.of(self.shapes, point.targets).rank_elems * point.rank * self.item_bytes

    def _copy_seconds(self, point: Point) -> float:
        """Of one layer."""
        seconds = self.profile.copy_seconds(self._layer_bytes(point) * self.profile.layers) / self.profile.layers
        link = point.link_bytes_per_second
        return seconds if link is None else max(seconds, self._layer_bytes(point) / link)

    def _read_seconds(self, point: Point) -> float:
        """Of one layer."""
        return self._layer_bytes(point) / self.read_bytes_per_second if point.tier is Tier.DISK else 0.0

    def _cpu_seconds(self, point: Point) -> float:
        """What CPU deltas add to a layer; ranks count as those of q, k, v and o, in which profiles are measured."""
        widths = AdapterWidths.of(self.shapes, point.targets)
        rank = round(point.rank * widths.rank_elems / widths.qkvo_rank_elems)
        seconds = self.profile.cpu_delta_seconds(point.prompt, rank, self.cores)
        link = point.link_bytes_per_second
        row_bytes = point.prompt * widths.row_elems * self.item_bytes
        return seconds if link is None else max(seconds, row_bytes / link)


def relative_errors(views: Sequence[PointView], predict: Callable[[Point, Mode], float]) -> dict[str, float]:
    """By mode, the median over the measured points without decodes of how far off a prediction (in seconds) is."""
    errors: dict[str, list[float]] = {}
    for view in views:
        for mode in Mode:
            measured_ms = view.median(TTFT, mode)
            if measured_ms is not None and view.point.decodes == 0:
                errors.setdefault(mode.value, []).append(abs(1e3 * predict(view.point, mode) / measured_ms - 1))
    return {mode: statistics.median(found) for mode, found in errors.items()}

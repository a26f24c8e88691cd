"""LoRA on CUDA: what the kernels must know of each adapter, on the device, and the work of each batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from segue.engine.cuda.adapter_tables import AdapterTables
from segue.engine.cuda.batch_inputs import host_buffer
from segue.engine.lora.device_lora import LoraSegment
from segue.engine.lora.manifest import Projection
from segue.engine.lora.points import POINT_PROJECTIONS, LoraPoint
from segue.engine.lora.store import AdapterStore
from segue.engine.memory.pool import PagePool
from segue.gpu_kernels.lora import add_lora
from segue.gpu_kernels.lora_plan import HEADER_WORDS
from segue.gpu_kernels.lora_tiles import Architecture, LoraTiles, PointShape, Regime, choose_tiles
from segue.gpu_kernels.lora_work import plan_capacity, plan_point


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSizes:
    """What bounds the tables and the work: adapters on the device at once, pages and rank of each, rows of a batch."""

    adapters: int
    adapter_pages: int
    max_rank: int
    max_rows: int


# Up to so many rows, or ranks of an adapter on average, latency counts more than bytes.
_FEW_ROWS = 16
_FEW_RANKS = 48
# From so many rows for each segment on, and in all, tensor cores have something to do.
_PREFILL_SEGMENT_ROWS = 4
_PREFILL_ROWS = 129


def architecture_of(device: torch.device) -> Architecture:
    """Whose tiles a device takes; where the kernels are interpreted, those that were measured."""
    if device.type != "cuda":
        return Architecture.SM_90
    return Architecture.of(torch.cuda.get_device_capability(device))


def regime_of(rows: int, ranks: Sequence[int]) -> Regime:
    """The tiles for a batch of ``rows`` rows with a segment for an adapter of each of ``ranks``.

    Measured on an H200: docs/notes-kernels.md.
    """
    if rows >= max(_PREFILL_ROWS, _PREFILL_SEGMENT_ROWS * len(ranks)):
        return Regime.PREFILL
    is_small = rows <= _FEW_ROWS or sum(ranks) < _FEW_RANKS * len(ranks)
    return Regime.FEW if is_small else Regime.DECODE


class LocatedSegments(NamedTuple):
    """``rows`` is int32 [segments, (row_start, row_stop, row of the tables)]."""

    rows: NDArray[np.int32]
    version_ids: list[int]


class KernelLora:
    """See DeviceLora. Batches of many rows and of few have tiles of their own."""

    def __init__(
        self,
        store: AdapterStore,
        pool: PagePool,
        sizes: LoraSizes,
        shapes: Mapping[Projection, tuple[int, int]],
        chunk_elems: int,
        multiprocessors: int,
    ) -> None:
        """``shapes`` has each projection's (in, out) features; ``multiprocessors`` are the device's."""
        device = pool.data.device
        self._pool = pool
        self._sizes = sizes
        self.tables = AdapterTables(
            store,
            rows=sizes.adapters,
            adapter_pages=sizes.adapter_pages,
            layers=pool.layers,
            chunk_elems=chunk_elems,
            device=device,
        )
        self.points = {
            point: PointShape(
                in_features=shapes[projections[0]][0],
                out_features=tuple(shapes[projection][1] for projection in projections),
            )
            for point, projections in POINT_PROJECTIONS.items()
        }
        self.tiles = {
            regime: choose_tiles(
                regime,
                chunk_elems=chunk_elems,
                page_elems=pool.page_elems,
                element_bytes=pool.dtype.itemsize,
                multiprocessors=multiprocessors,
                architecture=architecture_of(device),
            )
            for regime in Regime
        }
        self._workspace_elems = max(
            self.capacity(point, regime, sizes.max_rows)[1] for point in LoraPoint for regime in Regime
        )
        # A batch has at most as many segments as rows.
        self._ones = np.ones(sizes.max_rows, dtype=np.float32)

    def capacity(self, point: LoraPoint, regime: Regime, max_rows: int) -> tuple[int, int]:
        """int32 words of the largest plan for ``max_rows`` rows, and float32 elements of its partials."""
        return plan_capacity(
            self.points[point],
            self.tiles[regime],
            max_segments=max_rows,
            max_rows=max_rows,
            max_rank=self._sizes.max_rank,
        )

    def begin(self, segments: Sequence[LoraSegment]) -> KernelLoraStep:
        # Rows that batches read as well are written here, while the pass may go on on another stream.
        for item in segments:
            self.tables.row(item.version_id)
        return KernelLoraStep(self, tuple(segments))

    def locate(self, segments: Sequence[LoraSegment]) -> LocatedSegments:
        """Where the tables have what the kernels must know of these segments. It holds until a version gives its pages
        back."""
        version_ids = [item.version_id for item in segments]
        words: list[int] = []
        for item in segments:
            words += (item.row_start, item.row_stop, self.tables.row(item.version_id))
        return LocatedSegments(np.array(words, dtype=np.int32).reshape(-1, 3), version_ids)

    def regime(self, segments: LocatedSegments) -> Regime:
        """The tiles for these segments."""
        starts, stops, slots = segments.rows.T
        ranks: list[int] = self.tables.largest_ranks[slots].tolist()
        return regime_of(int((stops - starts).sum()), ranks)

    def workspace(self) -> Tensor:
        """Partials of launches that follow one another on one stream: float32, enough for the largest batch."""
        return torch.empty(self._workspace_elems, dtype=torch.float32, device=self.tables.page_tables.device)

    def plan(self, point: LoraPoint, segments: LocatedSegments, regime: Regime, words: NDArray[np.int32]) -> int:
        """Write the point's work into ``words`` int32 [capacity], and return how many of them are used.

        These are ``HEADER_WORDS`` where no adapter has modules there.
        """
        return plan_point(
            segments.rows,
            self._ones[: len(segments.rows)],
            self.tables.ranks[point],
            shape=self.points[point],
            tiles=self.tiles[regime],
            plan=words,
            workspace_elems=self._workspace_elems,
        )

    def launch(
        self,
        layer: int,
        point: LoraPoint,
        x: Tensor,
        out: Tensor,
        plan: Tensor,
        workspace: Tensor,
        tiles: LoraTiles,
    ) -> None:
        """Run a plan that is on the device."""
        add_lora(
            x,
            out,
            pool_layer=self._pool.layer(layer),
            page_tables=self.tables.page_tables,
            modules=self.tables.modules[point][layer],
            scales=self.tables.scales[point][layer],
            plan=plan,
            workspace=workspace,
            shape=self.points[point],
            tiles=tiles,
        )


class KernelLoraStep:
    """See DeviceLoraStep. Plans are made when a point first needs them, and serve all layers."""

    def __init__(self, lora: KernelLora, segments: tuple[LoraSegment, ...]) -> None:
        self._lora = lora
        self._segments = segments
        self._regime: Regime | None = None
        self._plans: dict[tuple[LoraPoint, frozenset[int]], Tensor | None] = {}
        self._workspace: Tensor | None = None

    def add(self, layer: int, point: LoraPoint, x: Tensor, out: Tensor, version_ids: AbstractSet[int]) -> None:
        key = point, frozenset(version_ids)
        if self._regime is None:
            self._regime = self._lora.regime(self._lora.locate(self._segments))
        if key not in self._plans:
            segments = [item for item in self._segments if item.version_id in version_ids]
            self._plans[key] = self._plan(point, segments, self._regime, x.device)
        plan_on_device = self._plans[key]
        if plan_on_device is None:
            return
        if self._workspace is None:
            self._workspace = self._lora.workspace()
        self._lora.launch(layer, point, x, out, plan_on_device, self._workspace, self._lora.tiles[self._regime])

    def _plan(
        self, point: LoraPoint, segments: Sequence[LoraSegment], regime: Regime, device: torch.device
    ) -> Tensor | None:
        """The point's work on the device; None where no adapter has modules there."""
        max_rows = max((item.row_stop for item in segments), default=0)
        plan = np.empty(self._lora.capacity(point, regime, max_rows)[0], dtype=np.int32)
        used = self._lora.plan(point, self._lora.locate(segments), regime, plan)
        return torch.from_numpy(plan[:used]).to(device) if used > HEADER_WORDS else None


class GraphLora:
    """The LoraHook that a decode graph captures: launches at ``points`` on plans that are replaced between runs."""

    def __init__(self, lora: KernelLora, plans: GraphPlans, points: AbstractSet[LoraPoint], regime: Regime) -> None:
        self._lora = lora
        self._tiles = lora.tiles[regime]
        self._plans = plans
        self._points = points

    def enter_layer(self, _layer: int) -> Iterator[None]:
        return iter(())

    def begin(self, _layer: int, _point: LoraPoint, _x: Tensor) -> None:
        return None

    def finish(self, layer: int, point: LoraPoint, x: Tensor, out: Tensor) -> Iterator[None]:
        if point in self._points:
            plans = self._plans
            self._lora.launch(layer, point, x, out, plans.on_device[point], plans.workspace, self._tiles)
        return iter(())

    def leave_layer(self, _layer: int) -> None:
        return None


class HostWords(NamedTuple):
    """Memory that the device copies from, int32 [words], in two views."""

    tensor: Tensor
    words: NDArray[np.int32]

    @classmethod
    def of(cls, tensor: Tensor) -> HostWords:
        return cls(tensor, tensor.numpy())


class GraphPlans:
    """The plans that all graphs read: one buffer on the device for each point, filled before a run.

    One graph runs after the other, so that all of them have one ``workspace``.
    """

    def __init__(self, lora: KernelLora, max_rows: int) -> None:
        self._lora = lora
        self._last: tuple[Regime, list[int], bytes] | None = None
        self._used: frozenset[LoraPoint] = frozenset()
        words = {point: max(lora.capacity(point, regime, max_rows)[0] for regime in Regime) for point in LoraPoint}
        device = lora.tables.page_tables.device
        self.workspace = lora.workspace()
        self.on_device = {point: torch.zeros(count, dtype=torch.int32, device=device) for point, count in words.items()}
        self._pinned, self._spare = (
            {point: HostWords.of(host_buffer(count, device)) for point, count in words.items()} for _ in range(2)
        )

    def fill(self, segments: LocatedSegments, regime: Regime) -> frozenset[LoraPoint]:
        """Have the plans be those of ``segments``, for a regime's tiles; the points at which there is something to do.

        All runs but the last must have ended. The last may still read its pinned buffer, which is not used again.
        """
        # A row of the tables may meanwhile be another version's.
        composition = regime, segments.version_ids, segments.rows.tobytes()
        if composition != self._last:
            self._last = None
            self._pinned, self._spare = self._spare, self._pinned
            for point, pinned in self._pinned.items():
                count = self._lora.plan(point, segments, regime, pinned.words)
                had_work, has_work = point in self._used, count > HEADER_WORDS
                # A graph may have launches for a point without work, and must not find what another batch has left.
                if had_work or has_work:
                    self.on_device[point][:count].copy_(pinned.tensor[:count], non_blocking=True)
                    self._used = self._used | {point} if has_work else self._used - {point}
            self._last = composition
        return self._used

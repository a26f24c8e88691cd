"""Adding LoRA deltas from the device's pages, as a pass sees it; and how the CPU device does it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from segue.engine.lora.manifest import Projection
from segue.engine.lora.points import POINT_PROJECTIONS, LoraPoint
from segue.engine.lora.store import AdapterStore
from segue.gpu_kernels.paged_lora import lora_expand_add, lora_shrink


@dataclass(frozen=True, slots=True)
class LoraSegment:
    """Rows ``row_start`` to ``row_stop`` of a pass belong to requests of one adapter version."""

    row_start: int
    row_stop: int
    version_id: int


class DeviceLoraStep(Protocol):
    """The deltas of one pass."""

    def add(self, layer: int, point: LoraPoint, x: Tensor, out: Tensor, version_ids: AbstractSet[int]) -> None:
        """Add the deltas of these versions' rows into ``out`` [rows, merged out] in place, from ``x`` [rows, in].

        The layer has landed for each of them.
        """
        ...


class DeviceLora(Protocol):
    """What computes deltas on the device."""

    def begin(self, segments: Sequence[LoraSegment]) -> DeviceLoraStep:
        """Plan a pass. The versions have been given their pages, which stay theirs until the pass has ended."""
        ...


class TorchDeviceLora:
    """In torch, segment by segment, on any device. ``pool[i]`` is layer i's pages [pages, page_elems]."""

    def __init__(
        self,
        store: AdapterStore,
        pool: Sequence[Tensor],
        shapes: Mapping[Projection, tuple[int, int]],
        chunk_elems: int,
    ) -> None:
        """``shapes`` has each projection's (in, out) features."""
        self._store = store
        self._pool = tuple(pool)
        self._shapes = dict(shapes)
        self._chunk_elems = chunk_elems

    def begin(self, segments: Sequence[LoraSegment]) -> TorchDeviceLoraStep:
        return TorchDeviceLoraStep(self, tuple(segments))

    def add_segment(self, segment: LoraSegment, layer: int, point: LoraPoint, x: Tensor, out: Tensor) -> None:
        """Add one segment's deltas."""
        view = self._store.device_view(segment.version_id, layer)
        modules = {module.projection: module for module in view.modules}
        rows = slice(segment.row_start, segment.row_stop)
        pages, table, chunk_elems = self._pool[layer], view.page_table, self._chunk_elems
        column = 0
        for projection in POINT_PROJECTIONS[point]:
            width = self._shapes[projection][1]
            module = modules.get(projection)
            if module is not None:
                shrunk = lora_shrink(x[rows], pages, table, module.a_start, module.rank, chunk_elems)
                target = out[rows, column : column + width]
                lora_expand_add(shrunk, pages, table, module.b_start, target, module.scale, chunk_elems)
            column += width


class TorchDeviceLoraStep:
    """See DeviceLoraStep."""

    def __init__(self, lora: TorchDeviceLora, segments: tuple[LoraSegment, ...]) -> None:
        self._lora = lora
        self._segments = segments

    def add(self, layer: int, point: LoraPoint, x: Tensor, out: Tensor, version_ids: AbstractSet[int]) -> None:
        for segment in self._segments:
            if segment.version_id in version_ids:
                self._lora.add_segment(segment, layer, point, x, out)

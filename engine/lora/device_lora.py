"""Adding LoRA deltas from the device's pages, as a pass sees it; and how the CPU device does it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from segue.engine.lora.manifest import Projection
from segue.engine.lora.points import POINT_PROJECTIONS, LoraPoint
from segue.engine.lora.store import AdapterStore
from segue.engine.memory.adapter_layout import AdapterLayout
from segue.gpu_kernels.paged_lora import PagedModule, add_paged_lora

# Elements of a layer's weights in a group of more than one segment. Their float32 copies should fit into the caches.
_GROUP_ELEMS = 1 << 20


@dataclass(frozen=True, slots=True)
class LoraSegment:
    """Rows ``row_start`` to ``row_stop`` of a pass belong to requests of one adapter version."""

    row_start: int
    row_stop: int
    version_id: int


@dataclass(frozen=True, slots=True)
class SegmentGroup:
    """Segments of equally many rows whose adapters have one layout, which are computed as one.

    ``page_tables`` is int64 [segments, pages]. ``rows`` are all rows, segment after segment.
    """

    layout: AdapterLayout
    page_tables: Tensor
    rows: slice | Tensor


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
    """In torch, on any device. ``pool[i]`` is layer i's pages [pages, page_elems]."""

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

    def groups(self, segments: Sequence[LoraSegment]) -> list[SegmentGroup]:
        """The segments in groups that are computed together."""
        gathered: list[tuple[int, AdapterLayout, list[LoraSegment]]] = []
        for segment in segments:
            rows, layout = segment.row_stop - segment.row_start, self._store.device_layout(segment.version_id)
            for known_rows, known_layout, members in gathered:
                elements = layout.pages * layout.page_elems * (len(members) + 1)
                if rows == known_rows and elements <= _GROUP_ELEMS and layout == known_layout:
                    members.append(segment)
                    break
            else:
                gathered.append((rows, layout, [segment]))
        return [self._group(layout, members) for _, layout, members in gathered]

    def add_group(self, group: SegmentGroup, layer: int, point: LoraPoint, x: Tensor, out: Tensor) -> None:
        """Add the deltas of one group's rows."""
        targeted = {module.projection: module for module in group.layout.layers[layer]}
        modules: list[PagedModule] = []
        column = 0
        for projection in POINT_PROJECTIONS[point]:
            width = self._shapes[projection][1]
            module = targeted.get(projection)
            if module is not None:
                modules.append(
                    PagedModule(
                        rank=module.rank,
                        a_start=module.a_start,
                        b_start=module.b_start,
                        column=column,
                        width=width,
                        scale=module.scale,
                    )
                )
            column += width
        if modules:
            add_paged_lora(
                x,
                out,
                rows=group.rows,
                pool_layer=self._pool[layer],
                page_tables=group.page_tables,
                modules=modules,
                chunk_elems=self._chunk_elems,
            )

    def _group(self, layout: AdapterLayout, segments: Sequence[LoraSegment]) -> SegmentGroup:
        page_tables = torch.stack([self._store.page_table(segment.version_id) for segment in segments])
        if all(before.row_stop == after.row_start for before, after in pairwise(segments)):
            return SegmentGroup(layout, page_tables, slice(segments[0].row_start, segments[-1].row_stop))
        rows = [torch.arange(item.row_start, item.row_stop, device=page_tables.device) for item in segments]
        return SegmentGroup(layout, page_tables, torch.cat(rows))


class TorchDeviceLoraStep:
    """See DeviceLoraStep. Groups are made when they are first needed, and serve all layers and points."""

    def __init__(self, lora: TorchDeviceLora, segments: tuple[LoraSegment, ...]) -> None:
        self._lora = lora
        self._segments = segments
        self._groups: dict[frozenset[int], list[SegmentGroup]] = {}

    def add(self, layer: int, point: LoraPoint, x: Tensor, out: Tensor, version_ids: AbstractSet[int]) -> None:
        key = frozenset(version_ids)
        if key not in self._groups:
            self._groups[key] = self._lora.groups([item for item in self._segments if item.version_id in key])
        for group in self._groups[key]:
            self._lora.add_group(group, layer, point, x, out)

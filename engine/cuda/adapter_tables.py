"""What the LoRA kernels must know of each adapter on the device: a row of integers, brought there by one copy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from segue.engine.lora.points import POINT_PROJECTIONS, LoraPoint
from segue.engine.memory.adapter_layout import AdapterLayout

# Kernels are compiled for pointers that are multiples of 16 bytes, and again for others.
_ALIGN_WORDS = 4


class PagedAdapters(Protocol):
    """The adapters that have pages."""

    def page_ids(self, version_id: int) -> tuple[int, ...]:
        """Its pages; another object each time that it is given some."""
        ...

    def device_layout(self, version_id: int) -> AdapterLayout:
        """How its weights lie in them."""
        ...

    def has_pages(self, version_id: int) -> bool:
        """Whether it has any."""
        ...


@dataclass(frozen=True, slots=True)
class RowLayout:
    """Where an adapter's words lie in its row: its pages, then of each layer and point the modules' (rank, first chunk
    of A, first chunk of B), and their scales as float32. ``modules[point][layer]`` and ``scales[point][layer]`` are
    where these begin."""

    words: int
    modules: Mapping[LoraPoint, tuple[int, ...]]
    scales: Mapping[LoraPoint, tuple[int, ...]]

    @classmethod
    def plan(cls, adapter_pages: int, layers: int) -> RowLayout:
        """For adapters of up to so many pages."""
        end = _aligned(adapter_pages)
        modules: dict[LoraPoint, list[int]] = {point: [] for point in POINT_PROJECTIONS}
        scales: dict[LoraPoint, list[int]] = {point: [] for point in POINT_PROJECTIONS}
        for _ in range(layers):
            for point, projections in POINT_PROJECTIONS.items():
                modules[point].append(end)
                end += _aligned(3 * len(projections))
                scales[point].append(end)
                end += _aligned(len(projections))
        return cls(
            words=end,
            modules={point: tuple(starts) for point, starts in modules.items()},
            scales={point: tuple(starts) for point, starts in scales.items()},
        )


@dataclass(slots=True)
class _Known:
    """A version with a row. ``words`` [words] is what the row holds but for the pages, or with those of ``pages``."""

    row: int
    words: NDArray[np.int32]
    pages: tuple[int, ...] | None = None


class AdapterTables:
    """Each adapter on the device has a row in a table of fixed size, which the kernels read.

    ``page_tables`` is int32 [adapters, adapter_pages]. For each LoRA point and layer, ``modules`` is int32 [adapters,
    modules, (rank, first chunk of A, first chunk of B)] and ``scales`` float32 [adapters, modules]; ``ranks`` int32
    [adapters, modules], in host memory, has the largest over the layers. A row is written when a batch first names the
    adapter with its present pages, in the order of the engine's stream, so that nothing under way sees it change.
    ``largest_ranks`` int32 [adapters] has the largest of a row's ``ranks``.
    """

    def __init__(
        self,
        adapters: PagedAdapters,
        *,
        rows: int,
        adapter_pages: int,
        layers: int,
        chunk_elems: int,
        device: torch.device,
    ) -> None:
        """Room for ``rows`` adapters of up to ``adapter_pages`` pages."""
        self._adapters = adapters
        self._chunk_elems = chunk_elems
        self._layout = RowLayout.plan(adapter_pages, layers)
        self._known: dict[int, _Known] = {}
        self._free = list(range(rows - 1, -1, -1))
        self._table = torch.zeros(rows, self._layout.words, dtype=torch.int32, device=device)
        floats = self._table.view(torch.float32)
        self.page_tables = self._table[:, :adapter_pages]
        self.modules: dict[LoraPoint, Sequence[Tensor]] = {}
        self.scales: dict[LoraPoint, Sequence[Tensor]] = {}
        self.ranks: dict[LoraPoint, NDArray[np.int32]] = {}
        self.largest_ranks = np.zeros(rows, dtype=np.int32)
        for point, projections in POINT_PROJECTIONS.items():
            count = len(projections)
            self.modules[point] = [
                self._table[:, start : start + 3 * count].view(-1, count, 3) for start in self._layout.modules[point]
            ]
            self.scales[point] = [floats[:, start : start + count] for start in self._layout.scales[point]]
            self.ranks[point] = np.zeros((rows, count), dtype=np.int32)

    def row(self, version_id: int) -> int:
        """The row of a version that has its pages. Raises RuntimeError when more are in use than there are rows."""
        pages = self._adapters.page_ids(version_id)
        known = self._known.get(version_id)
        if known is None:
            known = self._known[version_id] = self._take(version_id)
        if known.pages is not pages:
            known.words[: len(pages)] = pages
            words = torch.from_numpy(known.words)
            if self._table.is_cuda:
                # A copy of it: torch keeps that until it has arrived.
                words = words.pin_memory()
            self._table[known.row].copy_(words, non_blocking=True)
            known.pages = pages
        return known.row

    def _take(self, version_id: int) -> _Known:
        if not self._free:
            for other in [item for item in self._known if not self._adapters.has_pages(item)]:
                self._free.append(self._known.pop(other).row)
        if not self._free:
            raise RuntimeError(f"{len(self._known)} adapters are on the device, the tables have no more rows")
        row = self._free.pop()
        return _Known(row, self._words(row, self._adapters.device_layout(version_id)))

    def _words(self, row: int, layout: AdapterLayout) -> NDArray[np.int32]:
        """What does not depend on the pages; notes the ranks."""
        words = [0] * self._layout.words
        scales: dict[int, float] = {}
        ranks = {point: [0] * len(projections) for point, projections in POINT_PROJECTIONS.items()}
        # An enum's hash is a call: one for each module is enough.
        places = {
            projection: (place, self._layout.modules[point], self._layout.scales[point], ranks[point])
            for point, projections in POINT_PROJECTIONS.items()
            for place, projection in enumerate(projections)
        }
        for layer, modules in enumerate(layout.layers):
            for module in modules:
                place, module_starts, scale_starts, point_ranks = places[module.projection]
                start = module_starts[layer] + 3 * place
                chunks = module.a_start // self._chunk_elems, module.b_start // self._chunk_elems
                words[start : start + 3] = (module.rank, *chunks)
                scales[scale_starts[layer] + place] = module.scale
                point_ranks[place] = max(point_ranks[place], module.rank)
        for point, own in ranks.items():
            self.ranks[point][row] = own
        self.largest_ranks[row] = max(max(own) for own in ranks.values())
        made = np.array(words, dtype=np.int32)
        made.view(np.float32)[list(scales)] = list(scales.values())
        return made


def _aligned(words: int) -> int:
    return -(-words // _ALIGN_WORDS) * _ALIGN_WORDS

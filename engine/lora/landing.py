"""Bringing a layer from the host store into its pages: a copy into staging memory, and a launch that lands it.

Both are enqueued, each behind what it depends on, and nothing here waits for the device. So the copy of a layer runs
beside the landing of the one before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from segue.engine.device import DeviceStreams
from segue.engine.lora.host_plan import HostPlan, PlannedLayer
from segue.engine.memory.adapter_layout import AdapterLayout
from segue.gpu_kernels.landing import LANDING_WORDS

# Kernels are compiled for pointers that are multiples of 16 bytes, and again for others.
_ALIGNED_WORDS = 2


class LandLayer(Protocol):
    """Writes a staged layer into its pages: see gpu_kernels.landing.land_matrices."""

    def __call__(
        self, staging: Tensor, table: Tensor, pool_layer: Tensor, page_table: Tensor, chunk_elems: int
    ) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LandingTables:
    """What an adapter's layers are landed by, whatever its pages: ``words`` is int64, layer after layer, in host
    memory, ``starts`` where each layer's table begins in it, and ``modules`` how many rows that has."""

    words: Tensor
    starts: tuple[int, ...]
    modules: tuple[int, ...]

    @classmethod
    def of(cls, plan: HostPlan, layout: AdapterLayout) -> LandingTables:
        """The tables of an adapter that lies so in host memory and so in its pages."""
        words: list[int] = []
        starts = []
        for planned, layouts in zip(plan.layers, layout.layers, strict=True):
            words += [0] * (-len(words) % _ALIGNED_WORDS)
            starts.append(len(words))
            source = 0
            for module, place in zip(planned.modules, layouts, strict=True):
                words += [
                    source,
                    source + module.a.span.elements,
                    place.rank,
                    place.in_features,
                    place.out_features,
                    place.a_start // layout.chunk_elems,
                    place.b_start // layout.chunk_elems,
                ]
                source += module.a.span.elements + module.b.span.elements
        return cls(
            words=torch.tensor(words, dtype=torch.int64),
            starts=tuple(starts),
            modules=tuple(len(planned.modules) for planned in plan.layers),
        )


@dataclass(slots=True, kw_only=True, eq=False)
class LandingPlace:
    """Where the layers of one load land. All is on the device.

    ``page_table`` is int64 [pages], ``tables`` int64 [modules, LANDING_WORDS] for each layer. ``behind`` marks the work
    on the device that may still use the pages as what they were before, and is given up when a copy waits for it: all
    later ones are behind that copy.
    """

    page_table: Tensor
    tables: tuple[Tensor, ...]
    behind: torch.cuda.Event | None

    @classmethod
    def on_device(cls, tables: LandingTables, pages: Sequence[int], streams: DeviceStreams) -> LandingPlace:
        """Bring both over with one copy, behind what the calling thread has enqueued."""
        page_words = [*pages, *[0] * (-len(pages) % _ALIGNED_WORDS)]
        words = streams.upload(torch.cat([torch.tensor(page_words, dtype=torch.int64), tables.words]))
        tables_start = len(page_words)
        return cls(
            page_table=words[: len(pages)],
            tables=tuple(
                words[tables_start + start :][: modules * LANDING_WORDS].view(modules, LANDING_WORDS)
                for start, modules in zip(tables.starts, tables.modules, strict=True)
            ),
            behind=streams.fence(),
        )


@dataclass(slots=True, eq=False)
class _Slot:
    """Staging memory for one layer, and a mark behind the last landing that read it."""

    memory: Tensor
    landed: torch.cuda.Event | None = None


class LayerLander:
    """Enqueues copies and landings; used from one thread.

    ``host`` is the host store as uint8 [bytes], of which each ``extent_bytes`` were registered by themselves.
    ``pool_layer(i)`` is layer i's pages [pages, page_elems]. ``staging_bytes`` is the largest layer that is expected.
    """

    def __init__(
        self,
        *,
        host: Tensor,
        extent_bytes: int,
        pool_layer: Callable[[int], Tensor],
        chunk_elems: int,
        land: LandLayer,
        streams: DeviceStreams,
        staging_bytes: int,
    ) -> None:
        self._host = host
        self._extent_bytes = extent_bytes
        self._pool_layer = pool_layer
        self._chunk_elems = chunk_elems
        self._land = land
        self._streams = streams
        self._slots = [_Slot(streams.staging(staging_bytes)) for _ in range(streams.staging_slots)]
        self._next_slot = 0

    @property
    def is_ahead(self) -> bool:
        """Whether the device copies beside the host."""
        return len(self._slots) > 1

    def start(
        self, layers: Sequence[PlannedLayer], first_layer: int, copy_offset: int, place: LandingPlace
    ) -> torch.cuda.Event | None:
        """Have layers of the host copy at ``copy_offset``, which follow one another, copied together and landed.

        A fresh event, recorded behind the landing; None where that has been done.
        """
        begin = layers[0].host_start
        size_bytes = layers[-1].host_start + layers[-1].host_bytes - begin
        slot = self._take_slot(size_bytes)
        staged = slot.memory[:size_bytes]
        start = copy_offset + begin
        after = [event for event in (place.behind, slot.landed) if event is not None]
        copied = self._streams.enqueue_copy(lambda: self._copy(start, staged), after)
        place.behind = None
        try:
            slot.landed = self._streams.enqueue_landing(
                lambda: self._land_staged(staged, layers, first_layer, place), [] if copied is None else [copied]
            )
        except BaseException:
            if copied is not None:
                # Whoever learns that this failed gives the host's bytes back.
                copied.synchronize()
            raise
        return slot.landed

    def _take_slot(self, size_bytes: int) -> _Slot:
        slot = self._slots[self._next_slot]
        self._next_slot = (self._next_slot + 1) % len(self._slots)
        if slot.memory.numel() < size_bytes:
            if slot.landed is not None:
                slot.landed.synchronize()
            slot.memory = self._streams.staging(size_bytes)
        return slot

    def _land_staged(
        self, staged: Tensor, layers: Sequence[PlannedLayer], first_layer: int, place: LandingPlace
    ) -> None:
        for layer, planned in enumerate(layers, start=first_layer):
            pages = self._pool_layer(layer)
            start = planned.host_start - layers[0].host_start
            own = staged[start : start + planned.host_bytes].view(pages.dtype)
            self._land(own, place.tables[layer], pages, place.page_table, self._chunk_elems)

    def _copy(self, start: int, staged: Tensor) -> None:
        """One copy, or one for each extent: CUDA refuses host memory that was not registered as a whole."""
        for begin, stop in pieces(start, start + len(staged), self._extent_bytes):
            staged[begin - start : stop - start].copy_(self._host[begin:stop], non_blocking=True)


def pieces(start: int, stop: int, extent_bytes: int) -> Iterator[tuple[int, int]]:
    """The range cut wherever an extent ends."""
    while start < stop:
        end = min(stop, (start // extent_bytes + 1) * extent_bytes)
        yield start, end
        start = end

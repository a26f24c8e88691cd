"""Bringing layers from the host store into their pages: a copy into staging memory, and a launch that lands them.

Both are enqueued, each behind what it depends on, and nothing here waits for the device unless staging memory has to
grow. So a copy runs beside the landing of the one before.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from segue.engine.device import DeviceStreams, StreamSpan
from segue.engine.lora.host_plan import HostPlan, PlannedLayer
from segue.engine.memory.adapter_layout import AdapterLayout
from segue.gpu_kernels.landing import LANDING_WORDS

# Kernels are compiled for pointers that are multiples of 16 bytes, and again for others.
_ALIGNED_WORDS = 2


class LandLayers(Protocol):
    """Writes staged layers into their pages: see gpu_kernels.landing.land_matrices."""

    def __call__(
        self, staging: Tensor, first_elem: int, table: Tensor, pool: Tensor, page_table: Tensor, chunk_elems: int
    ) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LandingTables:
    """What an adapter's layers are landed by, whatever its pages: ``rows`` is int64 [modules, LANDING_WORDS], layer
    after layer; layer i has the rows ``starts[i]`` to ``starts[i + 1]``."""

    rows: NDArray[np.int64]
    starts: tuple[int, ...]

    @classmethod
    def of(cls, plan: HostPlan, layout: AdapterLayout) -> LandingTables:
        """The tables of an adapter that lies so in host memory and so in its pages."""
        rows: list[tuple[int, ...]] = []
        starts = [0]
        source = 0
        for layer, (planned, layouts) in enumerate(zip(plan.layers, layout.layers, strict=True)):
            for module, place in zip(planned.modules, layouts, strict=True):
                rows.append(
                    (
                        source,
                        source + module.a.span.elements,
                        place.rank,
                        place.in_features,
                        place.out_features,
                        place.a_start // layout.chunk_elems,
                        place.b_start // layout.chunk_elems,
                        layer,
                    )
                )
                source += module.a.span.elements + module.b.span.elements
            starts.append(len(rows))
        return cls(rows=np.array(rows, dtype=np.int64).reshape(-1, LANDING_WORDS), starts=tuple(starts))


@dataclass(slots=True, kw_only=True, eq=False)
class LandingPlace:
    """Where the layers of one load land. All is on the device.

    ``page_table`` is int64 [pages], ``rows`` and ``starts`` are those of LandingTables. ``behind`` marks the work on
    the device that may still use the pages as what they were before, and is given up when a copy waits for it: all
    later ones are behind that copy.
    """

    page_table: Tensor
    rows: Tensor
    starts: tuple[int, ...]
    behind: torch.cuda.Event | None

    @classmethod
    def on_device(cls, tables: LandingTables, pages: Sequence[int], streams: DeviceStreams) -> LandingPlace:
        """Bring both over with one copy, behind what the calling thread has enqueued."""
        first_row = len(pages) + -len(pages) % _ALIGNED_WORDS
        host_words = np.zeros(first_row + tables.rows.size, dtype=np.int64)
        host_words[: len(pages)] = pages
        host_words[first_row:] = tables.rows.reshape(-1)
        words = streams.upload(torch.from_numpy(host_words))
        return cls(
            page_table=words[: len(pages)],
            rows=words[first_row:].view(-1, LANDING_WORDS),
            starts=tables.starts,
            behind=streams.fence(),
        )

    def table(self, first_layer: int, layers: int) -> Tensor:
        """The rows of ``layers`` layers from ``first_layer`` on."""
        return self.rows[self.starts[first_layer] : self.starts[first_layer + layers]]


@dataclass(slots=True, eq=False)
class _Slot:
    """Staging memory for one copy, and a mark behind the last landing that read it."""

    memory: Tensor
    landed: torch.cuda.Event | None = None


class LayerLander:
    """Enqueues copies and landings, for one thread at a time.

    ``host`` is the host store as uint8 [bytes], of which each ``extent_bytes`` were registered by themselves.
    ``pool`` is [layers, pages, page_elems]. ``staging_bytes`` is the most that one copy is expected to bring.
    """

    def __init__(
        self,
        *,
        host: Tensor,
        extent_bytes: int,
        pool: Tensor,
        chunk_elems: int,
        land: LandLayers,
        streams: DeviceStreams,
        staging_bytes: int,
    ) -> None:
        self._host = host
        self._extent_bytes = extent_bytes
        self._pool = pool
        self._chunk_elems = chunk_elems
        self._land = land
        self._streams = streams
        self._slots = [_Slot(streams.staging(staging_bytes)) for _ in range(streams.staging_slots)]
        self._next_slot = 0
        self._turn = threading.Lock()

    def start(
        self, layers: Sequence[PlannedLayer], first_layer: int, copy_offset: int, place: LandingPlace
    ) -> StreamSpan | None:
        """Have layers of the host copy at ``copy_offset``, which follow one another, copied together and landed.

        From the copy's beginning to the landing's end; None where it has been done.
        """
        with self._turn:
            return self._start(layers, first_layer, copy_offset, place)

    def _start(
        self, layers: Sequence[PlannedLayer], first_layer: int, copy_offset: int, place: LandingPlace
    ) -> StreamSpan | None:
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
                lambda: self._land_staged(staged, layers, first_layer, place), [] if copied is None else [copied.ended]
            )
        except BaseException:
            if copied is not None:
                # Whoever learns that this failed gives the host's bytes back.
                copied.ended.synchronize()
            raise
        return None if copied is None or slot.landed is None else StreamSpan(copied.begun, slot.landed)

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
        pool = self._pool
        first_elem = layers[0].host_start // pool.element_size()
        table = place.table(first_layer, len(layers))
        self._land(staged.view(pool.dtype), first_elem, table, pool, place.page_table, self._chunk_elems)

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

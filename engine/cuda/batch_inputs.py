"""What changes from one batch to the next: a few thousand integers, brought to the device by one copy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import accumulate, chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from segue.engine.cuda.batch_shapes import BatchShape
from segue.engine.forward_pass import RequestRows, pending_rows
from segue.engine.pending import fill_pending

# FlashInfer's buffers begin at multiples of 16 bytes.
_ALIGN_ELEMS = 4


@dataclass(frozen=True, slots=True)
class BatchBuffers:
    """Views of one int32 buffer.

    ``token_ids``, ``positions`` and ``slots`` are [rows]: a slot is the place of a row's KV, page * page_tokens + the
    token of the page. ``last_page_tokens`` and ``logit_rows`` are [sequences]. Sequence i has the rows
    ``row_indptr[i]`` to ``row_indptr[i + 1]`` and the pages
    ``indices[indptr[i] : indptr[i + 1]]``.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    row_indptr: Tensor
    indptr: Tensor
    last_page_tokens: Tensor
    logit_rows: Tensor
    indices: Tensor

    @classmethod
    def of(cls, buffer: Tensor, shape: BatchShape) -> BatchBuffers:
        """Cut a buffer of ``size_elems`` elements."""
        sizes = _sizes(shape)
        starts = list(accumulate((_aligned(size) for size in sizes), initial=0))
        parts = [buffer[start : start + size] for start, size in zip(starts, sizes, strict=False)]
        names = (field.name for field in fields(cls))
        return cls(**dict(zip(names, [*parts, buffer[starts[-1] :]], strict=True)))

    @staticmethod
    def size_elems(shape: BatchShape, max_pages: int) -> int:
        """Elements of a buffer for sequences with ``max_pages`` pages together."""
        return sum(_aligned(size) for size in _sizes(shape)) + max_pages


class BatchMemory:
    """What the inputs of all shapes share, since one batch runs after the other.

    The host's buffers take turns, so that one can be filled while the device may still read the other.
    """

    def __init__(self, largest: BatchShape, max_pages: int, device: torch.device) -> None:
        """``max_pages`` bounds the pages of all sequences of a batch together."""
        elems = BatchBuffers.size_elems(largest, max_pages + largest.sequences)
        self.buffers = (host_buffer(elems, device), host_buffer(elems, device))
        self._turn = 0
        self.device = torch.zeros(elems, dtype=torch.int32, device=device)

    @property
    def turn(self) -> int:
        """Which of ``buffers`` was filled last."""
        return self._turn

    def take_turn(self) -> None:
        """Fill the other buffer from now on. All runs but the last must have ended."""
        self._turn = 1 - self._turn


class BatchInputs:
    """The integers of one shape, in memory that the device copies from and on the device.

    Rows that are not used are a first token in the padding page, and nobody reads what comes of them.
    """

    def __init__(self, shape: BatchShape, memory: BatchMemory, page_tokens: int, padding_page: int) -> None:
        self.shape = shape
        self._memory = memory
        self._page_tokens = page_tokens
        self._padding_page = padding_page
        self.on_device = BatchBuffers.of(memory.device, shape)
        self._on_host = [BatchBuffers.of(buffer, shape) for buffer in memory.buffers]
        self.total_tokens = torch.ones(shape.sequences, dtype=torch.int32)

    @property
    def host(self) -> BatchBuffers:
        """What was filled in last; ``total_tokens`` int32 [sequences] are the tokens in KV with the batch's."""
        return self._on_host[self._memory.turn]

    def fill(self, rows: Sequence[RequestRows]) -> None:
        """Take a batch that the shape holds. All runs but the last must have ended."""
        self._memory.take_turn()
        host = self.host
        counts = np.array([item.count for item in rows], dtype=np.int32)
        starts = np.array([item.start for item in rows], dtype=np.int32)
        totals = starts + counts
        tables = -(-totals // self._page_tokens)
        stops = counts.cumsum(dtype=np.int32)
        used = int(stops[-1]) if len(stops) else 0
        unused = self.shape.sequences - len(rows)
        first_of_row = np.repeat(starts - stops + counts, counts)
        pages = chain.from_iterable(
            item.request.pages[:table] for item, table in zip(rows, tables.tolist(), strict=True)
        )
        ends = np.concatenate((tables, np.ones(unused, dtype=np.int64))).cumsum()
        all_pages = int(ends[-1])
        indices = np.fromiter(pages, np.int32, all_pages - unused)
        positions = first_of_row + np.arange(used, dtype=np.int32)
        place, offsets = np.divmod(positions, self._page_tokens)
        slots = indices[np.repeat(ends[: len(rows)] - tables, counts) + place] * self._page_tokens + offsets
        _write(host.token_ids, np.fromiter(chain.from_iterable(item.token_ids for item in rows), np.int32, used), 0)
        _write(host.positions, positions, 0)
        _write(host.slots, slots, self._padding_page * self._page_tokens)
        # Other shapes have other things at these places.
        host.row_indptr[0] = host.indptr[0] = 0
        _write(host.row_indptr[1:], stops, used)
        _write(host.logit_rows, stops - 1, 0)
        _write(host.last_page_tokens, (totals - 1) % self._page_tokens + 1, 1)
        _write(self.total_tokens, totals, 1)
        host.indptr[1:] = torch.from_numpy(ends)
        _write(host.indices[:all_pages], indices, self._padding_page)
        buffer = self._memory.buffers[self._memory.turn]
        size = len(buffer) - len(host.indices) + all_pages
        self._memory.device[:size].copy_(buffer[:size], non_blocking=True)
        fill_pending(self.on_device.token_ids, pending_rows(rows))


def host_buffer(elems: int, device: torch.device) -> Tensor:
    """Zeros int32 [elems] in memory that ``device`` copies from without waiting."""
    buffer = torch.zeros(elems, dtype=torch.int32)
    return buffer.pin_memory() if device.type == "cuda" else buffer


def _sizes(shape: BatchShape) -> tuple[int, ...]:
    rows, sequences = shape.rows, shape.sequences
    return (rows, rows, rows, sequences + 1, sequences + 1, sequences, sequences)


def _aligned(size: int) -> int:
    return -(-size // _ALIGN_ELEMS) * _ALIGN_ELEMS


def _write(target: Tensor, values: NDArray[np.generic], padding: int) -> None:
    """The values, and ``padding`` behind them."""
    array = target.numpy()
    array[: len(values)] = values
    array[len(values) :] = padding

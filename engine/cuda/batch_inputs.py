"""What changes from one batch to the next: a few thousand integers, brought to the device by one copy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from segue.compiled import INT, INTS, LONGS, compiled
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
        starts = cls.starts(shape)
        parts = [buffer[start : start + size] for start, size in zip(starts, _sizes(shape), strict=False)]
        names = (field.name for field in fields(cls))
        return cls(**dict(zip(names, [*parts, buffer[starts[-1] :]], strict=True)))

    @staticmethod
    def starts(shape: BatchShape) -> list[int]:
        """Where the views begin, in their order."""
        return list(accumulate((_aligned(size) for size in _sizes(shape)), initial=0))

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
        self.words = tuple(buffer.numpy() for buffer in self.buffers)
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
        self._total_tokens = self.total_tokens.numpy()
        self._starts = np.array(BatchBuffers.starts(shape))

    @property
    def host(self) -> BatchBuffers:
        """What was filled in last; ``total_tokens`` int32 [sequences] are the tokens in KV with the batch's."""
        return self._on_host[self._memory.turn]

    def fill(self, rows: Sequence[RequestRows]) -> None:
        """Take a batch that the shape holds. All runs but the last must have ended.

        Raises ValueError for one that it does not hold, or where tokens or pages are missing.
        """
        self._memory.take_turn()
        words: list[int] = []
        for item in rows:
            pages = item.request.pages[: -(-(item.start + item.count) // self._page_tokens)]
            words += (item.start, item.count, len(pages))
            words += item.token_ids
            words += pages
        shape, memory = self.shape, self._memory
        used = _write_batch(
            np.array(words, dtype=np.int32), len(rows), shape.rows, shape.sequences, self._page_tokens,
            self._padding_page, self._starts, memory.words[memory.turn], self._total_tokens,
        )  # fmt: skip
        if used < 0:
            raise ValueError(f"rows: {len(rows)} requests do not fit {shape}, or have too few tokens or pages")
        memory.device[:used].copy_(memory.buffers[memory.turn][:used], non_blocking=True)
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


@compiled(INT(INTS, INT, INT, INT, INT, INT, LONGS, INTS, INTS), nogil=False)
def _write_batch(
    words: NDArray[np.int32],
    used_sequences: int,
    rows: int,
    sequences: int,
    page_tokens: int,
    padding_page: int,
    starts: NDArray[np.int64],
    buffer: NDArray[np.int32],
    total_tokens: NDArray[np.int32],
) -> int:
    """Fill a host's buffer, and return how much of it is used; -1 where something does not fit or is missing.

    ``words`` are, of each sequence: first position, rows, pages; then the rows' tokens, then the pages.
    """
    token_ids, positions, slots = buffer[starts[0] :], buffer[starts[1] :], buffer[starts[2] :]
    row_indptr, indptr = buffer[starts[3] :], buffer[starts[4] :]
    last_page_tokens, logit_rows, indices = buffer[starts[5] :], buffer[starts[6] :], buffer[starts[7] :]
    if used_sequences > sequences:
        return -1
    at = row = page = 0
    # Other shapes have other things at these places.
    row_indptr[0] = indptr[0] = 0
    for sequence in range(used_sequences):
        if at + 3 > len(words):
            return -1
        start, count, pages = words[at], words[at + 1], words[at + 2]
        own_tokens, own_pages, total = at + 3, at + 3 + count, start + count
        at = own_pages + pages
        has_room = row + count <= rows and page + pages + sequences - used_sequences <= len(indices)
        if not has_room or pages * page_tokens < total or at > len(words):
            return -1
        for place in range(count):
            position = start + place
            token_ids[row + place] = words[own_tokens + place]
            positions[row + place] = position
            slots[row + place] = words[own_pages + position // page_tokens] * page_tokens + position % page_tokens
        indices[page : page + pages] = words[own_pages:at]
        row += count
        page += pages
        row_indptr[sequence + 1] = row
        indptr[sequence + 1] = page
        logit_rows[sequence] = row - 1
        last_page_tokens[sequence] = (total - 1) % page_tokens + 1
        total_tokens[sequence] = total
    if at != len(words):
        return -1
    token_ids[row:rows] = 0
    positions[row:rows] = 0
    slots[row:rows] = padding_page * page_tokens
    for sequence in range(used_sequences, sequences):
        indices[page] = padding_page
        page += 1
        row_indptr[sequence + 1] = row
        indptr[sequence + 1] = page
        logit_rows[sequence] = 0
        last_page_tokens[sequence] = total_tokens[sequence] = 1
    return int(starts[7]) + page

"""What changes from one decode step to the next: a few thousand integers, brought to the device by one copy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import torch
from torch import Tensor

from segue.engine.forward_pass import RequestRows, pending_rows
from segue.engine.pending import fill_pending

# FlashInfer's buffers begin at multiples of 16 bytes.
_ALIGN_ELEMS = 4


@dataclass(frozen=True, slots=True)
class DecodeBuffers:
    """Views of one int32 buffer: ``token_ids``, ``positions`` and ``last_page_tokens`` are [rows], ``indptr`` is
    [rows + 1]; ``indices[indptr[i] : indptr[i + 1]]`` are the pages of row i's sequence."""

    token_ids: Tensor
    positions: Tensor
    last_page_tokens: Tensor
    indptr: Tensor
    indices: Tensor

    @classmethod
    def of(cls, buffer: Tensor, rows: int) -> DecodeBuffers:
        """Cut a buffer of ``size_elems`` elements."""
        sizes = (rows, rows, rows, rows + 1)
        starts = list(accumulate((-(-size // _ALIGN_ELEMS) * _ALIGN_ELEMS for size in sizes), initial=0))
        token_ids, positions, last_page_tokens, indptr = (
            buffer[start : start + size] for start, size in zip(starts, sizes, strict=False)
        )
        return cls(token_ids, positions, last_page_tokens, indptr, buffer[starts[-1] :])

    @staticmethod
    def size_elems(rows: int, max_pages: int) -> int:
        """Elements of a buffer for sequences with ``max_pages`` pages together."""
        return 4 * (rows + 1 + _ALIGN_ELEMS) + max_pages


class DecodeInputs:
    """The buffers of one batch bucket, in pinned memory and on the device.

    Rows that are not used decode a token into the padding page, and nobody reads what comes of it. The pinned buffers
    take turns, so that one can be filled while the device may still read the other.
    """

    def __init__(self, rows: int, max_pages: int, page_tokens: int, padding_page: int, device: torch.device) -> None:
        """``max_pages`` bounds the pages of all sequences of a batch together."""
        size_elems = DecodeBuffers.size_elems(rows, max_pages)
        self.rows = rows
        self._page_tokens = page_tokens
        self._padding_page = padding_page
        self._pinned = torch.zeros(size_elems, dtype=torch.int32).pin_memory()
        self._other = torch.zeros_like(self._pinned).pin_memory()
        self._device = torch.zeros(size_elems, dtype=torch.int32, device=device)
        self.on_device = DecodeBuffers.of(self._device, rows)

    @property
    def host(self) -> DecodeBuffers:
        """What was filled in last."""
        return DecodeBuffers.of(self._pinned, self.rows)

    def fill(self, rows: Sequence[RequestRows]) -> None:
        """Take the last token of each request. All runs but the last must have ended."""
        self._pinned, self._other = self._other, self._pinned
        padding = self.rows - len(rows)
        page_tokens = self._page_tokens
        counts = [item.start // page_tokens + 1 for item in rows]
        pages = list(chain.from_iterable(item.request.pages[:count] for item, count in zip(rows, counts, strict=True)))
        host = self.host
        _write(host.token_ids, [item.token_ids[0] for item in rows], padding, 0)
        _write(host.positions, [item.start for item in rows], padding, 0)
        _write(host.last_page_tokens, [item.start % page_tokens + 1 for item in rows], padding, 1)
        _write(host.indptr, list(accumulate([*counts, *[1] * padding], initial=0)), 0, 0)
        _write(host.indices[: len(pages) + padding], pages, padding, self._padding_page)
        used = len(self._pinned) - len(host.indices) + len(pages) + padding
        self._device[:used].copy_(self._pinned[:used], non_blocking=True)
        fill_pending(self.on_device.token_ids, pending_rows(rows))


def _write(target: Tensor, values: list[int], padding: int, padding_value: int) -> None:
    target.numpy()[:] = values + [padding_value] * padding

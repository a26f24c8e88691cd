"""One forward pass's rows: which tokens, where their keys and values go, and which rows' logits are wanted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceInput:
    """One sequence's part of a batch, in plain integers.

    ``token_ids`` follow ``context_tokens`` tokens whose KV is in ``pages`` already; the pages must have room for both.
    The logits of the last ``logit_tokens`` of these tokens are wanted.
    """

    token_ids: Sequence[int]
    context_tokens: int
    pages: Sequence[int]
    logit_tokens: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceRows:
    """Rows ``row_start`` to ``row_stop`` of a batch are one sequence's tokens ``context_tokens`` and up.

    ``page_table`` [n] int64 has the pages of its KV in order, those of these rows included.
    """

    row_start: int
    row_stop: int
    context_tokens: int
    page_table: Tensor

    @property
    def rows(self) -> int:
        return self.row_stop - self.row_start

    @property
    def total_tokens(self) -> int:
        """Tokens in KV once these rows are written."""
        return self.context_tokens + self.rows


@dataclass(frozen=True, slots=True, kw_only=True)
class RowBatch:
    """T rows of one or more sequences. All tensors are int64.

    ``token_ids`` and ``positions`` are [T]; ``slot_pages`` and ``slot_offsets`` [T] name the page and the token in it
    that takes each row's K and V; ``logit_rows`` [L] are the rows whose logits are wanted, None for all.
    """

    token_ids: Tensor
    positions: Tensor
    sequences: tuple[SequenceRows, ...]
    slot_pages: Tensor
    slot_offsets: Tensor
    logit_rows: Tensor | None

    def to(self, device: torch.device) -> RowBatch:
        """The same with its tensors on ``device``; the sequences' page tables stay where plans are made."""
        if device.type == "cpu":
            return self
        names = ("token_ids", "positions", "slot_pages", "slot_offsets", "logit_rows")
        present = {name: tensor for name in names if (tensor := getattr(self, name)) is not None}
        moved = {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in present.items()}
        return replace(self, **moved)


def build_batch(sequences: Sequence[SequenceInput], page_tokens: int) -> RowBatch:
    """The batch of these sequences, their rows one after the other in the given order.

    Raises ValueError for no or an empty sequence, too few pages, or more logits than tokens.
    """
    if not sequences:
        raise ValueError("sequences: a batch needs at least one")
    for index, sequence in enumerate(sequences):
        _check(index, sequence, page_tokens)
    rows = torch.tensor([len(sequence.token_ids) for sequence in sequences])
    context = torch.tensor([sequence.context_tokens for sequence in sequences])
    table_lengths = [len(sequence.pages) for sequence in sequences]
    tables = torch.tensor([page for sequence in sequences for page in sequence.pages])
    row_stops = rows.cumsum(0)
    row_starts = row_stops - rows
    table_starts = torch.tensor(table_lengths).cumsum(0) - torch.tensor(table_lengths)

    owner = torch.repeat_interleave(torch.arange(len(sequences)), rows)
    positions = torch.arange(owner.shape[0]) - row_starts[owner] + context[owner]
    from_end = row_stops[owner] - torch.arange(owner.shape[0])
    logit_tokens = torch.tensor([sequence.logit_tokens for sequence in sequences])
    wanted = from_end <= logit_tokens[owner]
    return RowBatch(
        token_ids=torch.tensor([token for sequence in sequences for token in sequence.token_ids]),
        positions=positions,
        sequences=tuple(
            SequenceRows(row_start=start, row_stop=stop, context_tokens=sequence.context_tokens, page_table=table)
            for start, stop, sequence, table in zip(
                row_starts.tolist(), row_stops.tolist(), sequences, torch.split(tables, table_lengths), strict=True
            )
        ),
        slot_pages=tables[table_starts[owner] + positions // page_tokens],
        slot_offsets=positions % page_tokens,
        logit_rows=None if wanted.all() else wanted.nonzero().view(-1),
    )


def _check(index: int, sequence: SequenceInput, page_tokens: int) -> None:
    tokens = len(sequence.token_ids)
    if not tokens or sequence.context_tokens < 0:
        raise ValueError(f"sequence {index}: {tokens} tokens after a context of {sequence.context_tokens}")
    if len(sequence.pages) * page_tokens < sequence.context_tokens + tokens:
        raise ValueError(
            f"sequence {index}: {len(sequence.pages)} pages of {page_tokens} tokens cannot hold "
            f"{sequence.context_tokens} + {tokens} tokens"
        )
    if not 0 <= sequence.logit_tokens <= tokens:
        raise ValueError(f"sequence {index}: logits of {sequence.logit_tokens} of {tokens} tokens")

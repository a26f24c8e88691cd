"""Tokens that are chosen but not read yet: the rows of the next pass take them where the sampler left them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class PendingToken:
    """A token on the device: ``token_ids[place]`` of [rows]."""

    token_ids: Tensor
    place: int


def fill_pending(token_ids: Tensor, pending: Sequence[tuple[int, PendingToken]]) -> None:
    """Write each pending token into its row of ``token_ids`` [rows], on the same device and in its stream's order."""
    sources: dict[int, list[tuple[int, PendingToken]]] = {}
    for row, token in pending:
        sources.setdefault(id(token.token_ids), []).append((row, token))
    for members in sources.values():
        rows = [row for row, _ in members]
        places = [token.place for _, token in members]
        _copy(token_ids, rows, members[0][1].token_ids, places)


def _copy(target: Tensor, rows: list[int], source: Tensor, places: list[int]) -> None:
    count = len(rows)
    if rows == list(range(rows[0], rows[0] + count)) and places == list(range(places[0], places[0] + count)):
        # As long as the same requests decode: no indices to bring to the device.
        target[rows[0] : rows[0] + count].copy_(source[places[0] : places[0] + count])
        return
    index = torch.tensor([rows, places])
    if target.is_cuda:
        index = index.pin_memory().to(target.device, non_blocking=True)
    target[index[0]] = source[index[1]].to(target.dtype)

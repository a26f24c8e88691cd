"""The next token of each request from the logits of a pass, where one with unusable logits fails alone."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from segue.engine.request import Request
from segue.engine.sampling import SampledToken, UnusableLogitsError, sample


def next_tokens(logits: Tensor, wanted: Sequence[tuple[int, Request]]) -> list[SampledToken | None]:
    """One token for each request of ``wanted``, which names its row of ``logits`` float32 [rows, vocab].

    None where no token can be chosen from the row.
    """
    tokens: list[SampledToken | None] = [None] * len(wanted)
    left = list(range(len(wanted)))
    while left:
        indices = [wanted[place][0] for place in left]
        rows = logits if indices == list(range(len(logits))) else logits[indices]
        try:
            drawn = sample(rows, [wanted[place][1].sampling_row() for place in left])
        except UnusableLogitsError as error:
            left = [place for position, place in enumerate(left) if position not in error.problems]
            continue
        for place, token in zip(left, drawn, strict=True):
            tokens[place] = token
        break
    return tokens

"""Choosing tokens in two halves: enqueue the choice, and read it when something else has been enqueued behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from segue.engine.sampling import SampledToken, SamplingRow, UnusableLogitsError, sample


class PendingTokens(Protocol):
    """Tokens of one launch. ``token_ids`` is an integer tensor [rows] on the logits' device, in its stream's order."""

    @property
    def token_ids(self) -> Tensor: ...

    def read(self) -> list[SampledToken | None]:
        """Wait for the tokens; None for a row that no token can be chosen from."""
        ...


class Sampler(Protocol):
    """Chooses a token for each row of logits."""

    def launch(self, logits: Tensor, rows: Sequence[SamplingRow]) -> PendingTokens:
        """Enqueue the choice from ``logits`` [rows, vocab], see ``sampling.sample`` for its meaning."""
        ...


class TorchSampler:
    """Chooses at once, in torch."""

    def launch(self, logits: Tensor, rows: Sequence[SamplingRow]) -> ChosenTokens:
        logits = logits.float()
        chosen: list[SampledToken | None] = [None] * len(rows)
        left = list(range(len(rows)))
        while left:
            part = logits if len(left) == len(rows) else logits[left]
            try:
                drawn = sample(part, [rows[row] for row in left])
            except UnusableLogitsError as error:
                left = [row for position, row in enumerate(left) if position not in error.problems]
                continue
            for row, token in zip(left, drawn, strict=True):
                chosen[row] = token
            break
        ids = torch.tensor([0 if token is None else token.token_id for token in chosen])
        return ChosenTokens(ids.to(logits.device), chosen)


class ChosenTokens:
    """See PendingTokens: nothing is left to wait for."""

    def __init__(self, token_ids: Tensor, tokens: list[SampledToken | None]) -> None:
        self.token_ids = token_ids
        self._tokens = tokens

    def read(self) -> list[SampledToken | None]:
        return self._tokens

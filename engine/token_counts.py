"""Which tokens a request has seen and how often it has generated each, kept as the request grows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray


class TokenCounts:
    """Each token of prompt and answer has one slot; ``counts`` counts the answer alone, so prompt tokens begin at 0.

    A request keeps it across preemption, whose recomputed tokens are not counted again. Adding a token takes constant
    time, and a step reads the arrays as they are.
    """

    __slots__ = ("_counts", "_ids", "_slots")

    def __init__(self, prompt_token_ids: Sequence[int], generated_token_ids: Iterable[int] = ()) -> None:
        self._ids = np.unique(np.asarray(prompt_token_ids, dtype=np.int64))
        self._counts = np.zeros(len(self._ids), dtype=np.float32)
        self._slots = {token_id: slot for slot, token_id in enumerate(self._ids.tolist())}
        for token_id in generated_token_ids:
            self.add(token_id)

    @property
    def ids(self) -> NDArray[np.int64]:
        """Tokens of prompt and answer [slots], each once. Valid until the next ``add``."""
        return self._ids[: len(self._slots)]

    @property
    def counts(self) -> NDArray[np.float32]:
        """How often each of ``ids`` was generated [slots]."""
        return self._counts[: len(self._slots)]

    def add(self, token_id: int) -> None:
        """Count a generated token."""
        slot = self._slots.setdefault(token_id, len(self._slots))
        if slot == len(self._ids):
            free = max(64, slot)
            self._ids = np.concatenate([self._ids, np.empty(free, dtype=np.int64)])
            self._counts = np.concatenate([self._counts, np.zeros(free, dtype=np.float32)])
        self._ids[slot] = token_id
        self._counts[slot] += 1

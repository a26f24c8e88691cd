"""How many tokens prompts and answers have. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Self

import numpy as np
from numpy.typing import NDArray

from segue.config import ConfigError, require


class Lengths(StrEnum):
    """All alike, log-normal, or a trace's."""

    FIXED = "fixed"
    LOGNORMAL = "lognormal"
    TRACE = "trace"


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthConfig:
    """``mean`` tokens, of which log-normal lengths have a standard deviation of their logarithm of ``sigma``; none is
    above ``most``, if that is given."""

    kind: str = Lengths.FIXED.value
    mean: float = 1.0
    sigma: float = 0.0
    most: int | None = None

    @classmethod
    def parse(cls, field: str, text: str) -> Self:
        """``N``, ``lognormal:MEAN:SIGMA``, ``lognormal:MEAN:SIGMA:MOST`` or ``trace``. Raises ConfigError."""
        kind, *numbers = text.split(":")
        try:
            if kind == Lengths.TRACE and not numbers:
                return cls(kind=kind)
            if kind == Lengths.LOGNORMAL and len(numbers) in (2, 3):
                most = int(numbers[2]) if len(numbers) == 3 else None
                return cls(kind=kind, mean=float(numbers[0]), sigma=float(numbers[1]), most=most)._checked(field)
            if not numbers:
                return cls(mean=int(kind))._checked(field)
        except ValueError as error:
            if isinstance(error, ConfigError):
                raise
        raise ConfigError(f"{field}: must be N, lognormal:MEAN:SIGMA[:MOST] or trace, is {text!r}")

    def _checked(self, field: str) -> Self:
        require(self.mean >= 1, field, f"must be at least 1 token, is {self.mean:g}")
        require(self.sigma >= 0, field, f"sigma must not be negative, is {self.sigma:g}")
        require(self.most is None or self.most >= 1, field, f"must allow at least 1 token, is {self.most}")
        return self

    @property
    def longest(self) -> int | None:
        """The longest that can come, in tokens; None if there is no bound."""
        return int(self.mean) if self.kind == Lengths.FIXED else self.most


def lognormal_lengths(mean: float, sigma: float, count: int, draw: np.random.Generator) -> NDArray[np.int64]:
    """Lengths of at least one token with that mean; their logarithms have the standard deviation ``sigma``."""
    lengths = draw.lognormal(math.log(mean) - sigma**2 / 2, sigma, count)
    return np.maximum(np.rint(lengths), 1).astype(np.int64)


def draw_lengths(
    config: LengthConfig, count: int, draw: np.random.Generator, recorded: Sequence[int] = ()
) -> NDArray[np.int64]:
    """``count`` lengths; ``recorded`` are a trace's, taken in order and again from the first where they end."""
    match config.kind:
        case Lengths.TRACE:
            lengths = np.maximum(np.resize(np.asarray(recorded, dtype=np.int64), count), 1)
        case Lengths.LOGNORMAL:
            lengths = lognormal_lengths(config.mean, config.sigma, count, draw)
        case _:
            lengths = np.full(count, int(config.mean), dtype=np.int64)
    return lengths if config.most is None else np.minimum(lengths, config.most)

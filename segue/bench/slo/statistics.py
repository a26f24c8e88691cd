"""The statistics of a run: how sure a share is, and how fair shares are. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Where the true share lies with this confidence, after ``successes`` of ``trials``.

    Wilson's score interval (Wilson, "Probable inference", JASA 22, 1927). Raises ValueError for no trials or more
    successes than trials.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"successes must be from 0 to trials, and trials at least 1, are {successes} of {trials}")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = successes / trials
    middle = share + z * z / (2 * trials)
    half = z * math.sqrt(share * (1 - share) / trials + (z / (2 * trials)) ** 2)
    scale = 1 + z * z / trials
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def jain_index(values: Sequence[float]) -> float:
    """Jain's fairness index (sum x)^2 / (n sum x^2): 1 if all are equal, 1/n if one has all; 1 if all are 0.

    Jain, Chiu and Hawe, DEC-TR-301, 1984. Raises ValueError for no values.
    """
    if not values:
        raise ValueError("values: there must be at least one")
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else 1.0

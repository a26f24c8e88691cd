"""Ratios with bounds, from timings that were taken in interleaved rounds or of the same requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_RESAMPLES = 4000


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundedRatio:
    """A ratio of medians or means. It is above ``lower`` with a confidence of 95%, and below ``upper`` with as much;
    ``p10`` and ``p90`` are of its resamples."""

    value: float
    p10: float
    p90: float
    lower: float
    upper: float


def ratio_over_best(timings: Sequence[float], rivals: Sequence[Sequence[float]], seed: int) -> BoundedRatio:
    """The median of ``timings`` over the least median of ``rivals``; timing i of each was taken in round i.

    The bounds are one-sided percentiles of a bootstrap (Efron, 1979) that draws whole rounds, as what the machine did
    in a round hit all of them alike. The best rival is chosen anew in each resample, since which it is, is not known
    for sure. Raises ValueError unless all have the same number of timings, one at least.
    """
    rounds = len(timings)
    if rounds == 0 or not rivals or any(len(rival) != rounds for rival in rivals):
        raise ValueError("timings and rivals must have one timing for each round, and there must be some")
    own, others = np.asarray(timings), np.asarray(rivals)
    drawn = np.random.default_rng(seed).integers(rounds, size=(_RESAMPLES, rounds))
    ratios = np.median(own[drawn], axis=1) / np.median(others[:, drawn], axis=2).min(axis=0)
    return _bounded(float(np.median(own) / np.median(others, axis=1).min()), ratios)


def ratio_of_means(times: Sequence[float], others: Sequence[float], seed: int) -> BoundedRatio:
    """The mean of ``times`` over that of ``others``; both are of the same requests, in the same order.

    The bounds are those of a bootstrap that draws requests, as ``ratio_over_best`` draws rounds. Raises ValueError
    unless there are as many of both, one at least.
    """
    if not times or len(times) != len(others):
        raise ValueError("times and others must be of the same requests, and there must be some")
    own, rivals = np.asarray(times), np.asarray(others)
    random = np.random.default_rng(seed)
    ratios = np.empty(_RESAMPLES)
    for resample in range(_RESAMPLES):
        drawn = random.integers(len(own), size=len(own))
        ratios[resample] = own[drawn].mean() / rivals[drawn].mean()
    return _bounded(float(own.mean() / rivals.mean()), ratios)


def _bounded(value: float, resamples: NDArray[np.float64]) -> BoundedRatio:
    lower, p10, p90, upper = (float(each) for each in np.percentile(resamples, [5, 10, 90, 95]))
    return BoundedRatio(value=value, p10=p10, p90=p90, lower=lower, upper=upper)


def balanced_orders(count: int) -> list[tuple[int, ...]]:
    """Orders of ``count`` treatments, to be used one after the other.

    Each takes each place, and comes behind each other one, equally often over all of them: what one leaves behind falls
    on all alike (Williams, 1949).
    """
    zigzag = [place // 2 if place % 2 == 0 else count - (place + 1) // 2 for place in range(count)]
    orders = [tuple((place + shift) % count for place in zigzag) for shift in range(count)]
    return orders if count % 2 == 0 else [*orders, *(order[::-1] for order in orders)]

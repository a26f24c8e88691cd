"""Which adapter a request uses: how popular each is, and how that goes with ranks. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from segue.config import require

# Of the applications on Azure Functions the 18.6% most popular receive 99.6% of the invocations (Shahrad et al.,
# "Serverless in the Wild", USENIX ATC 2020). That is one condition on two parameters of (k + shift)^-exponent: with
# this shift the first of 40,000 receives 7% and the first ten 41%, and the exponent follows. A pure power law (shift 0,
# exponent 1.53) would give the first one 40%.
AZURE_SHIFT, AZURE_EXPONENT = 10.0, 1.795


class Popularity(StrEnum):
    """How often adapters are used: alike; by Zipf's law; each a fixed part less than the one before; in turn; one for
    all; as the functions of Azure's trace in the mean; or as often as the functions of a trace."""

    UNIFORM = "uniform"
    ZIPF = "zipf"
    GEOMETRIC = "geometric"
    DISTINCT = "distinct"
    ONE = "one"
    AZURE = "azure"
    TRACE = "trace"


_DEFAULTS = {Popularity.ZIPF: 1.0, Popularity.GEOMETRIC: 0.1}


@dataclass(frozen=True, slots=True, kw_only=True)
class PopularityConfig:
    """``parameter`` is Zipf's exponent, or the part by which geometric shares fall. ``base_share`` of the requests use
    no adapter.

    ``rank_correlation`` orders adapters by rank: at 1 the more popular have the larger ranks, at -1 the smaller, at 0
    chance decides, in between it is the correlation of normal scores. None takes the ranks in turn.
    """

    kind: str = Popularity.ZIPF.value
    parameter: float = 1.0
    base_share: float = 0.0
    rank_correlation: float | None = None

    def __post_init__(self) -> None:
        known = ", ".join(Popularity)
        require(self.kind in tuple(Popularity), "popularity", f"must be one of {known}, is {self.kind!r}")
        if self.kind == Popularity.GEOMETRIC:
            require(0 < self.parameter < 1, "popularity", f"geometric: must be above 0 and below 1: {self.parameter:g}")
        require(self.parameter >= 0, "popularity", f"{self.kind}: must not be negative, is {self.parameter:g}")
        require(0 <= self.base_share <= 1, "base_share", f"must be from 0 to 1, is {self.base_share:g}")
        correlation = self.rank_correlation
        sound = correlation is None or -1 <= correlation <= 1
        require(sound, "rank_correlation", f"must be from -1 to 1, is {correlation}")

    @classmethod
    def parse_kind(cls, text: str) -> tuple[str, float]:
        """Kind and parameter of ``KIND`` or ``KIND:PARAMETER``. Raises ConfigError."""
        kind, separator, number = text.partition(":")
        require(kind in tuple(Popularity), "popularity", f"must be one of {', '.join(Popularity)}, is {kind!r}")
        if not separator:
            return kind, _DEFAULTS.get(Popularity(kind), 1.0)
        require(kind in _DEFAULTS, "popularity", f"{kind} takes no number, is {text!r}")
        try:
            return kind, float(number)
        except ValueError:
            require(False, "popularity", f"{number!r} is no number")
            raise


def shares(kind: str, parameter: float, adapters: int, counts: Sequence[float] = ()) -> NDArray[np.float64]:
    """The share of the requests with an adapter that each of ``adapters`` receives, the most popular first.

    ``counts`` are the invocations of a trace's functions; of more functions than adapters the most popular are taken,
    and with fewer the rest of the adapters receive nothing.
    """
    places = np.arange(1, adapters + 1, dtype=float)
    match kind:
        case Popularity.UNIFORM | Popularity.DISTINCT:
            weights = np.ones(adapters)
        case Popularity.ONE:
            weights = (places == 1).astype(float)
        case Popularity.GEOMETRIC:
            weights = (1 - parameter) ** (places - 1)
        case Popularity.AZURE:
            weights = (places + AZURE_SHIFT) ** -AZURE_EXPONENT
        case Popularity.ZIPF:
            weights = places**-parameter
        case Popularity.TRACE:
            most = np.sort(np.asarray(counts, dtype=float))[::-1][:adapters]
            weights = np.pad(most, (0, adapters - len(most)))
        case _:
            raise ValueError(f"kind: {kind!r} is unknown")
    found: NDArray[np.float64] = weights / weights.sum()
    return found


def draw_places(
    config: PopularityConfig, weights: NDArray[np.float64], count: int, draw: np.random.Generator
) -> list[int | None]:
    """For each request its adapter's place in the order of popularity, None for the base model."""
    base = draw.random(count) < config.base_share
    if config.kind == Popularity.DISTINCT:
        # In turn, so that as many requests as there are adapters have one each.
        places = np.cumsum(~base) % len(weights)
    else:
        places = draw.choice(len(weights), size=count, p=weights)
    return [None if own_base else int(place) for own_base, place in zip(base, places, strict=True)]


def order_by_popularity(ranks: Sequence[int], correlation: float | None, draw: np.random.Generator) -> list[int]:
    """The places of ``ranks`` in the order of popularity, as ``rank_correlation`` of PopularityConfig says."""
    if correlation is None:
        return _in_turn(ranks)
    by_rank = sorted(range(len(ranks)), key=lambda place: ranks[place])
    scores = np.empty(len(ranks))
    scores[by_rank] = np.sort(draw.standard_normal(len(ranks)))
    mixed = correlation * scores + (1 - correlation**2) ** 0.5 * draw.standard_normal(len(ranks))
    return [int(place) for place in np.argsort(-mixed, kind="stable")]


def _in_turn(ranks: Sequence[int]) -> list[int]:
    """One of each rank, then another of each, and so on."""
    seen: dict[int, int] = {}
    keys = []
    for place, rank in enumerate(ranks):
        seen[rank] = seen.get(rank, 0) + 1
        keys.append((seen[rank], rank, place))
    return [place for _, _, place in sorted(keys)]

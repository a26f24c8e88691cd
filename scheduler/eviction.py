"""Which adapters give their pages back when others need them: those that are cheapest to lose.

The cost of losing an adapter is the seconds that bringing it back takes times the chance that it is used soon. Victims
are taken by cost per page, as in GreedyDual-Size (Cao and Irani, 1997, "Cost-Aware WWW Proxy Caching Algorithms").
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

DEFAULT_HALF_LIFE_SECONDS = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EvictionCandidate:
    """An adapter version that holds pages.

    ``recent_uses`` counts its uses with exponential decay, as of its last use, which was ``idle_seconds`` ago.
    ``users`` requests refer to its pages now.
    """

    version_id: int
    pages: int
    bring_back_seconds: float
    recent_uses: float
    idle_seconds: float
    users: int = 0


def decayed(amount: float, seconds: float, half_life_seconds: float = DEFAULT_HALF_LIFE_SECONDS) -> float:
    """What is left of ``amount`` after ``seconds`` of exponential decay."""
    return amount * math.exp2(-max(seconds, 0.0) / half_life_seconds)


def eviction_cost(candidate: EvictionCandidate, half_life_seconds: float = DEFAULT_HALF_LIFE_SECONDS) -> float:
    """Expected seconds lost: the time to bring it back times its decayed number of uses."""
    uses = decayed(candidate.recent_uses, candidate.idle_seconds, half_life_seconds)
    return candidate.bring_back_seconds * uses


def choose_victims(
    candidates: Iterable[EvictionCandidate],
    needed: int,
    *,
    half_life_seconds: float = DEFAULT_HALF_LIFE_SECONDS,
) -> tuple[int, ...]:
    """The version ids to evict so that at least ``needed`` pages come free, cheapest per page first.

    Never one that is in use. Empty when nothing is needed, and also when all of them together would not be enough:
    evicting in vain helps nobody.
    """
    if needed <= 0:
        return ()
    costs = {
        candidate: eviction_cost(candidate, half_life_seconds)
        for candidate in candidates
        if candidate.users == 0 and candidate.pages > 0
    }
    if sum(candidate.pages for candidate in costs) < needed:
        return ()
    by_cost_per_page = sorted(
        costs, key=lambda candidate: (costs[candidate] / candidate.pages, -candidate.idle_seconds, candidate.version_id)
    )
    chosen: list[EvictionCandidate] = []
    freed = 0
    for candidate in by_cost_per_page:
        if freed >= needed:
            break
        chosen.append(candidate)
        freed += candidate.pages
    # A large last victim may have made earlier ones needless: spare the dearest of them.
    for candidate in sorted(chosen, key=lambda each: costs[each], reverse=True):
        if freed - candidate.pages >= needed:
            chosen.remove(candidate)
            freed -= candidate.pages
    return tuple(candidate.version_id for candidate in chosen)

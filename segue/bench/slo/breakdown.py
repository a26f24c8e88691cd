"""Runs by group: by class, rank, tenant, popularity and warmth. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from segue.bench.slo.outcome import Outcome, Verdict
from segue.bench.slo.statistics import jain_index, wilson_interval

_MOST_PROBLEMS = 3
_WARM_TIERS = ("device", "none")


def _rank(outcome: Outcome) -> str:
    adapter = outcome.request.adapter
    return "base model" if adapter is None else f"rank {adapter.rank}"


def _decile(outcome: Outcome) -> str | None:
    adapter = outcome.request.adapter
    return None if adapter is None else f"decile {adapter.decile}"


def _warmth(outcome: Outcome) -> str | None:
    """By what the reply says of the adapter's weights; a request without a reply is neither."""
    tier = outcome.record.tier
    if tier is None or outcome.request.adapter is None:
        return None
    return "warm" if tier in _WARM_TIERS else f"cold, on {tier}"


DIMENSIONS: Mapping[str, Callable[[Outcome], str | None]] = MappingProxyType(
    {
        "class": lambda outcome: outcome.request.slo.name,
        "rank": _rank,
        "tenant": lambda outcome: outcome.request.tenant,
        "popularity": _decile,
        "warmth": _warmth,
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Some of the measured requests. ``low`` and ``high`` are Wilson's interval of the share that met its targets.
    ``ttft_ms`` and ``tpot_ms`` are of those that have such a time."""

    name: str
    sent: int
    met: int
    low: float
    high: float
    tokens: int
    wanted_tokens: int
    ttft_ms: Sequence[float]
    tpot_ms: Sequence[float]

    @property
    def share(self) -> float:
        return self.met / self.sent


@dataclass(frozen=True, slots=True, kw_only=True)
class Dimension:
    """The requests divided in one way. ``jain`` is Jain's index of the groups' shares that met their targets, and
    ``jain_tokens`` of the tokens that they received over those they asked for."""

    name: str
    groups: Sequence[Group]
    jain: float
    jain_tokens: float


def group_of(name: str, outcomes: Sequence[Outcome], confidence: float) -> Group:
    """Raises ValueError for no outcomes."""
    met = sum(outcome.met for outcome in outcomes)
    low, high = wilson_interval(met, len(outcomes), confidence)
    return Group(
        name=name,
        sent=len(outcomes),
        met=met,
        low=low,
        high=high,
        tokens=sum(outcome.record.tokens for outcome in outcomes),
        wanted_tokens=sum(outcome.request.output_tokens for outcome in outcomes),
        ttft_ms=[1e3 * outcome.ttft_seconds for outcome in outcomes if outcome.ttft_seconds is not None],
        tpot_ms=[1e3 * outcome.tpot_seconds for outcome in outcomes if outcome.tpot_seconds is not None],
    )


def divide(outcomes: Sequence[Outcome], confidence: float) -> Sequence[Dimension]:
    """Every dimension that some of the requests have a place in."""
    found = []
    for name, key in DIMENSIONS.items():
        members: dict[str, list[Outcome]] = {}
        for outcome in outcomes:
            if (label := key(outcome)) is not None:
                members.setdefault(label, []).append(outcome)
        if not members:
            continue
        groups = [group_of(label, members[label], confidence) for label in sorted(members, key=_natural)]
        found.append(
            Dimension(
                name=name,
                groups=groups,
                jain=jain_index([group.share for group in groups]),
                jain_tokens=jain_index([group.tokens / group.wanted_tokens for group in groups]),
            )
        )
    return found


def count_verdicts(outcomes: Sequence[Outcome]) -> Mapping[Verdict, int]:
    """How many ended in each way; those that occur."""
    counts = {verdict: sum(outcome.verdict is verdict for outcome in outcomes) for verdict in Verdict}
    return {verdict: count for verdict, count in counts.items() if count}


def common_problems(outcomes: Sequence[Outcome]) -> Sequence[str]:
    """What servers said most often of requests that were refused or failed, at most three, with how often."""
    failed = [o for o in outcomes if o.verdict in (Verdict.REFUSED, Verdict.FAILED)]
    counts = Counter(f"{o.record.code}: {o.record.message}" for o in failed)
    return [f"{count} x {problem}" for problem, count in counts.most_common(_MOST_PROBLEMS)]


def _natural(label: str) -> tuple[str, int]:
    """Numbers at the end in their own order."""
    text = label.rstrip("0123456789")
    return text, int(label[len(text) :] or 0)

"""Requests are divided by who asked, for which adapter, and how warm it was."""

from __future__ import annotations

import pytest

from segue.bench.slo.breakdown import common_problems, count_verdicts, divide, group_of
from segue.bench.slo.outcome import Verdict
from segue.bench.slo.workload import Adapter
from tests.bench.slo.plans import outcome

SMALL, LARGE = Adapter(name="s", rank=8, decile=1), Adapter(name="l", rank=64, decile=10)
OUTCOMES = [
    outcome(0, request={"adapter": SMALL, "tenant": "a"}),
    outcome(1, request={"adapter": SMALL, "tenant": "a"}, tier="host"),
    outcome(2, request={"adapter": LARGE, "tenant": "b"}, tier="disk", ttft_ms=500),
    outcome(3, request={"adapter": LARGE, "tenant": "b"}, code="UNAVAILABLE", message="gone", tokens=5, tier=None),
    outcome(4, request={"adapter": None, "tenant": "b"}, tier="none"),
]


def test_every_division_is_there() -> None:
    found = {
        each.name: [(group.name, group.sent, group.met) for group in each.groups] for each in divide(OUTCOMES, 0.95)
    }
    assert found == {
        "class": [("all", 5, 3)],
        "rank": [("base model", 1, 1), ("rank 8", 2, 2), ("rank 64", 2, 0)],
        "tenant": [("a", 2, 2), ("b", 3, 1)],
        "popularity": [("decile 1", 2, 2), ("decile 10", 2, 0)],
        "warmth": [("cold, on disk", 1, 0), ("cold, on host", 1, 1), ("warm", 1, 1)],
    }


def test_fairness_is_of_shares_and_of_tokens() -> None:
    tenants = next(each for each in divide(OUTCOMES, 0.95) if each.name == "tenant")
    assert tenants.jain == pytest.approx((4 / 3) ** 2 / (2 * (1 + 1 / 9)))
    assert tenants.jain_tokens == pytest.approx((1 + 25 / 30) ** 2 / (2 * (1 + (25 / 30) ** 2)))


def test_what_nothing_belongs_to_is_left_out() -> None:
    assert [each.name for each in divide([outcome(request={"adapter": None}, tier="none")], 0.95)] == ["class", "rank"]
    assert divide([], 0.95) == []


def test_a_group_has_the_times_of_those_that_have_some() -> None:
    group = group_of("all", OUTCOMES, 0.95)
    assert group.share == 0.6
    assert (group.low, group.high) == pytest.approx((0.2307, 0.8824), abs=1e-4)
    assert group.ttft_ms == pytest.approx([50, 50, 500, 50, 50])
    assert (group.tokens, group.wanted_tokens) == (45, 50)


def test_ends_and_problems_are_counted() -> None:
    assert count_verdicts(OUTCOMES) == {Verdict.MET: 3, Verdict.TTFT: 1, Verdict.FAILED: 1}
    many = [outcome(code="UNIMPLEMENTED", message="slo") for _ in range(3)]
    assert common_problems([*OUTCOMES, *many]) == ["3 x UNIMPLEMENTED: slo", "1 x UNAVAILABLE: gone"]

"""Requests are drawn as the configuration says, and again alike."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest

from segue.bench.slo.arrivals import ArrivalsConfig, Phases
from segue.bench.slo.config import SloClass, WorkloadConfig
from segue.bench.slo.lengths import LengthConfig
from segue.bench.slo.popularity import PopularityConfig
from segue.bench.slo.trace import Trace
from segue.bench.slo.workload import plan_requests, rank_adapters
from segue.config import ConfigError

PHASES = Phases(warmup_seconds=10.0, measured_seconds=80.0, cooldown_seconds=10.0)
SERVER = [(f"adapter{number}", 8 << number % 3) for number in range(20)]
CLASSES = (SloClass(name="tight", ttft_ms=100, share=1.0), SloClass(name="loose", ttft_ms=2000, share=3.0))
BASE = WorkloadConfig(classes=CLASSES, tenants={"a": 10.0, "b": 1.0}, popularity=PopularityConfig(base_share=0.25))
ADAPTERS = rank_adapters(BASE, SERVER)


def test_requests_have_the_shares_that_are_said() -> None:
    requests = plan_requests(BASE, ADAPTERS, 100.0, PHASES)
    count = len(requests)
    assert count == pytest.approx(10_000, rel=0.05)
    assert Counter(each.slo.name for each in requests)["tight"] / count == pytest.approx(0.25, abs=0.02)
    assert Counter(each.tenant for each in requests)["b"] / count == pytest.approx(1 / 11, abs=0.015)
    assert sum(each.adapter is None for each in requests) / count == pytest.approx(0.25, abs=0.02)
    assert sum(each.measured for each in requests) / count == pytest.approx(0.8, abs=0.02)
    assert len({each.prompt_seed for each in requests}) == count
    assert [each.number for each in requests] == list(range(count))


def test_the_same_is_drawn_again_and_other_runs_have_other_prompts() -> None:
    assert plan_requests(BASE, ADAPTERS, 5.0, PHASES) == plan_requests(BASE, ADAPTERS, 5.0, PHASES)
    other = plan_requests(BASE, ADAPTERS, 5.0, PHASES, round_number=1)
    first = plan_requests(BASE, ADAPTERS, 5.0, PHASES)
    assert not {each.prompt_seed for each in first} & {each.prompt_seed for each in other}


def test_what_is_not_changed_is_drawn_alike() -> None:
    longer = dataclasses.replace(BASE, output=LengthConfig(kind="lognormal", mean=100, sigma=1.0))
    for before, after in zip(
        plan_requests(BASE, ADAPTERS, 5.0, PHASES), plan_requests(longer, ADAPTERS, 5.0, PHASES), strict=True
    ):
        assert dataclasses.replace(after, output_tokens=before.output_tokens) == before


def test_deciles_go_with_popularity_and_ranks_in_turn() -> None:
    assert [adapter.decile for adapter in ADAPTERS] == [1 + place // 2 for place in range(20)]
    assert [adapter.rank for adapter in ADAPTERS[:6]] == [8, 16, 32, 8, 16, 32]
    some = rank_adapters(dataclasses.replace(BASE, adapters=3), SERVER)
    assert [adapter.decile for adapter in some] == [1, 4, 7]
    requests = plan_requests(BASE, ADAPTERS, 100.0, PHASES)
    used = Counter(each.adapter.decile for each in requests if each.adapter)
    assert used[1] > used[2] > used[5] > used[10]


def test_lengths_are_cut_to_the_context_and_it_is_said() -> None:
    config = dataclasses.replace(BASE, prompt=LengthConfig(mean=60), output=LengthConfig(mean=50))
    assert {(each.prompt_tokens, each.output_tokens, each.is_cut) for each in plan(config, 110)} == {(60, 50, False)}
    assert {(each.prompt_tokens, each.output_tokens, each.is_cut) for each in plan(config, 100)} == {(50, 50, True)}
    assert {(each.prompt_tokens, each.output_tokens, each.is_cut) for each in plan(config, 20)} == {(1, 19, True)}


def plan(config: WorkloadConfig, context_tokens: int):  # type: ignore[no-untyped-def]
    return plan_requests(config, ADAPTERS, 2.0, PHASES, context_tokens=context_tokens)


def test_a_traces_requests_keep_together() -> None:
    trace = Trace(
        seconds=(0.0, 1.0, 3.0), prompt_tokens=(10, 20, 30), output_tokens=(1, 2, 3), blocks=((1,), (2,), (3,))
    )
    config = WorkloadConfig(
        arrivals=ArrivalsConfig(kind="trace"), prompt=LengthConfig(kind="trace"), output=LengthConfig(kind="trace")
    )
    requests = plan_requests(config, ADAPTERS, 1.0, PHASES, trace=trace)
    assert [each.at_seconds for each in requests[:6]] == pytest.approx([0, 2 / 3, 2, 3, 3 + 2 / 3, 5])
    assert [(each.prompt_tokens, each.output_tokens, each.blocks) for each in requests[2:5]] == [
        (30, 3, (3,)),
        (10, 1, (1,)),
        (20, 2, (2,)),
    ]


def test_a_workload_that_the_server_cannot_have_is_refused() -> None:
    with pytest.raises(ConfigError, match="adapters: the server has 20, not 21"):
        rank_adapters(dataclasses.replace(BASE, adapters=21), SERVER)
    with pytest.raises(ConfigError, match="adapters: the server has none"):
        rank_adapters(BASE, [])
    alone = WorkloadConfig(popularity=PopularityConfig(base_share=1.0))
    assert rank_adapters(alone, []) == []
    assert {each.adapter for each in plan_requests(alone, [], 3.0, PHASES)} == {None}

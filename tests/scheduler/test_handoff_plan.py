"""Plans against all that there are, and against what they must never be worse than."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segue.scheduler.handoff import LayerSource
from segue.scheduler.handoff_plan import HandoffPlan, LayerOutlook, PrefillOutlook, follow, plan_handoff

MICRO = 1e-6
ROUNDING = 1e-12


def outlook(
    landing: Sequence[float | None],
    *,
    base: float = 200 * MICRO,
    cpu: float = math.inf,
    rows: float = 0.0,
    busy: float | None = None,
    harm: float = 0.0,
    in_host: Sequence[bool] | None = None,
) -> PrefillOutlook:
    """Layers of one kind, in host memory."""
    return PrefillOutlook(
        first_layer=0,
        layers=tuple(
            LayerOutlook(
                landing_seconds=seconds,
                in_host=True if in_host is None else in_host[index],
                base_seconds=base,
                cpu_seconds=cpu,
                row_seconds=rows,
            )
            for index, seconds in enumerate(landing)
        ),
        link_busy_seconds=max((s for s in landing if s is not None and s < math.inf), default=0.0)
        if busy is None
        else busy,
        harm_seconds=harm,
    )


def sources(plan: HandoffPlan) -> list[LayerSource]:
    return [layer.source for layer in plan.layers]


@st.composite
def outlooks(draw: st.DrawFn, max_layers: int) -> PrefillOutlook:
    """Layers of a few kinds, some landed, some not expected, not in host memory yet, or without modules."""
    count = draw(st.integers(1, max_layers))
    kinds = draw(st.lists(st.tuples(st.floats(0, 3e-3), st.floats(0, 2e-3)), min_size=1, max_size=2))
    gaps = draw(st.lists(st.floats(0, 3e-3), min_size=count, max_size=count))
    landed = draw(st.integers(0, count))
    ready = draw(st.integers(landed, count))
    never = draw(st.booleans())
    base = draw(st.floats(0, 2e-3))
    helps = draw(st.booleans())
    layers = []
    now = 0.0
    for index in range(count):
        cpu, row = draw(st.sampled_from(kinds))
        now += gaps[index]
        landing: float | None = 0.0 if index < landed else now
        if index >= landed and never:
            landing = math.inf
        if index >= ready:
            landing = None
        layers.append(
            LayerOutlook(
                landing_seconds=landing,
                in_host=index < ready,
                base_seconds=base,
                cpu_seconds=cpu if helps else math.inf,
                row_seconds=row,
            )
        )
    return PrefillOutlook(
        first_layer=draw(st.integers(0, 5)),
        layers=tuple(layers),
        link_busy_seconds=now + draw(st.floats(0, 3e-3)),
        harm_seconds=draw(st.sampled_from((0.0, 1e-4, 2e-3))),
        start_seconds=draw(st.sampled_from((0.0, 1e-3))),
    )


@settings(max_examples=400, deadline=None)
@given(outlooks(max_layers=7))
def test_no_other_choice_of_sources_costs_less(item: PrefillOutlook) -> None:
    best = min(
        follow(item, on_cpu).cost_seconds for on_cpu in itertools.product((False, True), repeat=len(item.known_layers))
    )
    plan = plan_handoff(item)
    assert plan.cost_seconds == pytest.approx(best, rel=1e-9, abs=ROUNDING)
    assert plan.cost_seconds < math.inf


@settings(max_examples=200, deadline=None)
@given(outlooks(max_layers=40))
def test_never_worse_than_one_source_for_all(item: PrefillOutlook) -> None:
    layers = item.known_layers
    plan = plan_handoff(item)
    assert plan.cost_seconds <= follow(item, [False] * len(layers)).cost_seconds + ROUNDING
    assert plan.cost_seconds <= follow(item, [True] * len(layers)).cost_seconds + ROUNDING
    landing = [layer.landing_seconds for layer in layers]
    if landing and all(seconds is not None for seconds in landing):
        whole = max(seconds for seconds in landing if seconds is not None)
        base_seconds = sum(layer.base_seconds for layer in layers)
        assert plan.cost_seconds <= max(whole, item.start_seconds) + base_seconds + ROUNDING


@settings(max_examples=200, deadline=None)
@given(outlooks(max_layers=40))
def test_a_plan_is_what_it_says(item: PrefillOutlook) -> None:
    """Its layers follow one another, start when they may, and are those that something is known of."""
    plan = plan_handoff(item)
    assert len(plan.layers) == len(item.known_layers)
    reach = item.start_seconds
    for index, (layer, planned) in enumerate(zip(item.known_layers, plan.layers, strict=True)):
        assert plan.layer(item.first_layer + index) is planned
        assert planned.reach_seconds == reach
        assert planned.end_seconds >= planned.start_seconds + layer.base_seconds - ROUNDING
        assert (planned.source is LayerSource.WAIT) == (planned.wait_seconds > 0)
        if planned.source is LayerSource.CPU:
            assert layer.in_host
            assert planned.start_seconds == reach
        else:
            assert layer.landing_seconds is not None
            assert planned.start_seconds >= layer.landing_seconds
        reach = planned.end_seconds
    assert plan.layer(item.first_layer + len(plan.layers)) is None
    assert plan.layer(item.first_layer - 1) is None


def test_a_short_wait_is_better_than_slow_help() -> None:
    """The 8B shape on an H200: a layer lands every 60 us and takes 200 to compute, the CPU adds 400."""
    plan = plan_handoff(outlook([60 * MICRO * (layer + 1) for layer in range(32)], cpu=400 * MICRO))
    assert sources(plan) == [LayerSource.WAIT] + [LayerSource.DEVICE] * 31
    assert plan.finish_seconds == pytest.approx(60 * MICRO + 32 * 200 * MICRO)


def test_the_cpu_serves_until_the_link_has_come() -> None:
    """Others' copies come first for 2 ms. A layer takes 300 us with the CPU's help, and then one lands every 150 us."""
    landing = [(2000 + 150 * (layer + 1)) * MICRO for layer in range(32)]
    plan = plan_handoff(outlook(landing, base=200 * MICRO, cpu=100 * MICRO))
    kinds = sources(plan)
    assert 12 <= plan.cpu_layers <= 15
    assert kinds == sorted(kinds, key=lambda kind: kind is not LayerSource.CPU), "the CPU comes first"
    streamed = 2150 * MICRO + 32 * 200 * MICRO
    assert plan.finish_seconds < 0.93 * streamed


def test_rows_on_the_link_can_make_help_useless() -> None:
    """Rows take as long on the link as the weights that they would replace: nothing is gained, and all lands later."""
    landing = [300 * MICRO * (layer + 1) for layer in range(16)]
    helped = plan_handoff(outlook(landing, base=50 * MICRO, cpu=100 * MICRO))
    assert helped.cpu_layers > 0
    loaded = plan_handoff(outlook(landing, base=50 * MICRO, cpu=100 * MICRO, rows=300 * MICRO))
    assert loaded.cpu_layers == 0


def test_harm_to_others_counts() -> None:
    landing = [300 * MICRO * (layer + 1) for layer in range(16)]
    assert plan_handoff(outlook(landing, base=50 * MICRO, cpu=100 * MICRO)).cpu_layers == 16
    plan = plan_handoff(outlook(landing, base=50 * MICRO, cpu=100 * MICRO, harm=400 * MICRO))
    assert plan.cpu_layers == 0
    assert plan.harm_seconds == 0


def test_what_the_device_still_does_hides_a_landing() -> None:
    """The host reaches a layer 500 us before the device does: one that lands meanwhile is not waited for."""
    item = outlook([300 * MICRO] * 2, cpu=50 * MICRO)
    assert sources(plan_handoff(item))[0] is LayerSource.CPU
    assert sources(plan_handoff(replace(item, start_seconds=500 * MICRO))) == [LayerSource.DEVICE] * 2


def test_without_pages_all_is_on_the_cpu() -> None:
    plan = plan_handoff(outlook([math.inf] * 5, cpu=1.0))
    assert sources(plan) == [LayerSource.CPU] * 5


def test_what_a_disk_has_not_brought_is_not_planned() -> None:
    plan = plan_handoff(outlook([0.0, 1e-3, None, None], in_host=[True, True, False, False], cpu=1e-4))
    assert len(plan.layers) == 2
    assert plan.layer(2) is None
    assert plan_handoff(outlook([None], in_host=[False])).layers == ()

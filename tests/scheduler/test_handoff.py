"""Hand-off policies over everything they can see."""

from __future__ import annotations

import itertools

import pytest

from segue.scheduler.handoff import (
    FixedHandover,
    FollowPlan,
    HandoffPolicy,
    LayerSource,
    LayerView,
    LoadFirst,
    StreamLayers,
)

POLICIES: tuple[HandoffPolicy, ...] = (
    FollowPlan(),
    FixedHandover(0),
    FixedHandover(3),
    StreamLayers(),
    LoadFirst(),
)


def views() -> list[LayerView]:
    arrivals = ((False, False), (False, True), (True, False))
    plans = (None, *LayerSource)
    flags = itertools.product(range(6), arrivals, (False, True), (False, True), (0, 2), (False, True), plans)
    return [
        LayerView(
            layer=layer,
            landed=landed or adapter_landed,
            enqueued=enqueued and not adapter_landed,
            adapter_landed=adapter_landed,
            in_host=in_host,
            ready_workers=workers,
            cpu_allowed=allowed,
            planned=planned,
        )
        for layer, (landed, enqueued), adapter_landed, in_host, workers, allowed, planned in flags
    ]


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_a_source_is_chosen_only_where_it_can_serve(policy: HandoffPolicy) -> None:
    for view in views():
        source = policy.choose(view)
        assert source is not LayerSource.DEVICE or view.landed or view.enqueued
        assert source is not LayerSource.CPU or (view.in_host and view.ready_workers and view.cpu_allowed)


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_nothing_waits_for_ever(policy: HandoffPolicy) -> None:
    for view in views():
        if view.adapter_landed:
            assert policy.choose(view) is not LayerSource.WAIT, view


def test_a_plan_is_followed_where_it_can_be() -> None:
    for view in views():
        source = FollowPlan().choose(view)
        if view.landed:
            assert source is LayerSource.DEVICE
        elif view.planned is LayerSource.CPU and view.cpu_possible:
            assert source is LayerSource.CPU
        elif view.planned is not None:
            assert source is (LayerSource.DEVICE if view.enqueued else LayerSource.WAIT)


def test_without_a_plan_nothing_waits_where_something_can_serve() -> None:
    for view in views():
        if view.planned is None:
            waits = FollowPlan().choose(view) is LayerSource.WAIT
            assert waits == (not view.landed and not view.enqueued and not view.cpu_possible)


def test_fixed_handover_keeps_the_cpu_although_the_layer_has_landed() -> None:
    view = LayerView(layer=2, landed=True, enqueued=False, adapter_landed=True, in_host=True, ready_workers=1)
    assert FixedHandover(3).choose(view) is LayerSource.CPU
    assert FixedHandover(2).choose(view) is LayerSource.DEVICE


def test_load_first_waits_for_the_last_layer() -> None:
    view = LayerView(layer=0, landed=True, enqueued=False, adapter_landed=False, in_host=True, ready_workers=1)
    assert LoadFirst().choose(view) is LayerSource.WAIT
    assert StreamLayers().choose(view) is LayerSource.DEVICE

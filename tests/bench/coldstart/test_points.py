from __future__ import annotations

import dataclasses
import itertools
import re

import pytest

from segue.bench.coldstart.points import TABLES, Axes, Mode, Point, beside_decodes, measured_points
from segue.bench.random_checkpoints import Targets
from segue.config import ConfigError
from segue.engine.config import HandoffMode
from segue.types import Tier

POINT = Point(prompt=128, rank=64, targets=Targets.QKVO, adapters=1, tier=Tier.HOST)


def test_the_whole_map_has_2700_points_in_five_modes() -> None:
    points = Axes().points()
    assert len(set(points)) == len(points) == 540
    assert len(points) * len(Mode) == 2700


def test_all_corners_are_measured_and_the_samples_are_others() -> None:
    chosen = measured_points(Axes(), 60, seed=1)
    corners = {
        Point(prompt=prompt, rank=rank, targets=targets, adapters=adapters, tier=tier, link_bytes_per_second=link)
        for prompt, rank, targets, adapters, tier, link in itertools.product(
            (8, 2048), (8, 128), Targets, (1, 32), (Tier.HOST, Tier.DISK), (None, 6e9)
        )
    }
    assert len(corners) == 64
    assert len(set(chosen)) == len(chosen) == 124
    assert corners < set(chosen) < set(Axes().points())


def test_the_points_are_those_of_the_seed_and_in_an_order_of_its_own() -> None:
    chosen = measured_points(Axes(), 60, seed=1)
    assert chosen == measured_points(Axes(), 60, seed=1)
    assert set(chosen) != set(measured_points(Axes(), 60, seed=2))
    # What was measured when the time runs out is no corner more often than by its share.
    corners = set(Axes().corners())
    assert 20 < sum(point in corners for point in chosen[:62]) < 44


def test_axes_of_one_value_have_one_corner() -> None:
    axes = Axes(prompts=(8,), ranks=(4,), targets=(Targets.ALL,), adapters=(2,), tiers=(Tier.DISK,), links=(None,))
    assert axes.corners() == axes.points() == measured_points(axes, 0, seed=0)
    with pytest.raises(ConfigError, match=r"^samples: must be at most 0, the points that are no corners, is 1$"):
        measured_points(axes, 1, seed=0)


def test_each_point_is_followed_by_itself_beside_decodes() -> None:
    busy = dataclasses.replace(POINT, decodes=16)
    assert beside_decodes([POINT], 16) == (POINT, busy)
    assert beside_decodes([POINT], 0) == (POINT,)
    assert str(busy) == "1 adapter of rank 64 on qkvo from host, prompt 128, full link, beside 16 decodes"


def test_the_table_has_the_rows_of_the_issue() -> None:
    rows = [
        (point.adapters, point.rank, point.targets, point.tier, point.prompt, point.decodes)
        for point in TABLES["table-8b"]
    ]
    assert rows == [
        (1, 64, Targets.QKVO, Tier.HOST, 128, 0),
        (1, 64, Targets.QKVO, Tier.DISK, 128, 0),
        (1, 64, Targets.ALL, Tier.HOST, 128, 0),
        (1, 64, Targets.ALL, Tier.DISK, 128, 0),
        (32, 64, Targets.QKVO, Tier.HOST, 32, 0),
        (1, 64, Targets.QKVO, Tier.DISK, 128, 16),
    ]


def test_a_mode_names_the_engines_own() -> None:
    assert {mode: mode.handoff(32).mode for mode in Mode if mode is not Mode.WARM} == {
        Mode.LOAD_FIRST: HandoffMode.LOAD_FIRST.value,
        Mode.STREAM: HandoffMode.STREAM.value,
        Mode.CPU: HandoffMode.FIXED.value,
        Mode.PLANNER: HandoffMode.AUTO.value,
    }
    assert Mode.CPU.handoff(32).cpu_layers == 32


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"prompt": 0}, "prompt: must be at least 1, is 0"),
        ({"rank": 0}, "rank: must be at least 1, is 0"),
        ({"adapters": 0}, "adapters: must be at least 1, is 0"),
        ({"tier": Tier.DEVICE}, "tier: must be host or disk, is 'device'"),
        ({"link_bytes_per_second": 0.0}, "link: must be greater than 0, is 0.0"),
        ({"decodes": -1}, "decodes: must not be negative, is -1"),
    ],
)
def test_a_point_that_cannot_be_is_refused(change: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(problem)}$"):
        dataclasses.replace(POINT, **change)  # type: ignore[arg-type]


def test_axes_name_each_value_once() -> None:
    with pytest.raises(ConfigError, match=r"^ranks: names a value twice$"):
        Axes(ranks=(8, 8))
    with pytest.raises(ConfigError, match=r"^links: must name at least one value$"):
        Axes(links=())

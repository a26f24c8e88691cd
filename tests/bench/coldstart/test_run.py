from __future__ import annotations

import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

import pytest

from segue.bench.coldstart.config import ColdstartConfig, prepared
from segue.bench.coldstart.measure import PointFailedError, Sample, Stage
from segue.bench.coldstart.points import COLD_MODES, Mode, Point
from segue.bench.coldstart.run import measure_points, run_coldstart_bench
from segue.bench.coldstart.statistics import balanced_orders
from segue.bench.coldstart.view import lines, point_views
from segue.bench.driver import BenchmarkError, EngineDriver
from segue.bench.random_checkpoints import Targets
from segue.config import ConfigError
from segue.types import Tier

ONE = Point(prompt=20, rank=4, targets=Targets.QKVO, adapters=1, tier=Tier.HOST)
DISK = Point(prompt=12, rank=4, targets=Targets.ALL, adapters=3, tier=Tier.DISK, link_bytes_per_second=2e8)
BUSY = dataclasses.replace(ONE, tier=Tier.DISK, decodes=2)
CONFIG = ColdstartConfig(points=(ONE, DISK, BUSY), shape="tiny", runs=2)


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with prepared(CONFIG, lambda _: None) as ready, EngineDriver(ready.engine, ready.catalog) as driver:
        driver.wait_until_settled(1, 120)
        versions = {name: driver.open(name) for name in ready.sizes}
        sizes = {name: size.weight_bytes for name, size in ready.sizes.items()}
        yield Stage(driver, versions, CONFIG.decode_names, weight_bytes=sizes, layers=4, vocab_size=1024, seed=0)


@pytest.mark.parametrize("point", CONFIG.points, ids=str)
def test_a_point_is_measured_in_every_mode_and_order(stage: Stage, point: Point) -> None:
    """Each mode after each other: none may leave the adapters where the next does not want them."""
    stage.begin(point)
    for mode in (*Mode, *reversed(Mode), Mode.CPU, Mode.WARM, Mode.PLANNER):
        sample = stage.measure(point, mode)
        assert sample.ttft_seconds > 0
        if mode is not Mode.PLANNER:
            assert (sample.cpu_share > 0) is (mode is Mode.CPU)
        assert (sample.longest_step_seconds is None) is (point.decodes == 0)
        if sample.longest_step_seconds is not None and sample.usual_step_seconds is not None:
            assert sample.longest_step_seconds > 0
            assert sample.usual_step_seconds > 0


def test_an_adapter_that_is_not_where_it_should_be_fails_the_point(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing moves it: it stays where the measurement before left it."""
    stage.begin(ONE)
    stage.measure(ONE, Mode.WARM)
    monkeypatch.setattr(EngineDriver, "move", lambda *_: None)
    with pytest.raises(PointFailedError, match="an adapter was at device before its request, not at host"):
        stage.measure(ONE, Mode.STREAM)


def test_a_request_that_took_another_way_fails_the_point(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.begin(ONE)
    monkeypatch.setattr(EngineDriver, "set_handoff", lambda *_: None)
    driver = stage._driver
    driver._instance.set_handoff(Mode.CPU.handoff(4))
    with pytest.raises(PointFailedError, match="load first: the CPU computed 4 layers"):
        stage.measure(ONE, Mode.LOAD_FIRST)
    driver._instance.set_handoff(Mode.STREAM.handoff(4))
    with pytest.raises(PointFailedError, match="cpu: the CPU computed 0 of 4 layers"):
        stage.measure(ONE, Mode.CPU)


def test_a_throttled_link_takes_its_time(stage: Stage) -> None:
    """The bytes of three adapters over the link are a floor: 4 layers x 7 projections of rank 4, in float32."""
    widths = (256 + 256) + 2 * (256 + 128) + (256 + 256) + 2 * (256 + 704) + (704 + 256)
    last_seconds = 3 * 4 * 4 * 4 * widths / 2e6
    slow = dataclasses.replace(DISK, link_bytes_per_second=2e6)
    stage.begin(slow)
    for mode in (Mode.LOAD_FIRST, Mode.STREAM):
        # The three land one after the other, so the mean is at least two thirds of the last.
        assert stage.measure(slow, mode).ttft_seconds >= 2 / 3 * last_seconds


def test_a_report_has_timings_and_ratios_for_each_point() -> None:
    report = run_coldstart_bench(CONFIG, lambda _: None)
    assert (report.benchmark, report.settings["failed_points"], report.settings["left_out_points"]) == (
        "coldstart",
        {},
        0,
    )
    views = point_views(report)
    assert [view.point for view in views] == [ONE, DISK, BUSY]
    for view in views:
        timed = {mode for measure, mode in view.rows if measure == "ttft_ms"}
        assert {Mode.WARM, Mode.PLANNER} <= timed
        over = {mode for measure, mode in view.rows if measure == "ttft_over_warm_ratio"}
        assert over == timed - {Mode.WARM}
        best = view.rows["planner_over_best_ratio", Mode.PLANNER]
        rivals = [view.median("ttft_ms", mode) or 0.0 for mode in COLD_MODES if mode in timed - {Mode.PLANNER}]
        assert best.median == pytest.approx((view.median("ttft_ms", Mode.PLANNER) or 0.0) / min(rivals))
        assert best.lower_bound is not None
        assert best.upper_bound is not None
        assert best.lower_bound <= best.median <= best.upper_bound
        steps = {mode for measure, mode in view.rows if measure == "longest_step_ms"}
        assert steps == (timed if view.point.decodes else set())
        # BUSY stands beside no measurement of its newcomer alone.
        assert not [measure for measure, _ in view.rows if measure == "longest_step_over_bound_ratio"]
    ttft = views[0].rows["ttft_ms", Mode.STREAM]
    assert (ttft.runs, len(ttft.timings or ()), ttft.residency) == (2, 2, "host")
    assert len(lines(report)) == 3


def test_the_longest_step_is_compared_with_a_usual_one_and_the_newcomers_warm_prefill() -> None:
    alone = dataclasses.replace(BUSY, decodes=0)
    report = run_coldstart_bench(dataclasses.replace(CONFIG, points=(BUSY, alone), runs=1), lambda _: None)
    busy, idle = point_views(report)
    for mode in COLD_MODES:
        longest, usual = (busy.median(measure, mode) for measure in ("longest_step_ms", "usual_step_ms"))
        if longest is None or usual is None:
            continue
        bound = usual + (idle.median("ttft_ms", Mode.WARM) or 0.0)
        assert busy.median("longest_step_over_bound_ratio", mode) == pytest.approx(longest / bound)
    assert busy.median("longest_step_over_bound_ratio", Mode.PLANNER) is not None


class FakeStage:
    """Every measurement takes a second of a clock. ``slow`` modes say so many seconds the first times and then 1."""

    def __init__(self, slow: Mapping[Mode, Sequence[float]] = MappingProxyType({}), failing: Point | None = None):
        self.now = 0.0
        self.read_bytes_per_second = 1.0
        self.measured: list[tuple[Point, Mode]] = []
        self._slow = {mode: list(seconds) for mode, seconds in slow.items()}
        self._failing = failing

    def begin(self, point: Point) -> None:
        if point == self._failing:
            raise PointFailedError("it was not cold")

    def measure(self, point: Point, mode: Mode) -> Sample:
        self.measured.append((point, mode))
        self.now += 1.0
        seconds = self._slow.get(mode)
        return Sample(ttft_seconds=seconds.pop(0) if seconds else 1.0, cpu_share=0.0)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6])
def test_orders_are_balanced(count: int) -> None:
    """Places, and who comes behind whom."""
    orders = balanced_orders(count)
    assert all(sorted(order) == list(range(count)) for order in orders)
    for place in range(count):
        assert len(set(Counter(order[place] for order in orders).values())) == 1
    behind = Counter(pair for order in orders for pair in itertools.pairwise(order))
    assert len(behind) == count * (count - 1)
    assert len(set(behind.values())) <= 1


def test_each_mode_takes_each_place_in_the_rounds() -> None:
    stage = FakeStage()
    config = dataclasses.replace(CONFIG, points=(ONE,), runs=5)
    measure_points(config, stage, lambda _: None)  # type: ignore[arg-type]
    modes = [mode for _, mode in stage.measured]
    rounds = [modes[start : start + 5] for start in range(5, 30, 5)]
    for place in range(5):
        assert {each[place] for each in rounds} == set(Mode)


def test_a_mode_far_from_the_best_is_given_up_unless_it_was_so_once() -> None:
    """As where a kernel is compiled when it is first needed."""
    stage = FakeStage(slow={Mode.CPU: [9.0, 9.0], Mode.STREAM: [9.0]})
    outcome = measure_points(dataclasses.replace(CONFIG, points=(ONE,)), stage, lambda _: None)  # type: ignore[arg-type]
    (item,) = outcome.measured
    assert item.slow == (Mode.CPU,)
    assert {mode: len(samples) for mode, samples in item.samples.items()} == dict.fromkeys(set(Mode) - {Mode.CPU}, 2)


def test_a_point_that_fails_is_told_and_the_others_are_measured() -> None:
    stage = FakeStage(failing=DISK)
    outcome = measure_points(CONFIG, stage, lambda _: None)  # type: ignore[arg-type]
    assert outcome.failed == {str(DISK): "it was not cold"}
    assert [item.point for item in outcome.measured] == [ONE, BUSY]


def test_points_for_which_there_is_no_time_are_counted() -> None:
    stage = FakeStage()
    # A point takes three rounds of five measurements; the second has no time for its last round.
    config = dataclasses.replace(CONFIG, seconds=24.0)
    outcome = measure_points(config, stage, lambda _: None, clock=lambda: stage.now)  # type: ignore[arg-type]
    assert ([item.point for item in outcome.measured], outcome.left_out) == ([ONE], 2)
    with pytest.raises(BenchmarkError, match="seconds: 1e-09 were over before the first point was measured"):
        run_coldstart_bench(dataclasses.replace(CONFIG, seconds=1e-9), lambda _: None)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"shape": "huge"}, "shape: must be one of tiny, small, medium, llama-2-7b, llama-3.1-8b, is 'huge'"),
        ({"model_dir": "m"}, "shape: is 'tiny', but the model is the one in model_dir"),
        ({"points": ()}, "points: there must be at least one"),
        ({"runs": 0}, "runs: must be greater than 0, is 0"),
        ({"seconds": 0.0}, "seconds: must be greater than 0, is 0.0"),
        ({"cpu_workers": 0}, "cpu_workers: must be greater than 0, is 0"),
        ({"dtype": "int8"}, "dtype: must be one of float32, bfloat16, float16, is 'int8'"),
    ],
)
def test_what_cannot_be_measured_is_named(options: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(problem)}$"):
        dataclasses.replace(CONFIG, **options)  # type: ignore[arg-type]

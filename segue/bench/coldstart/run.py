"""Measure points one after the other, each in rounds through all modes, and report them."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from segue.bench.coldstart.config import ColdstartConfig, Prepared, away_from, prepared
from segue.bench.coldstart.measure import PointFailedError, Sample, Stage
from segue.bench.coldstart.points import COLD_MODES, RIVALS, Mode, Point
from segue.bench.coldstart.predict import Predictor, relative_errors
from segue.bench.coldstart.statistics import balanced_orders, ratio_over_best
from segue.bench.coldstart.view import (
    LONGEST_STEP,
    OVER_BEST,
    OVER_WARM,
    STEP_OVER_BOUND,
    TTFT,
    USUAL_STEP,
    point_views,
)
from segue.bench.driver import BenchmarkError, EngineDriver
from segue.bench.prepare import DTYPES
from segue.bench.report import Percentiles, Report, Row
from segue.scheduler.cost_model import CostProfile

GIVE_UP_FACTOR, GIVE_UP_SECONDS = 8.0, 1.0
"""A mode that takes longer than this, and so many times the fastest cold mode's time, in both of two measurements that
are not kept is not measured at that point. It cannot be the best, and would take most of a run's time at a few points.
"""
_READY_SECONDS = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """The samples of a point by mode, one for each round; ``slow`` modes were given up."""

    point: Point
    samples: Mapping[Mode, Sequence[Sample]]
    slow: tuple[Mode, ...] = ()

    def ttft_seconds(self, mode: Mode) -> list[float]:
        """One for each round; none of a mode that was given up."""
        return [sample.ttft_seconds for sample in self.samples.get(mode, ())]


@dataclass(slots=True, kw_only=True)
class Outcome:
    """``failed`` are the points that could not be measured, each with the reason; ``left_out`` counts those for which
    there was no time. ``reads`` are in bytes per second."""

    measured: list[Measured] = field(default_factory=list)
    reads: list[float] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    left_out: int = 0

    @property
    def read_bytes_per_second(self) -> float | None:
        """At which adapters came from disk, the page cache warm; None where none did."""
        return statistics.median(self.reads) if self.reads else None


def run_coldstart_bench(config: ColdstartConfig, progress: Callable[[str], None]) -> Report:
    """Measure; ``progress`` is told in one line what is done next.

    Raises ConfigError, ModelError or OSError for a model that cannot be measured, and BenchmarkError.
    """
    with prepared(config, progress) as ready:
        progress("starting the engine")
        with away_from(ready.engine.cpu_cores), EngineDriver(ready.engine, ready.catalog) as driver:
            driver.wait_until_settled(config.cpu_workers, _READY_SECONDS)
            versions = {name: driver.open(name) for name in ready.sizes}
            stage = Stage(
                driver,
                versions,
                config.decode_names,
                weight_bytes={name: size.weight_bytes for name, size in ready.sizes.items()},
                layers=ready.model.layers,
                vocab_size=ready.model.vocab_size,
                seed=config.seed,
            )
            outcome = measure_points(config, stage, progress)
    if not outcome.measured and not outcome.failed:
        raise BenchmarkError(f"seconds: {config.seconds:g} were over before the first point was measured")
    return _report(config, ready, outcome)


def measure_points(
    config: ColdstartConfig,
    stage: Stage,
    progress: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
) -> Outcome:
    """All points in their order, as far as the time goes by ``clock``."""
    deadline_seconds = clock() + config.seconds
    outcome = Outcome()
    for number, point in enumerate(config.points, start=1):
        progress(f"point {number} of {len(config.points)}: {point}")
        try:
            measured = _measure_point(config, stage, point, lambda: clock() > deadline_seconds)
            outcome.reads.append(stage.read_bytes_per_second)
        except PointFailedError as error:
            outcome.failed[str(point)] = str(error)
            continue
        if measured is None:
            outcome.left_out = len(config.points) - number + 1
            break
        outcome.measured.append(measured)
    return outcome


def _measure_point(config: ColdstartConfig, stage: Stage, point: Point, is_over: Callable[[], bool]) -> Measured | None:
    """None when there was no time for all rounds. Raises PointFailedError and BenchmarkError."""
    if is_over():
        return None
    stage.begin(point)
    first = {mode: stage.measure(point, mode) for mode in Mode}
    bound_seconds = max(GIVE_UP_SECONDS, GIVE_UP_FACTOR * min(first[mode].ttft_seconds for mode in COLD_MODES))
    slow = tuple(
        mode
        for mode in RIVALS
        if first[mode].ttft_seconds > bound_seconds and stage.measure(point, mode).ttft_seconds > bound_seconds
    )
    modes = [mode for mode in Mode if mode not in slow]
    samples: dict[Mode, list[Sample]] = {mode: [] for mode in modes}
    orders = balanced_orders(len(modes))
    for repeat in range(config.runs):
        if is_over():
            return None
        for place in orders[repeat % len(orders)]:
            samples[modes[place]].append(stage.measure(point, modes[place]))
    return Measured(point=point, samples=samples, slow=slow)


def _report(config: ColdstartConfig, ready: Prepared, outcome: Outcome) -> Report:
    settings = {item.name: getattr(config, item.name) for item in dataclasses.fields(config)}
    del settings["map_points"]
    settings["points"] = len(config.points)
    settings["failed_points"] = outcome.failed
    settings["left_out_points"] = outcome.left_out
    settings["layers"] = ready.model.layers
    settings["read_bytes_per_second"] = outcome.read_bytes_per_second
    # What the newcomer's own prefill takes when warm and alone, where that was measured.
    alone = {item.point: item.ttft_seconds(Mode.WARM) for item in outcome.measured if item.point.decodes == 0}
    rows = []
    for item in outcome.measured:
        rows += [*_timed_rows(item), *_ratio_rows(item, config.seed)]
        warm = alone.get(dataclasses.replace(item.point, decodes=0))
        if warm is not None:
            rows += _step_ratio_rows(item, warm, config.seed)
    report = Report.here("coldstart", settings, rows)
    if config.profile is None or outcome.read_bytes_per_second is None:
        return report
    return _with_predictions(report, config, _predictor(config.profile, config, ready, outcome.read_bytes_per_second))


def _predictor(
    profile: CostProfile, config: ColdstartConfig, ready: Prepared, read_bytes_per_second: float
) -> Predictor:
    return Predictor(
        profile=profile,
        shapes=dict(ready.model.projection_shapes()),
        item_bytes=DTYPES[config.dtype].itemsize,
        cores=config.cpu_workers,
        budget_tokens=ready.engine.budget_tokens,
        read_bytes_per_second=read_bytes_per_second,
    )


def _with_predictions(report: Report, config: ColdstartConfig, predictor: Predictor) -> Report:
    """With a row for each mode of the map's points that were not measured, and how far off such rows are."""
    views = point_views(report)
    measured = {view.point for view in views}
    rows = [
        _row(point, TTFT, mode, predicted=True, median=value, p10=value, p90=value, runs=0)
        for point in config.map_points
        if point not in measured
        for mode in Mode
        for value in (1e3 * predictor.ttft_seconds(point, mode),)
    ]
    errors = relative_errors(views, predictor.ttft_seconds)
    settings = {**report.settings, "prediction_relative_errors": errors}
    return dataclasses.replace(report, settings=settings, rows=(*report.rows, *rows))


def _timed_rows(item: Measured) -> list[Row]:
    rows = []
    for mode, samples in item.samples.items():
        share = sum(sample.cpu_share for sample in samples) / len(samples)
        rows.append(point_row(item.point, TTFT, [1e3 * sample.ttft_seconds for sample in samples], mode, share))
        for measure, values in (
            (LONGEST_STEP, [sample.longest_step_seconds for sample in samples]),
            (USUAL_STEP, [sample.usual_step_seconds for sample in samples]),
        ):
            found = [1e3 * value for value in values if value is not None]
            if found:
                rows.append(point_row(item.point, measure, found, mode, share))
    return rows


def _ratio_rows(item: Measured, seed: int) -> list[Row]:
    """Of the time to the first token: planner over the best rival, and each cold mode over warm."""
    planner = item.ttft_seconds(Mode.PLANNER)
    rivals = [item.ttft_seconds(mode) for mode in RIVALS if mode in item.samples]
    rows = [ratio_row(item.point, OVER_BEST, planner, rivals, Mode.PLANNER, seed)] if rivals else []
    for mode in COLD_MODES:
        if mode in item.samples:
            warm = item.ttft_seconds(Mode.WARM)
            rows.append(ratio_row(item.point, OVER_WARM, item.ttft_seconds(mode), [warm], mode, seed))
    return rows


def _step_ratio_rows(item: Measured, warm_alone: Sequence[float], seed: int) -> list[Row]:
    """The longest step over what a usual step and the newcomer's own warm prefill take together; none without others
    that decode."""
    prefill_seconds = statistics.median(warm_alone)
    rows = []
    for mode, samples in item.samples.items():
        longest = [value for sample in samples if (value := sample.longest_step_seconds) is not None]
        bounds = [prefill_seconds + usual for sample in samples if (usual := sample.usual_step_seconds) is not None]
        if longest and len(longest) == len(bounds):
            rows.append(ratio_row(item.point, STEP_OVER_BOUND, longest, [bounds], mode, seed))
    return rows


def point_row(point: Point, measure: str, timings: Sequence[float], mode: Mode, cpu_share: float | None) -> Row:
    """``timings`` are in the measure's unit."""
    percentiles = Percentiles.of(timings)
    return _row(point, measure, mode, cpu_share=cpu_share, timings=tuple(timings), **dataclasses.asdict(percentiles))


def ratio_row(
    point: Point, measure: str, own: Sequence[float], rivals: Sequence[Sequence[float]], mode: Mode, seed: int
) -> Row:
    """The ratio of medians with its one-sided bounds of 95%."""
    ratio = ratio_over_best(own, rivals, seed)
    return _row(
        point,
        measure,
        mode,
        median=ratio.value,
        p10=ratio.p10,
        p90=ratio.p90,
        lower_bound=ratio.lower,
        upper_bound=ratio.upper,
        runs=len(own),
    )


def _row(point: Point, measure: str, mode: Mode, **values: object) -> Row:
    return Row(
        measure=measure,
        batch=point.adapters,
        adapters=point.adapters,
        ranks=(point.rank,),
        targets=point.targets.value,
        prompt=point.prompt,
        residency=point.tier.value,
        mode=mode.value,
        link_bytes_per_second=point.link_bytes_per_second,
        decodes=point.decodes,
        **values,  # type: ignore[arg-type]
    )

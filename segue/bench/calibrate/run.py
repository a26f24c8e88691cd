"""A calibration from beginning to end."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segue.bench.calibrate.cases import CalibrationCase, calibration_cases
from segue.bench.calibrate.config import CalibrateConfig
from segue.bench.calibrate.fitting import (
    CopyTiming,
    DeltaTiming,
    Judgement,
    Padding,
    fit_copies,
    fit_deltas,
    fit_steps,
    judge_steps,
)
from segue.bench.calibrate.links import copy_timings, handover_timings, job_timings
from segue.bench.calibrate.rows import report_rows
from segue.bench.calibrate.steps import MeasuredStep, StepMeasurer
from segue.bench.cases import Mix
from segue.bench.driver import BenchmarkError, EngineDriver
from segue.bench.engine import EngineBench, EngineBenchConfig, Prepared, prepared
from segue.bench.machine import Machine
from segue.bench.random_checkpoints import Targets
from segue.bench.report import Report
from segue.engine.config import EngineConfig, HandoffConfig, HandoffMode
from segue.engine.cuda.batch_shapes import batch_shapes
from segue.engine.cuda.reserve import max_rows
from segue.engine.models.config import ModelConfig
from segue.scheduler.cost_model import CostProfile
from segue.scheduler.plan import pages_for

# Of the seconds: what jobs of the CPU workers alone may take; of what is left then, what warming up may take; what is
# left at least when the engine has started; and what is kept for the fit.
_JOBS_SHARE = 0.2
_WARM_UP_SHARE = 0.6
_MEASURING_SHARE = 0.7
_FIT_SECONDS = 2.0
_CPU_SLOTS = 4
_LEAST_SHARE = 0.5
_WARM_UP_CASES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """The profile and its report. ``rounds`` through all cases were made, the last one perhaps not to its end."""

    profile: CostProfile
    judgement: Judgement
    report: Report
    rounds: float


def run_calibration(config: CalibrateConfig, progress: Callable[[str], None]) -> Calibration:
    """Measure, fit and judge; ``progress`` is told in one line what is done next.

    Raises ConfigError, ModelError or OSError for a model that cannot be measured, and BenchmarkError.
    """
    start_seconds = time.monotonic()
    deadline_seconds = start_seconds + config.seconds - _FIT_SECONDS
    cases = calibration_cases(config)
    bench_config = EngineBenchConfig(
        cases=tuple(case.case for case in cases),
        shape=config.shape,
        model_dir=config.model_dir,
        dtype=config.dtype,
        device=config.device,
        steps=config.steps + 8,
        torch_threads=config.torch_threads,
    )
    with prepared(bench_config, progress) as ready:
        deltas = _jobs(config, ready.model, start_seconds + _JOBS_SHARE * config.seconds, progress)
        progress("starting the engine")
        engine = _engine(config, ready)
        with EngineDriver(engine, ready.catalog) as driver:
            started_seconds = time.monotonic()
            progress(f"loading {len(ready.names)} adapters")
            versions = {name: driver.load(name) for name in ready.names}
            single = _one_of_each_rank(config, versions)
            progress("copies")
            copies = copy_timings(driver, single)
            deltas += _handovers(config, ready, driver, single, progress)
            bench = EngineBench(bench_config, driver, versions, None, ready.model.vocab_size)
            measurer = StepMeasurer(driver, bench, config.steps)
            # What had to be compiled first is not the measurement's to pay for.
            deadline_seconds = max(deadline_seconds, started_seconds + _MEASURING_SHARE * config.seconds)
            rounds = _rounds(config, measurer, deadline_seconds, progress)
    progress("fitting")
    return _fitted(config, ready.model, measurer.measured, copies, deltas, rounds, padding_of(engine))


def _engine(config: CalibrateConfig, ready: Prepared) -> EngineConfig:
    """The benchmark's, with CPU workers that every cold prompt is handed to, and room for one that rides."""
    engine = ready.engine
    assert engine.pages is not None
    assert engine.max_context_tokens is not None
    return dataclasses.replace(
        engine,
        max_running=engine.max_running + 1,
        pages=engine.pages + pages_for(engine.max_context_tokens, engine.page_tokens) + 1,
        cpu_workers=config.cpu_workers,
        cpu_slots=_CPU_SLOTS,
        handoff=HandoffConfig(mode=HandoffMode.FIXED.value, cpu_layers=ready.model.layers),
    )


def padding_of(engine: EngineConfig) -> Padding:
    """Batches on CUDA are graphs, which come in sizes."""
    if engine.device != "cuda":
        return Padding()
    shapes = batch_shapes(max_rows(engine), engine.max_running)
    return Padding(
        decodes=tuple(shape.rows for shape in shapes if shape.decodes),
        prompts=tuple(shape.rows for shape in shapes if not shape.decodes),
    )


def _one_of_each_rank(config: CalibrateConfig, versions: Mapping[str, int]) -> list[int]:
    names = [Mix(1, (rank,), Targets(config.targets)).adapter_names[0] for rank in config.ranks]
    return [versions[name] for name in names if name in versions]


def _jobs(
    config: CalibrateConfig, model: ModelConfig, deadline_seconds: float, progress: Callable[[str], None]
) -> list[DeltaTiming]:
    if not config.cpu_workers:
        return []
    return job_timings(
        model,
        targets=Targets(config.targets),
        dtype=config.dtype,
        ranks=config.ranks,
        tokens=config.cpu_tokens,
        cores=config.cores,
        deadline_seconds=deadline_seconds,
        progress=progress,
    )


def _handovers(
    config: CalibrateConfig,
    ready: Prepared,
    driver: EngineDriver,
    versions: Sequence[int],
    progress: Callable[[str], None],
) -> list[DeltaTiming]:
    if not config.cpu_workers:
        return []
    progress("prompts handed over to the CPU workers")
    return handover_timings(
        driver,
        # The smallest and the largest rank.
        [versions[0], versions[-1]],
        config.cpu_tokens,
        layers=ready.model.layers,
        vocab_size=ready.model.vocab_size,
        cores=config.cpu_workers,
    )


def _rounds(
    config: CalibrateConfig, measurer: StepMeasurer, deadline_seconds: float, progress: Callable[[str], None]
) -> float:
    """Rounds through all cases until the deadline, behind one that is not kept; how many were made.

    Cases that could not be warmed up in time are left out; those that were are some of each kind. Raises BenchmarkError
    where they are less than half, or the deadline came before half of the first round.
    """
    cases = _warmed_up(config, measurer, deadline_seconds, progress)
    for turn in range(config.rounds):
        for number, case in enumerate(cases):
            progress(f"round {turn + 1} of {config.rounds}, case {number + 1} of {len(cases)}")
            if time.monotonic() > deadline_seconds:
                rounds = turn + number / len(cases)
                if rounds < _LEAST_SHARE:
                    raise BenchmarkError(f"seconds: {config.seconds:g} were over before half of the first round")
                return rounds
            measurer.run(case, keep=True)
    return float(config.rounds)


def _warmed_up(
    config: CalibrateConfig, measurer: StepMeasurer, deadline_seconds: float, progress: Callable[[str], None]
) -> Sequence[CalibrationCase]:
    """The cases that have run once. On CUDA each is recorded when it first runs; else it is enough that some have."""
    cases = calibration_cases(config)
    start_seconds = time.monotonic()
    until_seconds = start_seconds + _WARM_UP_SHARE * (deadline_seconds - start_seconds)
    unready = cases if config.device == "cuda" else cases[:_WARM_UP_CASES]
    for number, case in enumerate(unready):
        if time.monotonic() > until_seconds:
            if number < _LEAST_SHARE * len(unready):
                warmed = f"{number} of {len(unready)} cases"
                raise BenchmarkError(f"seconds: of {config.seconds:g} too few were left after warming up {warmed}")
            return cases[:number]
        progress(f"warming up, case {number + 1} of {len(unready)}")
        measurer.run(case, keep=False)
    return cases


def _fitted(
    config: CalibrateConfig,
    model: ModelConfig,
    steps: Sequence[MeasuredStep],
    copies: Sequence[CopyTiming],
    deltas: Sequence[DeltaTiming],
    rounds: float,
    padding: Padding,
) -> Calibration:
    decode, prefill = fit_steps(steps, padding)
    machine = Machine.here()
    profile = CostProfile(
        name=f"{config.shape or Path(str(config.model_dir)).name}, {config.dtype}, {machine.gpu or machine.cpu}",
        layers=model.layers,
        decode=decode,
        prefill=prefill,
        copy=fit_copies(copies),
        cpu=fit_deltas(deltas),
    )
    judgement = judge_steps(profile, steps)
    settings: dict[str, Any] = dataclasses.asdict(config)
    settings |= {
        "rounds_made": rounds,
        "steps_measured": len(steps),
        "judgement": as_settings(judgement),
        "profile": dataclasses.asdict(profile),
    }
    report = Report.here("calibrate", settings, report_rows(profile, steps, copies, deltas))
    return Calibration(profile=profile, judgement=judgement, report=report, rounds=rounds)


def as_settings(judgement: Judgement) -> dict[str, Any]:
    """As it stands in a report: qualities by name, those of fixed batches by "batch x context"."""
    named = {
        "decode": judgement.decode,
        **{f"decode, batch {batch}, context {context}": found for (batch, context), found in judgement.fixed.items()},
        "prompts": judgement.prompts,
        "prompts that ride": judgement.riding,
        "all": judgement.overall,
    }
    return {name: dataclasses.asdict(found) for name, found in named.items() if found is not None}

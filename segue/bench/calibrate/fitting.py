"""From measured steps, copies and CPU deltas to a profile, and how well that predicts what it was not fitted to."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

from segue.bench.calibrate.steps import MeasuredStep
from segue.bench.driver import BenchmarkError
from segue.scheduler.cost_fit import (
    FitQuality,
    StepObservation,
    fit_step,
    nonnegative_least_squares,
    quality_of,
)
from segue.scheduler.cost_model import CopyCoefficients, CostProfile, CpuCoefficients, LoraForm, StepCoefficients

_MOST_BENDS = 7
_LEAST_ROWS = 3
# R squared of fewer points says nothing.
_LEAST_POINTS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyTiming:
    """A copy of an adapter with so many bytes, from host memory to landed."""

    copy_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaTiming:
    """One layer's deltas in shares of ``cores`` workers.

    ``handed_over``: seconds that they add to a layer of the engine, rows there and back; else seconds from the jobs'
    signals to their replies.
    """

    tokens: int
    rank: int
    cores: int
    seconds: float
    handed_over: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """How well the profile predicts the steps that were held out, by kind; None without any.

    ``fixed`` has the decode steps at one batch and context each, where only the adapters vary.
    """

    decode: FitQuality | None
    fixed: dict[tuple[int, int], FitQuality]
    prompts: FitQuality | None
    riding: FitQuality | None
    overall: FitQuality | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Padding:
    """To how many rows the device pads batches that only decode, and those with rows of prompts. Empty: not at all."""

    decodes: tuple[int, ...] = ()
    prompts: tuple[int, ...] = ()


NO_PADDING = Padding()


def fit_steps(
    steps: Sequence[MeasuredStep], padding: Padding = NO_PADDING
) -> tuple[StepCoefficients, StepCoefficients]:
    """Coefficients of decodes and of prompts, from the steps that are not held out.

    Raises BenchmarkError for too few.
    """
    seen = [step for step in steps if not step.case.held_out]
    decodes = [StepObservation(item.decodes, item.median_seconds) for item in seen if item.decodes_alone]
    prompts = [StepObservation(item.prompts, item.median_seconds) for item in seen if item.prompts_alone]
    try:
        return _fit_step(decodes, padding.decodes), _fit_step(prompts, padding.prompts)
    except ValueError as error:
        raise BenchmarkError(f"too little was measured: {error}; give it more seconds") from error


def _fit_step(observations: Sequence[StepObservation], padded_tokens: tuple[int, ...]) -> StepCoefficients:
    rows = StepCoefficients(padded_tokens=padded_tokens)
    where = bends([rows.padded(item.load.tokens) for item in observations])
    return fit_step(observations, LoraForm.PRESENT_BYTES, where, padded_tokens)


def bends(tokens: Sequence[int]) -> tuple[int, ...]:
    """Where a fit may bend: of the numbers of rows that were measured, so many, evenly by their logarithms.

    Empty where there are too few: then the line is straight.
    """
    known = sorted(set(tokens))
    if len(known) < _LEAST_ROWS:
        return ()
    wanted = np.geomspace(known[0], known[-1], _MOST_BENDS)
    return tuple(sorted({min(known, key=lambda rows: abs(math.log(rows / want))) for want in wanted}))


def fit_copies(timings: Sequence[CopyTiming]) -> CopyCoefficients:
    """The fixed part and the rate, by relative errors."""
    columns = np.array([[1.0, item.copy_bytes] for item in timings])
    fixed, per_byte = _fit(columns, [item.seconds for item in timings])
    return CopyCoefficients(fixed_seconds=fixed, seconds_per_byte=per_byte)


def fit_jobs(timings: Sequence[DeltaTiming]) -> CpuCoefficients | None:
    """What the workers take, from a job's signal to its last share. None without timings."""
    jobs = [item for item in timings if not item.handed_over]
    if not jobs:
        return None
    # Rows' ways are those of the hand-over.
    names = [item.name for item in fields(CpuCoefficients) if item.name != "seconds_per_token"]
    if len({item.cores for item in jobs}) == 1:
        # What a worker costs cannot be told from the rest.
        names.remove("seconds_per_worker")
    units = [CpuCoefficients(**{name: 1.0}) for name in names]
    columns = [[unit.on_workers(item.tokens, item.rank, item.cores) for unit in units] for item in jobs]
    found = _fit(np.array(columns), [item.seconds for item in jobs])
    return CpuCoefficients(**dict(zip(names, found, strict=True)))


def fit_deltas(timings: Sequence[DeltaTiming]) -> CpuCoefficients | None:
    """What the workers take, and what the way there and back takes besides. None without timings."""
    own = fit_jobs(timings)
    over = [item for item in timings if item.handed_over]
    if own is None or not over:
        return own
    beyond = [max(item.seconds - own.on_workers(item.tokens, item.rank, item.cores), 0.0) for item in over]
    weights = np.array([item.seconds for item in over])
    columns = np.array([[1.0, item.tokens] for item in over]) / weights[:, None]
    more_fixed, more_per_token = map(float, nonnegative_least_squares(columns, np.array(beyond) / weights))
    return replace(
        own,
        fixed_seconds=own.fixed_seconds + more_fixed,
        seconds_per_token=more_per_token,
    )


def judge_steps(profile: CostProfile, steps: Sequence[MeasuredStep]) -> Judgement:
    """By the held-out steps."""
    apart = [step for step in steps if step.case.held_out]
    fixed: dict[tuple[int, int], list[MeasuredStep]] = {}
    for step in apart:
        if step.decodes_alone and step.case.case.prompt is not None:
            fixed.setdefault((step.case.case.batch, step.case.case.prompt), []).append(step)

    def quality(wanted: Callable[[MeasuredStep], bool]) -> FitQuality | None:
        return _quality(profile, [step for step in apart if wanted(step)])

    return Judgement(
        decode=quality(lambda step: step.decodes_alone),
        fixed={
            key: found
            for key, members in fixed.items()
            if len(members) >= _LEAST_POINTS and (found := _quality(profile, members)) is not None
        },
        prompts=quality(lambda step: step.prompts_alone),
        riding=quality(lambda step: not step.decodes_alone and not step.prompts_alone),
        overall=quality(lambda _: True),
    )


def _quality(profile: CostProfile, steps: Sequence[MeasuredStep]) -> FitQuality | None:
    if not steps:
        return None
    return quality_of(
        [profile.step_seconds(step.decodes, step.prompts) for step in steps], [step.median_seconds for step in steps]
    )


def _fit(columns: NDArray[np.float64], seconds: Sequence[float]) -> list[float]:
    """Coefficients, none negative, with the least relative errors."""
    measured = np.array(seconds)
    return [float(value) for value in nonnegative_least_squares(columns / measured[:, None], np.ones(len(measured)))]

"""Coefficients of a step's cost from timed steps, and how well they predict others."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segue.scheduler.cost_model import LoraForm, StepCoefficients, StepLoad


@dataclass(frozen=True, slots=True)
class StepObservation:
    """A step with these rows took so many seconds."""

    load: StepLoad
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedStep:
    """A step of an engine with rows that decode and rows of prompts took so many seconds."""

    decodes: StepLoad
    prompts: StepLoad
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FitQuality:
    """How well coefficients predict observations: the coefficient of determination (1 is perfect), and the mean and
    the largest error relative to what was measured."""

    r_squared: float
    mean_relative_error: float
    max_relative_error: float


def fit_step(
    observations: Sequence[StepObservation],
    form: LoraForm,
    row_tokens: Sequence[int] = (),
    padded_tokens: Sequence[int] = (),
) -> StepCoefficients:
    """The coefficients, none negative, with the least sum of squared relative errors.

    Relative, because a small batch is to be predicted as well as a large one. Terms that do not vary stay 0, or join
    the fixed part. With ``row_tokens``, two at least, the base model's time is any line that bends at those numbers of
    rows and never falls, in place of a straight one. ``padded_tokens`` are those of StepCoefficients. Raises ValueError
    for fewer observations than terms, or a time that is not positive.
    """
    units = [replace(unit, padded_tokens=tuple(padded_tokens)) for unit in _units(form, row_tokens)]
    if len(observations) < len(units):
        raise ValueError(f"observations: at least {len(units)} are needed, there are {len(observations)}")
    if any(not item.seconds > 0 or item.load.tokens < 1 for item in observations):
        raise ValueError("observations: each must have rows and take time")
    seconds = np.array([item.seconds for item in observations])
    # A term's feature is what the step costs when that coefficient alone is 1.
    columns = np.array([[unit.seconds(item.load) for unit in units] for item in observations])
    solution = nonnegative_least_squares(columns / seconds[:, None], np.ones(len(observations)))
    values = [float(value) for value in solution]
    terms = _scalar_terms(form, row_tokens)
    rises = values[len(terms) :]
    found: dict[str, Any] = {"padded_tokens": tuple(padded_tokens), **dict(zip(terms, values, strict=False))}
    if row_tokens:
        found |= {"row_tokens": tuple(row_tokens), "row_seconds": tuple(itertools.accumulate(rises, initial=0.0))}
    return StepCoefficients(**found)


def _scalar_terms(form: LoraForm, row_tokens: Sequence[int]) -> list[str]:
    return [term for term in form.terms if not row_tokens or term != "seconds_per_token"]


def _units(form: LoraForm, row_tokens: Sequence[int]) -> list[StepCoefficients]:
    """Coefficients with one term alone, which is 1: the scalars, then the rise between each two numbers of rows."""
    scalars = [_unit(term) for term in _scalar_terms(form, row_tokens)]
    count = len(row_tokens)
    rises = [
        StepCoefficients(
            row_tokens=tuple(row_tokens), row_seconds=tuple(float(place >= right) for place in range(count))
        )
        for right in range(1, count)
    ]
    return [*scalars, *rises]


def _unit(term: str) -> StepCoefficients:
    coefficient: dict[str, Any] = {term: 1.0}
    return StepCoefficients(**coefficient)


def nonnegative_least_squares(columns: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.float64]:
    """The x >= 0 with the least norm of ``columns x - target``. ``columns`` is [observations, terms], with few terms.

    The best x is the unbounded least-squares solution on those terms that are not 0 in it, so all choices of terms are
    tried: exact, and fast enough for the dozen that there are.
    """
    terms = columns.shape[1]
    # Terms differ by ten orders of magnitude; scaled, they are of one size.
    scale = np.abs(columns).max(axis=0)
    scale[scale == 0] = 1.0
    scaled = columns / scale
    best: NDArray[np.float64] = np.zeros(terms)
    best_error = float(target @ target)
    for count in range(1, terms + 1):
        for chosen in itertools.combinations(range(terms), count):
            solution, *_ = np.linalg.lstsq(scaled[:, chosen], target, rcond=None)
            residual = scaled[:, chosen] @ solution - target
            error = float(residual @ residual)
            if (solution >= 0).all() and error < best_error * (1 - 1e-9):
                best, best_error = np.zeros(terms), error
                best[list(chosen)] = solution
    best /= scale
    return best


def judge(coefficients: StepCoefficients, observations: Sequence[StepObservation]) -> FitQuality:
    """How well the coefficients predict these observations. Raises ValueError without any."""
    if not observations:
        raise ValueError("observations: there must be at least one")
    return quality_of(
        [coefficients.seconds(item.load) for item in observations], [item.seconds for item in observations]
    )


def quality_of(predicted_seconds: Sequence[float], measured_seconds: Sequence[float]) -> FitQuality:
    """How well these times were predicted; there is at least one.

    Where all took the same time R squared means nothing; it is then 1 for a perfect prediction and else 0.
    """
    predicted, measured = np.array(predicted_seconds), np.array(measured_seconds)
    residual = float(np.square(predicted - measured).sum())
    spread = float(np.square(measured - measured.mean()).sum())
    relative = np.abs(predicted - measured) / measured
    return FitQuality(
        r_squared=1 - residual / spread if spread > 0 else float(residual == 0),
        mean_relative_error=float(relative.mean()),
        max_relative_error=float(relative.max()),
    )

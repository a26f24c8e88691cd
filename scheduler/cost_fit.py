"""Coefficients of a step's cost from timed steps, and how well they predict others."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from segue.scheduler.cost_model import LoraForm, StepCoefficients, StepLoad

# A knee must make the errors' squares smaller by so much: else noise alone would bend the line.
_KNEE_GAIN = 0.02
# A sum of squares that is rounding alone.
_EXACT = 1e-12


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


def fit_step(observations: Sequence[StepObservation], form: LoraForm) -> StepCoefficients:
    """The coefficients, none negative, with the least sum of squared relative errors.

    Relative, because a small batch is to be predicted as well as a large one. Terms that do not vary stay 0, or join
    the fixed part. The knee is one of the numbers of rows observed, or none. Raises ValueError for fewer observations
    than terms, or a time that is not positive.
    """
    if len(observations) < len(form.terms):
        raise ValueError(f"observations: at least {len(form.terms)} are needed, there are {len(observations)}")
    if any(not item.seconds > 0 or item.load.tokens < 1 for item in observations):
        raise ValueError("observations: each must have rows and take time")
    rows = sorted({item.load.tokens for item in observations})
    best = _fit_with_knee(observations, form, None)
    # A slope needs two numbers of rows on both sides.
    for knee in rows[1:-2]:
        found = _fit_with_knee(observations, form, knee)
        if best[0] - found[0] > _KNEE_GAIN * best[0] + _EXACT:
            best = found
    return best[1]


def _fit_with_knee(
    observations: Sequence[StepObservation], form: LoraForm, knee: int | None
) -> tuple[float, StepCoefficients]:
    """The sum of squared relative errors and the coefficients with the knee there; None: without one."""
    terms = [term for term in form.terms if knee is not None or term != "seconds_per_token_beyond"]
    seconds = np.array([item.seconds for item in observations])
    # A term's feature is what the step costs when that coefficient alone is 1.
    units = [StepCoefficients(knee_tokens=knee or 0, **{term: 1.0}) for term in terms]
    columns = np.array([[unit.seconds(item.load) for unit in units] for item in observations]) / seconds[:, None]
    solution = nonnegative_least_squares(columns, np.ones(len(observations)))
    error = float(np.square(columns @ solution - 1).sum())
    coefficients = dict(zip(terms, map(float, solution), strict=True))
    used = knee if knee is not None and coefficients["seconds_per_token_beyond"] > 0 else 0
    return error, StepCoefficients(knee_tokens=used, **coefficients)


def nonnegative_least_squares(columns: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.float64]:
    """The x >= 0 with the least norm of ``columns x - target``. ``columns`` is [observations, terms], with few terms.

    The best x is the unbounded least-squares solution on those terms that are not 0 in it, so all choices of terms are
    tried: exact, and fast enough for the eight that there are.
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

"""Keeps a cost model right while it is used: a scale for each part of a step's cost, learned from every step.

Recursive least squares with exponential forgetting (Ljung and Soderstrom, "Theory and Practice of Recursive
Identification", 1983), on times relative to the profile's prediction, so that all steps weigh alike. What one step can
do is bounded: its error is clipped to a few times the usual one (Huber's influence function), the scales stay within
fixed bounds, and the gain cannot wind up where the steps do not tell the parts apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from segue.config import require
from segue.scheduler.cost_model import CostProfile, StepLoad

_PARTS = 3
_IDENTITY = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))

Vector = tuple[float, float, float]
Matrix = tuple[Vector, Vector, Vector]


@dataclass(frozen=True, slots=True, kw_only=True)
class CorrectionLimits:
    """``memory_steps``: a step that is so many steps old weighs 1/e. Scales stay between ``least`` and ``most``.

    An error counts for at most ``clip`` times the usual one, which is never taken to be below ``floor``. Both are
    relative to the prediction.
    """

    memory_steps: float = 500.0
    least: float = 0.5
    most: float = 2.0
    clip: float = 3.0
    floor: float = 0.01

    def __post_init__(self) -> None:
        require(self.memory_steps > 1, "memory_steps", f"must be greater than 1, is {self.memory_steps}")
        require(0 < self.least <= 1 <= self.most, "least", f"must be in (0, 1] and most from 1 on, is {self.least}")
        require(self.clip > 0, "clip", f"must be greater than 0, is {self.clip}")
        require(self.floor > 0, "floor", f"must be greater than 0, is {self.floor}")

    @property
    def forgetting(self) -> float:
        """What a step's weight is multiplied with at each later one."""
        return math.exp(-1 / self.memory_steps)


def _scaled(matrix: Matrix, factor: float) -> Matrix:
    first, second, third = (tuple(value * factor for value in row) for row in matrix)
    return (first, second, third)  # type: ignore[return-value]


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """Scales of the parts of a step's cost (base model, attention, LoRA), and how far off they are.

    ``usual_error`` is the clipped error's mean, ``mean_error`` the metric: the mean error relative to the prediction,
    before each step was learned from, an error beyond 1 counting as 1. Both forget as the scales do.
    """

    limits: CorrectionLimits = CorrectionLimits()
    scales: Vector = (1.0, 1.0, 1.0)
    covariance: Matrix = _IDENTITY
    usual_error: float = 0.1
    mean_error: float = 0.0
    steps: int = 0

    def seconds(self, parts: Sequence[float]) -> float:
        """The corrected prediction of a step with these parts (``StepCoefficients.parts``)."""
        return math.fsum(scale * part for scale, part in zip(self.scales, parts, strict=True))

    def learned(self, parts: Sequence[float], measured_seconds: float) -> Correction:
        """The correction after a step. A step without cost teaches nothing, nor does a time that is none."""
        total = math.fsum(parts)
        if not (0 < measured_seconds < math.inf) or not (0 < total < math.inf):
            return self
        limits, forgetting = self.limits, self.limits.forgetting
        features = tuple(part / total for part in parts)
        error = measured_seconds / total - math.fsum(s * x for s, x in zip(self.scales, features, strict=True))
        most = limits.clip * max(self.usual_error, limits.floor)
        clipped = min(max(error, -most), most)
        direction = [math.fsum(p * x for p, x in zip(row, features, strict=True)) for row in self.covariance]
        spread = forgetting + math.fsum(x * d for x, d in zip(features, direction, strict=True))
        scales = [
            min(max(scale + d / spread * clipped, limits.least), limits.most)
            for scale, d in zip(self.scales, direction, strict=True)
        ]
        # A mean over few steps is the mean of them, not a mean with where it began.
        weight = max(1 - forgetting, 1 / (self.steps + 1))
        relative = min(abs(measured_seconds - self.seconds(parts)) / self.seconds(parts), 1.0)
        return Correction(
            limits=limits,
            scales=(scales[0], scales[1], scales[2]),
            covariance=self._next_covariance(direction, spread),
            usual_error=self.usual_error + (1 - forgetting) * (abs(clipped) - self.usual_error),
            mean_error=self.mean_error + weight * (relative - self.mean_error),
            steps=self.steps + 1,
        )

    def _next_covariance(self, direction: Sequence[float], spread: float) -> Matrix:
        """The update of recursive least squares, its trace held at that of the beginning or below."""
        forgetting = self.limits.forgetting
        rows = [
            tuple((self.covariance[i][j] - direction[i] * direction[j] / spread) / forgetting for j in range(_PARTS))
            for i in range(_PARTS)
        ]
        trace = math.fsum(rows[i][i] for i in range(_PARTS))
        matrix: Matrix = (rows[0], rows[1], rows[2])  # type: ignore[assignment]
        return matrix if trace <= _PARTS else _scaled(matrix, _PARTS / trace)

    def check(self) -> None:
        """Raises AssertionError where a scale or an error is out of bounds."""
        assert all(self.limits.least <= scale <= self.limits.most for scale in self.scales), self.scales
        assert 0 <= self.mean_error <= 1, self.mean_error
        assert math.isfinite(self.usual_error), self.usual_error
        assert all(math.isfinite(value) for row in self.covariance for value in row), self.covariance


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileCorrection:
    """What a profile's steps have taught: of those that decode alone, and of those with rows of prompts."""

    decode: Correction = Correction()
    prefill: Correction = Correction()

    def learned(self, profile: CostProfile, decodes: StepLoad, prompts: StepLoad, seconds: float) -> ProfileCorrection:
        """The correction after a step with these rows, which the profile as it was measured predicts."""
        parts = profile.step_parts(decodes, prompts)
        if prompts.tokens:
            return replace(self, prefill=self.prefill.learned(parts, seconds))
        return replace(self, decode=self.decode.learned(parts, seconds))

    def applied_to(self, profile: CostProfile) -> CostProfile:
        """The profile whose predictions are the corrected ones."""
        return replace(
            profile,
            decode=profile.decode.scaled(*self.decode.scales),
            prefill=profile.prefill.scaled(*self.prefill.scales),
        )

"""What steps cost in this engine: the machine's profile or, without one, what the engine has seen itself take."""

from __future__ import annotations

import math

from segue.engine.rate import RateMeter
from segue.scheduler.cost_model import CostProfile, StepCoefficients
from segue.scheduler.plan import QueuedRequest
from segue.scheduler.policy import prompt_seconds

# Until the first prompts and steps have been measured.
_ASSUMED_PREFILL_TOKENS_PER_SECOND = 1000.0
_ASSUMED_STEPS_PER_SECOND = 50.0
_ANSWER_SMOOTHING = 0.05


class EngineCosts:
    """``measured`` is a profile that was fitted on this machine."""

    def __init__(self, *, layers: int, measured: CostProfile | None = None) -> None:
        self.measured = measured
        self.prefill_rate = RateMeter(_ASSUMED_PREFILL_TOKENS_PER_SECOND)
        """Tokens per second of batches with prompts."""
        self.step_rate = RateMeter(_ASSUMED_STEPS_PER_SECOND)
        """Steps per second, of those that only decode."""
        self._layers = layers
        self._answer_share = 1.0

    @property
    def profile(self) -> CostProfile | None:
        """The measured profile; else one from the observed rates, which knows no adapters and no context; None before
        anything was observed."""
        if self.measured is not None:
            return self.measured
        if not (self.prefill_rate.is_measured and self.step_rate.is_measured):
            return None
        step_seconds = self.step_rate.seconds_for(1)
        return CostProfile(
            name="observed",
            layers=self._layers,
            decode=StepCoefficients(fixed_seconds=step_seconds),
            prefill=StepCoefficients(seconds_per_token=self.prefill_rate.seconds_for(1)),
        )

    def observe(self, rows: int, requests: int, seconds: float) -> None:
        """A batch with so many rows of so many requests took so long."""
        if rows > requests:
            self.prefill_rate.observe(rows, seconds)
        else:
            self.step_rate.observe(1, seconds)

    def observe_answer(self, tokens: int, max_tokens: int) -> None:
        """An answer that might have had ``max_tokens`` tokens ended after so many."""
        self._answer_share += _ANSWER_SMOOTHING * (tokens / max_tokens - self._answer_share)

    def expected_left(self, tokens: int, max_tokens: int) -> int:
        """How many more tokens an answer that has so many is expected to have, at least one.

        Answers take on average a part of what they may take, all of it until that was seen.
        """
        return max(1, math.ceil(self._answer_share * max_tokens) - tokens)

    def start_by(self, request: QueuedRequest) -> float:
        """When the request's prefill must begin for its first token to be in time; infinite without a target."""
        by_seconds = request.level.first_token_by_seconds
        if by_seconds == math.inf:
            return math.inf
        return by_seconds - prompt_seconds(self.profile, request.tokens, 0, request.level)

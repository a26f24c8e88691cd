"""How the tokens of one answer are chosen, as the front end tells the engine."""

from __future__ import annotations

import math

import msgspec

GREEDY_TEMPERATURE = 1e-5
"""Below this temperature the most likely token is taken: the softmax would give it nearly all the probability."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """Every choice is resolved: defaults are filled in and ``stop_token_ids`` holds the EOS tokens unless ignored.

    ``seed`` (64 bits) is always the front end's: the user's, or one that it drew; ``sample`` (32 bits) tells the
    answers of one request apart. ``temperature`` 0 is greedy; ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 filter nothing.
    ``stop_token_ids`` cannot be chosen before ``min_tokens`` tokens are there. ``logprobs`` is how many of the most
    likely tokens to report beside the chosen one; None reports nothing.
    Raises ValueError naming the field that is out of range.
    """

    seed: int
    sample: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    logprobs: int | None = None

    def __post_init__(self) -> None:
        _require(0 <= self.seed < 1 << 64, "seed", "a 64-bit unsigned integer", self.seed)
        _require(0 <= self.sample < 1 << 32, "sample", "a 32-bit unsigned integer", self.sample)
        _require(0 <= self.temperature < math.inf, "temperature", "finite and at least 0", self.temperature)
        _require(0 < self.top_p <= 1, "top_p", "in (0, 1]", self.top_p)
        _require(self.top_k >= 0, "top_k", "at least 0", self.top_k)
        _require(0 <= self.min_p <= 1, "min_p", "in [0, 1]", self.min_p)
        _require(math.isfinite(self.presence_penalty), "presence_penalty", "finite", self.presence_penalty)
        _require(math.isfinite(self.frequency_penalty), "frequency_penalty", "finite", self.frequency_penalty)
        repetition_penalty = self.repetition_penalty
        _require(0 < repetition_penalty < math.inf, "repetition_penalty", "finite and above 0", repetition_penalty)

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken, without chance."""
        return self.temperature < GREEDY_TEMPERATURE

    @property
    def is_filtered(self) -> bool:
        """Whether some tokens may be too unlikely to be drawn."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0

    @property
    def has_penalties(self) -> bool:
        """Whether the tokens so far must be counted."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1

    def bans_stops(self, position: int) -> bool:
        """Whether the token after ``position`` generated ones cannot be a stop token."""
        return position < self.min_tokens and bool(self.stop_token_ids)

    def changes_logits(self, position: int) -> bool:
        """Whether the most likely token after ``position`` generated ones may not be the model's."""
        return bool(self.logit_bias) or self.has_penalties or self.bans_stops(position)


def _require(holds: bool, field: str, rule: str, value: float) -> None:
    if not holds:
        raise ValueError(f"{field} must be {rule}, is {value:g}")

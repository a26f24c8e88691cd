"""A rate as it is measured."""

from __future__ import annotations

_SMOOTHING = 0.3
# A piece of work that was held up, or timed badly, counts as one that was so much slower or faster than usual.
_MOST_CHANGE = 4.0


class RateMeter:
    """Amounts (bytes, tokens) per second, smoothed exponentially over what is observed, each within bounds."""

    def __init__(self, assumed_per_second: float) -> None:
        self._per_second = assumed_per_second
        self.is_measured = False
        """Whether anything was observed."""

    def observe(self, amount: int, seconds: float) -> None:
        """Take one piece of work into account; one that took no measurable time says nothing."""
        if amount > 0 and seconds > 0:
            self.is_measured = True
            observed = min(max(amount / seconds, self._per_second / _MOST_CHANGE), self._per_second * _MOST_CHANGE)
            self._per_second += _SMOOTHING * (observed - self._per_second)

    def seconds_for(self, amount: int) -> float:
        """How long ``amount`` will take."""
        return amount / self._per_second

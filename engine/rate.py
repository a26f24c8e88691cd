"""A rate as it is measured."""

from __future__ import annotations

_SMOOTHING = 0.3


class RateMeter:
    """Amounts (bytes, tokens) per second, smoothed exponentially over what is observed."""

    def __init__(self, assumed_per_second: float) -> None:
        self._per_second = assumed_per_second
        self.is_measured = False
        """Whether anything was observed."""

    def observe(self, amount: int, seconds: float) -> None:
        """Take one piece of work into account; one that took no measurable time says nothing."""
        if amount > 0 and seconds > 0:
            self.is_measured = True
            self._per_second += _SMOOTHING * (amount / seconds - self._per_second)

    def seconds_for(self, amount: int) -> float:
        """How long ``amount`` will take."""
        return amount / self._per_second

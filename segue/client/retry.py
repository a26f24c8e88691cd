"""Whether a call that failed is made again, and when."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from segue.errors import SegueError, StatusCode


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How often a call is made in all, and the pauses between its attempts. ``attempts=1`` never makes one again.

    Made again is a call that failed with UNAVAILABLE, or with RESOURCE_EXHAUSTED and a time to come again; no other
    error goes away by itself. The pause after the k-th attempt is drawn from [(1 - jitter) * b, b], where b is
    initial_backoff_seconds * multiplier ** (k - 1), but at most max_backoff_seconds. With a jitter of 1 this is the
    "full jitter" of Brooker, "Exponential Backoff And Jitter" (AWS Architecture Blog, 2015). The time that the server
    asks for is added to the pause; if it asks for more than max_backoff_seconds, the error is raised at once.

    Raises ValueError, naming the field, for values out of range.
    """

    attempts: int = 3
    initial_backoff_seconds: float = 0.25
    max_backoff_seconds: float = 10.0
    multiplier: float = 2.0
    jitter: float = 1.0

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise ValueError(f"attempts: must be at least 1, is {self.attempts}")
        for field in ("initial_backoff_seconds", "max_backoff_seconds"):
            value = getattr(self, field)
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{field}: must be finite and at least 0, is {value}")
        if not (self.multiplier >= 1 and math.isfinite(self.multiplier)):
            raise ValueError(f"multiplier: must be finite and at least 1, is {self.multiplier}")
        if not 0 <= self.jitter <= 1:
            raise ValueError(f"jitter: must be from 0 to 1, is {self.jitter}")


DEFAULT_RETRY = RetryPolicy()


class Attempts:
    """The attempts of one call: the time that each may take, and whether another one follows.

    ``timeout`` bounds all of them and the pauses between them, in seconds from the first ``begin``. ``random`` gives
    numbers from [0, 1), ``clock`` seconds that only grow.
    """

    def __init__(
        self,
        policy: RetryPolicy,
        timeout: float | None,
        *,
        random: Callable[[], float],
        clock: Callable[[], float],
    ) -> None:
        self._policy = policy
        self._timeout = timeout
        self._random = random
        self._clock = clock
        self._deadline = math.inf
        self._begun = 0
        self._backoff_seconds = min(policy.initial_backoff_seconds, policy.max_backoff_seconds)
        self._error: SegueError | None = None

    def begin(self) -> float | None:
        """Begin an attempt: the seconds that it may take, None if there is no bound.

        Raises the error of the attempt before if no time is left for another.
        """
        self._begun += 1
        if self._timeout is None:
            return None
        if self._begun == 1:
            self._deadline = self._clock() + self._timeout
            return self._timeout
        seconds = self._deadline - self._clock()
        if seconds <= 0 and self._error is not None:
            raise self._error
        return seconds

    def pause_seconds(self, error: SegueError, *, repeatable: bool = True) -> float:
        """The pause between the attempt that ended with ``error`` and the next one.

        Raises ``error`` if none shall follow, with the error of the attempt before as its cause. A call that is not
        ``repeatable`` has no further attempt.
        """
        error.__cause__, self._error = self._error, error
        wanted = _wanted_delay_seconds(error) if repeatable else None
        if wanted is None or wanted > self._policy.max_backoff_seconds or self._begun >= self._policy.attempts:
            raise error
        pause = wanted + self._backoff_seconds * (1 - self._policy.jitter * self._random())
        self._backoff_seconds = min(self._backoff_seconds * self._policy.multiplier, self._policy.max_backoff_seconds)
        if self._clock() + pause >= self._deadline:
            raise error
        return pause


def _wanted_delay_seconds(error: SegueError) -> float | None:
    """The least pause before the call may be made again; None if that would not help."""
    if error.code is StatusCode.UNAVAILABLE:
        return max(error.retry_after_seconds or 0.0, 0.0)
    if error.code is StatusCode.RESOURCE_EXHAUSTED and error.retry_after_seconds is not None:
        return max(error.retry_after_seconds, 0.0)
    return None

"""How far the start of an engine has come: what it tells, how often, and how a person reads it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TypeAlias

from segue.engine.messages import StartProgress

# Takes each message. A start reports from one thread at a time, but not always from the same.
ReportProgress: TypeAlias = Callable[[StartProgress], None]

_LINE_SECONDS = 5.0
_PREFIXES = ("", "k", "M", "G", "T")


class Throttle:
    """Passes a stage's first and last report on, and of those in between at most one each ``interval_seconds``."""

    def __init__(
        self, report: ReportProgress, interval_seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._report = report
        self._interval_seconds = interval_seconds
        self._clock = clock
        self._stage = ""
        self._next_seconds = 0.0
        self._lock = threading.Lock()

    def __call__(self, progress: StartProgress) -> None:
        with self._lock:
            now = self._clock()
            if progress.stage == self._stage and now < self._next_seconds and not progress.is_complete:
                return
            self._stage = progress.stage
            self._next_seconds = now + self._interval_seconds
            self._report(progress)


def log_lines(logger: logging.Logger, interval_seconds: float = _LINE_SECONDS) -> ReportProgress:
    """Writes a line every few seconds, and one when a stage is complete."""
    return Throttle(lambda progress: logger.info("%s: %s", progress.stage, amount(progress)), interval_seconds)


def amount(progress: StartProgress) -> str:
    """Such as "1.5 GB of 16 GB", "3 of 40 files"; "16 GB" when complete."""
    if progress.unit == "bytes":
        done, total, unit = decimal_bytes(progress.done), decimal_bytes(progress.total), ""
    else:
        done, total, unit = str(progress.done), str(progress.total), f" {progress.unit}".rstrip()
    return f"{total}{unit}" if progress.is_complete else f"{done} of {total}{unit}"


def decimal_bytes(size_bytes: float) -> str:
    """With three digits at least, such as "999 B", "1.50 kB", "1230 TB"."""
    value, place = float(size_bytes), 0
    while value >= 999.5 and place + 1 < len(_PREFIXES):
        value, place = value / 1000, place + 1
    digits = 0 if place == 0 or value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f} {_PREFIXES[place]}B"

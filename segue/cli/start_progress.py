"""What a person sees while an engine starts: a bar on a terminal, else a line in the log every few seconds."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from segue.engine.messages import StartProgress
from segue.engine.progress import ReportProgress, amount, decimal_bytes, log_lines


@contextmanager
def shown_progress(console: Console) -> Iterator[ReportProgress]:
    """Takes the messages of engines' starts; a bar that is left unfinished stays as it is at the end."""
    if not console.is_terminal:
        yield log_lines(logging.getLogger("segue.serve"))
        return
    bars = StageBars(console)
    try:
        yield bars
    finally:
        bars.stop()


class StageBars:
    """A bar for each stage, one at a time. A stage that is complete keeps its line."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._stage = ""
        self._begin_seconds = 0.0
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def __call__(self, progress: StartProgress) -> None:
        if self._bar is None or progress.stage != self._stage:
            self._start(progress.stage)
        assert self._bar is not None
        self._bar.update(
            self._task,
            completed=progress.done,
            total=progress.total,
            amount=amount(progress),
            rate=self._rate(progress),
        )
        if progress.is_complete:
            self.stop()

    def stop(self) -> None:
        """Draw nothing more until the next message."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _start(self, stage: str) -> None:
        self.stop()
        self._stage = stage
        self._begin_seconds = time.monotonic()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[amount]}"),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
        )
        self._bar = Progress(*columns, console=self._console)
        self._task = self._bar.add_task(stage, amount="", rate="")
        self._bar.start()

    def _rate(self, progress: StartProgress) -> str:
        """The mean so far, of bytes alone."""
        elapsed_seconds = time.monotonic() - self._begin_seconds
        if progress.unit != "bytes" or progress.done == 0 or elapsed_seconds <= 0:
            return ""
        return f"{decimal_bytes(progress.done / elapsed_seconds)}/s"

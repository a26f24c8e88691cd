"""How the subcommands of ``segue bench`` measure, and where their reports go."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console

from segue.cli.common import UserError

if TYPE_CHECKING:
    from segue.bench.report import Report

_T = TypeVar("_T")
_WIDTH_WITHOUT_TERMINAL = 160


def with_progress(measure: Callable[[Callable[[str], None]], _T]) -> _T:
    """What ``measure`` returns, given a function that shows what it is doing. Raises UserError for what went wrong."""
    from segue.bench.driver import BenchmarkError
    from segue.bench.simulate.served import SimulationError
    from segue.engine.models.config import ModelError

    try:
        with Console(stderr=True).status("") as status:
            return measure(status.update)
    except (BenchmarkError, ModelError, SimulationError, OSError) as error:
        raise UserError(str(error)) from error


def check_outputs(json: Path | None, plot: Path | None) -> None:
    """Raises UserError or ConfigError where the report could not be written, so that nothing is measured in vain."""
    from segue.bench.plots import PlotError, require_plots

    check_folders(json=json, plot=plot)
    check_commit()
    if plot is not None:
        try:
            require_plots(plot)
        except PlotError as error:
            raise UserError(str(error)) from error


def check_commit() -> None:
    """Raises ConfigError where SEGUE_COMMIT names none."""
    from segue.bench.machine import named_commit

    named_commit()


def check_folders(**paths: Path | None) -> None:
    """Raises UserError for a file, by its option's name, whose folder there is not."""
    for option, path in paths.items():
        if path is not None and not path.absolute().parent.is_dir():
            raise UserError(f"--{option}: {path.absolute().parent} is not a folder")


def write_outputs(report: Report, json: Path | None, plot: Path | None) -> None:
    """Write the report where it is wanted. Raises UserError."""
    from segue.bench.plots import PlotError, write_plot

    try:
        if json is not None:
            report.write(json)
        if plot is not None:
            write_plot(report, plot)
    except (OSError, PlotError) as error:
        raise UserError(str(error)) from error


def show_console() -> Console:
    """Where tables are printed: as wide as the terminal, or wide enough."""
    console = Console()
    return console if console.is_terminal else Console(width=_WIDTH_WITHOUT_TERMINAL)

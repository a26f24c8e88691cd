"""What the subcommands of ``segue bench`` share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console

from segue.cli.common import UserError

if TYPE_CHECKING:
    from segue.bench.report import Report

_T = TypeVar("_T")
_WIDTH_WITHOUT_TERMINAL = 160

JsonOption = Annotated[Path | None, typer.Option("--json", metavar="FILE.json", help="Write the report here.")]


def with_progress(measure: Callable[[Callable[[str], None]], _T]) -> _T:
    """What ``measure`` returns, given a function that shows what it is doing. Raises UserError for what went wrong."""
    from segue.bench.driver import BenchmarkError

    try:
        with Console(stderr=True).status("") as status:
            return measure(status.update)
    except (BenchmarkError, OSError) as error:
        raise UserError(str(error)) from error


def check_outputs(json: Path | None, plot: Path | None) -> None:
    """Raises UserError where the report could not be written, so that nothing is measured in vain."""
    from segue.bench.plots import PlotError, require_plots

    check_folders(json=json, plot=plot)
    if plot is not None:
        try:
            require_plots(plot)
        except PlotError as error:
            raise UserError(str(error)) from error


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


def changed(config: Any, **values: object) -> Any:
    """The dataclass ``config`` with those values that are not None."""
    return dataclasses.replace(config, **{name: value for name, value in values.items() if value is not None})


def numbers(option: str, text: str) -> tuple[int, ...]:
    """The whole numbers of an option. Raises UserError naming it."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"{option}: must be whole numbers with commas between them, is {text!r}") from None

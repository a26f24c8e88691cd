"""``segue demo``: everything on this machine, to look at."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from segue.cli.common import UserError, one_line_errors
from segue.demo.run import (
    DEFAULT_CPU_WORKERS,
    DEFAULT_LINK_BYTES_PER_SECOND,
    DEFAULT_PROMPT,
    DemoError,
    DemoOptions,
    run_demo,
)

_WIDTH_WITHOUT_TERMINAL = 120


def register(app: typer.Typer) -> None:
    app.command(name="demo")(demo)


def demo(
    prompt: Annotated[str, typer.Option(help="What every adapter is asked.")] = DEFAULT_PROMPT,
    link: Annotated[
        float, typer.Option(metavar="MB/S", min=0.1, help="Throttle of the link to the device.")
    ] = DEFAULT_LINK_BYTES_PER_SECOND / 1e6,
    cpu_workers: Annotated[
        int, typer.Option(metavar="N", min=0, help="CPU LoRA workers; 0 shows a cold start without them.")
    ] = DEFAULT_CPU_WORKERS,
) -> None:
    """Start a server on the built-in model, send it a burst to hot and cold adapters, and show what happened."""
    options = DemoOptions(prompt=prompt, link_bytes_per_second=link * 1e6, cpu_workers=cpu_workers)
    with one_line_errors():
        try:
            run_demo(_console(), options)
        except DemoError as error:
            raise UserError(str(error)) from error


def _console() -> Console:
    """The terminal's own width, and room for two answers side by side where there is no terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=_WIDTH_WITHOUT_TERMINAL)

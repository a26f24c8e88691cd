"""The ``segue`` command: one module for each subcommand."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import typer


def main() -> int:
    """Run the command line; the exit status."""
    try:
        app = build_app()
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        print("segue: the command line needs more packages: pip install 'segue[server]'", file=sys.stderr)
        return 1
    app()
    return 0


def build_app() -> typer.Typer:
    """The command with all of its subcommands."""
    import typer

    from segue.cli import adapters, bench, calibrate, demo, generate, info, serve

    app = typer.Typer(
        name="segue",
        help="Serves one base model and thousands of LoRA adapters, without cold starts.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    for module in (serve, generate, adapters, info, demo, calibrate, bench):
        module.register(app)
    return app

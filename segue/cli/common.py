"""What the subcommands share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Annotated

import typer

from segue.config import ConfigError
from segue.errors import SegueError

ServerOption = Annotated[
    str, typer.Option("--server", metavar="HOST:PORT", envvar="SEGUE_SERVER", help="The server to talk to.")
]
DEFAULT_SERVER = "localhost:50051"


class UserError(Exception):
    """Something that the user can put right. The message is one line."""


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Tell an error that is not a defect in one line, and end with status 1."""
    try:
        yield
    except (SegueError, ConfigError, UserError) as error:
        message = " ".join(str(error).split())
        typer.echo(f"segue: {message}", err=True)
        raise typer.Exit(1) from None

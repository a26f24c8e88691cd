"""``segue info``: what a server is and holds."""

from __future__ import annotations

import dataclasses

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from segue.cli.common import DEFAULT_SERVER, ServerOption, one_line_errors
from segue.client import Client


def register(app: typer.Typer) -> None:
    app.command(name="info")(info)


def info(server: ServerOption = DEFAULT_SERVER) -> None:
    """Tell what the server is and holds."""
    with one_line_errors(), Client(server) as client:
        values = dataclasses.asdict(client.info())
    table = Table(show_header=False, box=None)
    for name, value in values.items():
        if value is not None:
            table.add_row(name.replace("_", " "), Text(str(value)))
    Console().print(table)

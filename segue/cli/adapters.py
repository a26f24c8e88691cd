"""``segue adapters``: adapters at run time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from segue.cli.common import DEFAULT_SERVER, ServerOption, one_line_errors
from segue.client import Client
from segue.types import AdapterInfo

_NameArgument = Annotated[str, typer.Argument(help="The adapter's name.")]


def register(app: typer.Typer) -> None:
    commands = typer.Typer(help="List, load, unload and evict adapters.", no_args_is_help=True)
    commands.command(name="list")(list_adapters)
    commands.command(name="load")(load)
    commands.command(name="unload")(unload)
    commands.command(name="evict")(evict)
    app.add_typer(commands, name="adapters")


def list_adapters(server: ServerOption = DEFAULT_SERVER) -> None:
    """List the adapters that the server knows."""
    with one_line_errors(), Client(server) as client:
        Console().print(adapters_table(client.adapters.list()))


def load(
    name: _NameArgument,
    path: Annotated[str, typer.Option(help="Its folder below the adapters folder, if not of that name.")] = "",
    preload: Annotated[bool, typer.Option("--preload", help="Bring its weights to the device now.")] = False,
    server: ServerOption = DEFAULT_SERVER,
) -> None:
    """Make an adapter known."""
    with one_line_errors(), Client(server) as client:
        info = client.adapters.load(name, path, preload=preload)
        typer.echo(f"loaded {info.name} version {info.version}")


def unload(name: _NameArgument, server: ServerOption = DEFAULT_SERVER) -> None:
    """Make an adapter unknown until it is loaded again; requests that use it end first."""
    with one_line_errors(), Client(server) as client:
        client.adapters.unload(name)
        typer.echo(f"unloaded {name}")


def evict(name: _NameArgument, server: ServerOption = DEFAULT_SERVER) -> None:
    """Drop an adapter's weights from device and host memory; it stays known."""
    with one_line_errors(), Client(server) as client:
        client.adapters.evict(name)
        typer.echo(f"evicted {name}")


def adapters_table(adapters: Sequence[AdapterInfo]) -> Table:
    """One row for each adapter. Names are text, never markup."""
    table = Table("name", "version", "tier", "rank", "modules", "MB", "users")
    for info in adapters:
        if info.problem:
            table.add_row(Text(info.name), Text(info.problem, style="red"))
            continue
        modules = " ".join(module.removesuffix("_proj") for module in info.target_modules)
        megabytes = f"{info.weight_bytes / 1e6:.1f}"
        users = str(info.users)
        tier = f"{info.tier.value}, pinned" if info.pinned else info.tier.value
        table.add_row(Text(info.name), info.version, tier, str(info.rank), modules, megabytes, users)
    return table

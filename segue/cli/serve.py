"""``segue serve``: run a server until it is told to stop."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from segue.cli.common import UserError, one_line_errors
from segue.config import from_table, read_toml


class Device(StrEnum):
    """Where the model runs. AUTO is the configuration file's choice, else the CPU."""

    AUTO = "auto"
    CUDA = "cuda"
    CPU = "cpu"


class Dtype(StrEnum):
    """What the model computes in. AUTO is the configuration file's choice, else float32."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class LoadFormat(StrEnum):
    """Where the weights come from. AUTO is the configuration file's choice, else the model's folder."""

    AUTO = "auto"
    DUMMY = "dummy"


def register(app: typer.Typer) -> None:
    app.command(name="serve")(serve)


def serve(
    model: Annotated[Path | None, typer.Option(metavar="DIR", help="The base model's folder.")] = None,
    adapters: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Each subfolder is an adapter by the folder's name.")
    ] = None,
    listen: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Default: 127.0.0.1:50051.")] = None,
    device: Annotated[Device, typer.Option(help="Where the model runs.")] = Device.AUTO,
    dtype: Annotated[Dtype, typer.Option(help="What the model computes in.")] = Dtype.AUTO,
    load_format: Annotated[
        LoadFormat, typer.Option(help="dummy: random weights, for benchmarks; the folder needs config.json alone.")
    ] = LoadFormat.AUTO,
    cpu_workers: Annotated[
        int | None, typer.Option(metavar="N", help="CPU LoRA workers; 0 streams every adapter.")
    ] = None,
    profile: Annotated[
        Path | None, typer.Option(metavar="FILE.toml", help="What steps and copies cost here, by segue calibrate.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE.toml", help="The server's configuration; options override it.")
    ] = None,
    address_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write HOST:PORT here once the server serves.")
    ] = None,
) -> None:
    """Serve a base model and its adapters over gRPC until SIGTERM or Ctrl-C."""
    with one_line_errors():
        table = dict(read_toml(config)) if config is not None else {}
        flags = {"adapters_dir": None if adapters is None else str(adapters), "listen": listen}
        engine_flags = {
            "model_dir": None if model is None else str(model),
            "device": None if device is Device.AUTO else device.value,
            "dtype": None if dtype is Dtype.AUTO else dtype.value,
            "load_format": None if load_format is LoadFormat.AUTO else load_format.value,
            "cpu_workers": cpu_workers,
            "profile_path": None if profile is None else str(profile),
        }
        merged = server_table(table, flags, engine_flags)
        run_server(merged, where="serve" if config is None else str(config), address_file=address_file)


def server_table(table: Mapping[str, Any], flags: Mapping[str, Any], engine_flags: Mapping[str, Any]) -> dict[str, Any]:
    """A ServerConfig's table: the file's, with every flag that is set in the place of the file's value.

    Raises UserError when neither names the model or the adapters.
    """
    engine = table.get("engine", {})
    if not isinstance(engine, Mapping):
        raise UserError("engine: must be a table")
    engine = {**engine, **{key: value for key, value in engine_flags.items() if value is not None}}
    merged = {**table, **{key: value for key, value in flags.items() if value is not None}, "engine": engine}
    if "model_dir" not in engine:
        raise UserError("which model? Give --model DIR, or engine.model_dir in --config FILE.toml")
    if "adapters_dir" not in merged:
        raise UserError("which adapters? Give --adapters DIR, or adapters_dir in --config FILE.toml")
    return merged


def run_server(table: Mapping[str, Any], *, where: str, address_file: Path | None) -> None:
    """Serve as ``table`` says until SIGTERM or SIGINT. Raises ConfigError or UserError."""
    from segue.server.config import ServerConfig

    config = from_table(ServerConfig, table, where=where)
    from rich.console import Console

    from segue.cli.start_progress import shown_progress
    from segue.server.app import ServerStartError
    from segue.server.app import serve as serve_until_told

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")

    def announce(port: int) -> None:
        address = f"{config.listen.rpartition(':')[0]}:{port}"
        if address_file is not None:
            _write_whole(address_file, f"{address}\n")
        typer.echo(f"serving on {address}")

    try:
        with shown_progress(Console(stderr=True)) as on_progress:
            asyncio.run(serve_until_told(config, on_serving=announce, on_progress=on_progress))
    except ServerStartError as error:
        raise UserError(str(error)) from error


def _write_whole(path: Path, text: str) -> None:
    """Write a file that its readers see whole or not at all."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text)
    draft.replace(path)

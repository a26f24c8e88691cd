"""``segue bench coldload``: a load in which every request needs an adapter of its own, warm and cold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from segue.cli.bench_model import (
    CpuWorkersOption,
    DeviceOption,
    DtypeOption,
    ModelOption,
    TorchThreadsOption,
    shape_and_model,
)
from segue.cli.bench_options import JsonOption, check_outputs, show_console, with_progress, write_outputs
from segue.cli.common import UserError, one_line_errors

if TYPE_CHECKING:
    from segue.bench.coldstart.load_config import LoadConfig
    from segue.bench.report import Report


def coldload(
    preset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="caraserve: Llama 2 7B in bfloat16 on CUDA, 256 adapters of rank 64, 9 requests/s for 5 minutes.",
        ),
    ] = None,
    shape: Annotated[
        str | None, typer.Option(metavar="NAME", help="A random model: tiny (default), small, llama-2-7b, ...")
    ] = None,
    model: ModelOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    rank: Annotated[int | None, typer.Option(metavar="N", help="The adapters' rank; default 8.")] = None,
    targets: Annotated[str | None, typer.Option(metavar="qkvo|all", help="Default qkvo.")] = None,
    contents: Annotated[int | None, typer.Option(metavar="N", help="Adapters, asked for in turn; default 32.")] = None,
    rate: Annotated[float | None, typer.Option(metavar="R", help="Requests a second; default 4.")] = None,
    seconds: Annotated[
        float | None, typer.Option(metavar="S", help="Length of the load, at each server; default 20.")
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(metavar="N", help="Parts of the load that the servers serve in turn; default 2.")
    ] = None,
    cpu_workers: CpuWorkersOption = None,
    torch_threads: TorchThreadsOption = 1,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Of all that is drawn.")] = None,
    json: JsonOption = None,
) -> None:
    """Serve requests that each need another adapter, with all adapters on the device and with all in host memory.

    Arrivals are Poisson, lengths like Alpaca's. The adapters of the cold server leave the device after use.
    """
    with one_line_errors():
        check_outputs(json, None)
        config = _config(
            preset, shape, model,
            dtype=dtype, device=device, rank=rank, targets=targets, contents=contents, requests_per_second=rate,
            seconds=seconds, rounds=rounds, cpu_workers=cpu_workers, torch_threads=torch_threads, seed=seed,
        )  # fmt: skip
        report = with_progress(lambda progress: _report(config, progress))
        write_outputs(report, json, None)
    _show(report)


def _config(preset: str | None, shape: str | None, model: Path | None, **values: Any) -> LoadConfig:
    from segue.bench.coldstart.config import default_workers
    from segue.bench.coldstart.load_config import LoadConfig
    from segue.bench.random_checkpoints import Targets

    if preset not in (None, "caraserve"):
        raise UserError(f"--preset: must be caraserve, is {preset!r}")
    if values["targets"] is not None:
        if values["targets"] not in tuple(Targets):
            raise UserError(f"--targets: must be one of {', '.join(Targets)}, is {values['targets']!r}")
        values["targets"] = Targets(values["targets"])
    given = {name: value for name, value in values.items() if value is not None}
    base: dict[str, Any] = {"cpu_workers": default_workers()}
    if preset is None:
        base |= {"rank": 8, "contents": 32, "requests_per_second": 4.0, "seconds": 20.0}
    else:
        base |= {"dtype": "bfloat16", "device": "cuda"}
    shape, model_dir = shape_and_model(shape, model, "tiny" if preset is None else "llama-2-7b")
    config: LoadConfig = LoadConfig(shape=shape, model_dir=model_dir, **{**base, **given})
    return config


def _report(config: LoadConfig, progress: Callable[[str], None]) -> Report:
    from segue.bench.coldstart.load import run_load_bench
    from segue.engine.models.config import ModelError

    try:
        return run_load_bench(config, progress)
    except ModelError as error:
        raise UserError(str(error)) from error


def _show(report: Report) -> None:
    from segue.bench.coldstart.load_view import column_names, lines

    table = Table(box=None)
    for place, name in enumerate(column_names()):
        table.add_column(name, justify="right" if place else "left")
    for line in lines(report):
        table.add_row(*line)
    show_console().print(table)

"""``segue bench coldload``: a load in which every request needs an adapter of its own, warm and cold."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from segue.cli.bench_options import (
    CpuWorkersOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    SeedOption,
    TargetOption,
    TinyShapeOption,
    TorchThreadsOption,
    model_settings,
)
from segue.cli.bench_report import check_outputs, show_console, with_progress, write_outputs
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
    shape: TinyShapeOption = None,
    model: ModelOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    rank: Annotated[int | None, typer.Option(metavar="N", help="The adapters' rank; default 8.")] = None,
    targets: TargetOption = None,
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
    seed: SeedOption = None,
    json: JsonOption = None,
) -> None:
    """Serve requests that each need another adapter, with all adapters on the device and with all in host memory.

    Arrivals are Poisson, lengths like Alpaca's. The adapters of the cold server leave the device after use.
    """
    with one_line_errors():
        check_outputs(json, None)
        from segue.bench.coldstart.load import run_load_bench

        config = _config(
            preset, shape, model, dtype, device,
            rank=rank, targets=targets, contents=contents, requests_per_second=rate,
            seconds=seconds, rounds=rounds, cpu_workers=cpu_workers, torch_threads=torch_threads, seed=seed,
        )  # fmt: skip
        report = with_progress(lambda progress: run_load_bench(config, progress))
        write_outputs(report, json, None)
    _show(report)


def _config(
    preset: str | None, shape: str | None, model: Path | None, dtype: str | None, device: str | None, **values: Any
) -> LoadConfig:
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
        dtype, device = dtype or "bfloat16", device or "cuda"
    settings = model_settings(shape, model, dtype, device, default_shape="tiny" if preset is None else "llama-2-7b")
    return LoadConfig(**settings, **{**base, **given})


def _show(report: Report) -> None:
    from segue.bench.coldstart.load_view import column_names, lines

    table = Table(box=None)
    for place, name in enumerate(column_names()):
        table.add_column(name, justify="right" if place else "left")
    for line in lines(report):
        table.add_row(*line)
    show_console().print(table)

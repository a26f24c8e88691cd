"""``segue bench coldstart``: what a request pays when its adapter is not on the device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from segue.cli.bench_model import (
    CpuWorkersOption,
    DeviceOption,
    DtypeOption,
    ModelOption,
    TorchThreadsOption,
    shape_and_model,
)
from segue.cli.bench_options import (
    JsonOption,
    check_folders,
    check_outputs,
    numbers,
    show_console,
    with_progress,
    write_outputs,
)
from segue.cli.common import UserError, one_line_errors

if TYPE_CHECKING:
    from segue.bench.coldstart.config import ColdstartConfig
    from segue.bench.coldstart.points import Axes, Point
    from segue.bench.report import Report
    from segue.scheduler.cost_model import CostProfile

_SAMPLES, _DECODES = 60, 16
_AXES = ("prompts", "ranks", "targets", "adapters", "tiers", "links")


def coldstart(
    preset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="table-8b: six points of an 8B model in bfloat16 on CUDA. corners: all corners and 60 more points of "
            "the whole map, each with and without 16 decodes.",
        ),
    ] = None,
    shape: Annotated[
        str | None, typer.Option(metavar="NAME", help="A random model: tiny (default), small, llama-3.1-8b, ...")
    ] = None,
    model: ModelOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    prompts: Annotated[str | None, typer.Option(metavar="N,...", help="Tokens; default 32,128.")] = None,
    ranks: Annotated[str | None, typer.Option(metavar="N,...", help="Default 8,64.")] = None,
    targets: Annotated[str | None, typer.Option(metavar="qkvo|all,...", help="Default qkvo.")] = None,
    adapters: Annotated[
        str | None, typer.Option(metavar="N,...", help="Adapters that arrive together; default 1,4.")
    ] = None,
    tiers: Annotated[str | None, typer.Option(metavar="host|disk,...", help="Default host,disk.")] = None,
    links: Annotated[
        str | None,
        typer.Option(metavar="GB|full,...", help="GB/s that the link to the device carries, or full; default full."),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(metavar="N", help="All corners and N other points, in random order; without it all points."),
    ] = None,
    decodes: Annotated[
        int | None, typer.Option(metavar="N", help="Measure each point also while N requests decode; default 0.")
    ] = None,
    runs: Annotated[int, typer.Option(metavar="N", help="Rounds through the modes at each point.")] = 7,
    seconds: Annotated[
        float, typer.Option(metavar="LIMIT", help="No round begins later than this after the model is there.")
    ] = 600.0,
    cpu_workers: CpuWorkersOption = None,
    torch_threads: TorchThreadsOption = 1,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the points that are drawn, prompts and bounds.")] = 0,
    profile: Annotated[
        Path | None,
        typer.Option(metavar="FILE.toml", help="A cost profile: predict the points of the map that are not measured."),
    ] = None,
    read: Annotated[
        Path | None,
        typer.Option("--from", metavar="FILE.json", help="Measure nothing: show this report, and draw its --page."),
    ] = None,
    page: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="A page of plots and the map of who is fastest where.")
    ] = None,
    json: JsonOption = None,
) -> None:
    """Time requests whose adapters are in host memory or on disk, in five modes: warm, load first, stream, cpu,
    planner.

    The time to the first token and, with --decodes, the longest step of the requests that decode meanwhile.
    """
    with one_line_errors():
        check_outputs(json, None)
        check_folders(page=page)
        if read is not None:
            report = _read(read, json)
        else:
            points, map_points = _points(
                preset, (prompts, ranks, targets, adapters, tiers, links), samples, decodes, seed
            )
            default_shape = "tiny" if preset is None else "llama-3.1-8b"
            if preset is not None:
                dtype, device = dtype or "bfloat16", device or "cuda"
            config = _config(
                points, shape, model, dtype, device, default_shape=default_shape,
                runs=runs, seconds=seconds, cpu_workers=cpu_workers, torch_threads=torch_threads, seed=seed,
            )  # fmt: skip
            config = dataclasses.replace(config, map_points=map_points, profile=_profile(profile))
            report = with_progress(lambda progress: _report(config, progress))
            write_outputs(report, json, None)
        _write_page(report, page)
    _show(report)


def _points(
    preset: str | None, values: tuple[str | None, ...], samples: int | None, decodes: int | None, seed: int
) -> tuple[tuple[Point, ...], tuple[Point, ...]]:
    """The points to measure, and those of the map that they were drawn from, if they were."""
    from segue.bench.coldstart.points import TABLES, Axes, beside_decodes, measured_points

    if preset is None:
        axes = _axes(values)
        if samples is None:
            return beside_decodes(axes.points(), decodes or 0), ()
        return beside_decodes(measured_points(axes, samples, seed), decodes or 0), axes.points()
    if any(value is not None for value in values):
        raise UserError(f"--preset names all points: leave out --{', --'.join(_AXES)}")
    if preset in TABLES:
        if samples is not None or decodes is not None:
            raise UserError(f"--preset {preset} names all points: leave out --samples and --decodes")
        return TABLES[preset], ()
    if preset != "corners":
        raise UserError(f"--preset: must be one of {', '.join([*TABLES, 'corners'])}, is {preset!r}")
    axes = Axes()
    chosen = measured_points(axes, _SAMPLES if samples is None else samples, seed)
    return beside_decodes(chosen, _DECODES if decodes is None else decodes), axes.points()


def _axes(values: tuple[str | None, ...]) -> Axes:
    from segue.bench.coldstart.points import Axes
    from segue.bench.random_checkpoints import Targets
    from segue.types import Tier

    prompts, ranks, targets, adapters, tiers, links = values
    for option, text, known in (("--targets", targets, tuple(Targets)), ("--tiers", tiers, ("host", "disk"))):
        for name in () if text is None else text.split(","):
            if name not in known:
                raise UserError(f"{option}: must be of {', '.join(known)}, is {name!r}")
    return Axes(
        prompts=numbers("--prompts", prompts or "32,128"),
        ranks=numbers("--ranks", ranks or "8,64"),
        targets=tuple(Targets(name) for name in (targets or "qkvo").split(",")),
        adapters=numbers("--adapters", adapters or "1,4"),
        tiers=tuple(Tier(name) for name in (tiers or "host,disk").split(",")),
        links=tuple(_link(text) for text in (links or "full").split(",")),
    )


def _link(text: str) -> float | None:
    if text == "full":
        return None
    try:
        return float(text) * 1e9
    except ValueError:
        raise UserError(f"--links: must be numbers of GB/s or full, with commas between them, is {text!r}") from None


def _config(
    points: tuple[Point, ...],
    shape: str | None,
    model: Path | None,
    dtype: str | None,
    device: str | None,
    *,
    default_shape: str,
    runs: int,
    seconds: float,
    cpu_workers: int | None,
    torch_threads: int,
    seed: int,
) -> ColdstartConfig:
    from segue.bench.coldstart.config import ColdstartConfig, default_workers

    shape, model_dir = shape_and_model(shape, model, default_shape)
    return ColdstartConfig(
        points=points,
        shape=shape,
        model_dir=model_dir,
        dtype=dtype or "float32",
        device=device or "cpu",
        runs=runs,
        seconds=seconds,
        cpu_workers=default_workers() if cpu_workers is None else cpu_workers,
        torch_threads=torch_threads,
        seed=seed,
    )


def _profile(path: Path | None) -> CostProfile | None:
    from segue.config import from_table, read_toml
    from segue.scheduler.cost_model import CostProfile

    return None if path is None else from_table(CostProfile, read_toml(path), where="profile")


def _read(path: Path, json: Path | None) -> Report:
    from segue.bench.report import Report, ReportError

    if json is not None:
        raise UserError("--from measures nothing to write: leave out --json")
    try:
        report = Report.read(path)
    except ReportError as error:
        raise UserError(str(error)) from error
    if report.benchmark != "coldstart":
        raise UserError(f"{path}: is of segue bench {report.benchmark}")
    return report


def _write_page(report: Report, path: Path | None) -> None:
    from segue.bench.coldstart.page import write_page

    if path is not None:
        try:
            write_page(report, path)
        except OSError as error:
            raise UserError(str(error)) from error


def _report(config: ColdstartConfig, progress: Callable[[str], None]) -> Report:
    from segue.bench.coldstart.run import run_coldstart_bench
    from segue.engine.models.config import ModelError

    try:
        return run_coldstart_bench(config, progress)
    except ModelError as error:
        raise UserError(str(error)) from error


def _show(report: Report) -> None:
    """The table, and what is missing; ends with status 1 where a point could not be measured."""
    from segue.bench.coldstart.view import point_table

    show_console().print(point_table(report))
    left_out, failed = report.settings["left_out_points"], report.settings["failed_points"]
    if left_out:
        typer.echo(f"segue: no time for {left_out} of {report.settings['points']} points", err=True)
    for point, reason in failed.items():
        typer.echo(f"segue: not measured: {point}: {reason}", err=True)
    if failed:
        raise typer.Exit(1)

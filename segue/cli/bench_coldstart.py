"""``segue bench coldstart``: what a request pays when its adapter is not on the device."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from segue.cli.bench_options import (
    CpuWorkersOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    SeedOption,
    TargetsOption,
    TinyShapeOption,
    TorchThreadsOption,
    model_settings,
    numbers,
)
from segue.cli.bench_report import check_folders, check_outputs, show_console, with_progress, write_outputs
from segue.cli.common import UserError, one_line_errors

if TYPE_CHECKING:
    from segue.bench.coldstart.points import Axes, Point
    from segue.bench.report import Report
    from segue.scheduler.cost_model import CostProfile

_SAMPLES, _DECODES = 60, 16
_AXES = ("prompts", "ranks", "targets", "adapters", "tiers", "links")

PresetOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="table-8b: six points of an 8B model in bfloat16 on CUDA. corners: all corners and 60 more points of "
        "the whole map, each with and without 16 decodes.",
    ),
]
PromptsOption = Annotated[str | None, typer.Option(metavar="N,...", help="Tokens; default 32,128.")]
PointRanksOption = Annotated[str | None, typer.Option(metavar="N,...", help="The adapters' ranks; default 8,64.")]
AdaptersOption = Annotated[
    str | None, typer.Option(metavar="N,...", help="Adapters that arrive together; default 1,4.")
]
TiersOption = Annotated[str | None, typer.Option(metavar="host|disk,...", help="Default host,disk.")]
LinksOption = Annotated[
    str | None,
    typer.Option(metavar="GB|full,...", help="GB/s that the link to the device carries, or full; default full."),
]
SamplesOption = Annotated[
    int | None,
    typer.Option(metavar="N", help="All corners and N other points, in random order; without it all points."),
]
DecodesOption = Annotated[
    int | None, typer.Option(metavar="N", help="Measure each point also while N requests decode; default 0.")
]
RunsOption = Annotated[int, typer.Option(metavar="N", help="Rounds through the modes at each point.")]
PointSecondsOption = Annotated[
    float, typer.Option(metavar="LIMIT", help="No round begins later than this after the model is there.")
]
ProfileOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE.toml", help="A cost profile: predict the points of the map that are not measured."),
]
ReadOption = Annotated[
    Path | None,
    typer.Option("--from", metavar="FILE.json", help="Measure nothing: show this report, and draw its --page."),
]
PageOption = Annotated[
    Path | None, typer.Option(metavar="FILE.html", help="A page of plots and the map of who is fastest where.")
]


def coldstart(
    preset: PresetOption = None,
    shape: TinyShapeOption = None,
    model: ModelOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    prompts: PromptsOption = None,
    ranks: PointRanksOption = None,
    targets: TargetsOption = None,
    adapters: AdaptersOption = None,
    tiers: TiersOption = None,
    links: LinksOption = None,
    samples: SamplesOption = None,
    decodes: DecodesOption = None,
    runs: RunsOption = 7,
    seconds: PointSecondsOption = 600.0,
    cpu_workers: CpuWorkersOption = None,
    torch_threads: TorchThreadsOption = 1,
    seed: SeedOption = None,
    profile: ProfileOption = None,
    read: ReadOption = None,
    page: PageOption = None,
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
            from segue.bench.coldstart.config import ColdstartConfig, default_workers
            from segue.bench.coldstart.run import run_coldstart_bench

            seed = seed or 0
            values = (prompts, ranks, targets, adapters, tiers, links)
            points, map_points = _points(preset, values, samples, decodes, seed)
            if preset is not None:
                dtype, device = dtype or "bfloat16", device or "cuda"
            default_shape = "tiny" if preset is None else "llama-3.1-8b"
            config = ColdstartConfig(
                points=points, map_points=map_points, profile=_profile(profile),
                **model_settings(shape, model, dtype, device, default_shape=default_shape),
                cpu_workers=default_workers() if cpu_workers is None else cpu_workers, torch_threads=torch_threads,
                runs=runs, seconds=seconds, seed=seed,
            )  # fmt: skip
            report = with_progress(lambda progress: run_coldstart_bench(config, progress))
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

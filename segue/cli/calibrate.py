"""``segue calibrate``: measure what the scheduler must know of this machine, and write it as a profile."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from segue.cli.bench_options import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    RanksOption,
    ShapeOption,
    TargetOption,
    TorchThreadsOption,
    model_settings,
    numbers,
)
from segue.cli.bench_report import check_outputs, show_console, with_progress, write_outputs
from segue.cli.common import UserError, one_line_errors

if TYPE_CHECKING:
    from segue.bench.calibrate.config import CalibrateConfig
    from segue.bench.calibrate.run import Calibration

# Points of a GPU: larger batches and prompts cost no more than small ones do on the CPU.
_CUDA = {
    "batches": (1, 4, 16, 32, 64, 128),
    "contexts": (128, 512, 1024),
    "prompts": (16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048),
}


def register(app: typer.Typer) -> None:
    app.command(name="calibrate")(calibrate)


def calibrate(
    model: ModelOption = None,
    shape: ShapeOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    targets: TargetOption = None,
    ranks: RanksOption = "8,16,32,64",
    batch: Annotated[str | None, typer.Option(metavar="N,...", help="Requests that decode together.")] = None,
    context: Annotated[str | None, typer.Option(metavar="N,...", help="Tokens of their prompts.")] = None,
    prompts: Annotated[str | None, typer.Option(metavar="N,...", help="Tokens of prompts alone.")] = None,
    cpu_workers: Annotated[
        int | None, typer.Option(metavar="N", help="As the server will have; default 2, 0: none.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(metavar="N", help="At most so many rounds through all points.")] = None,
    seconds: Annotated[float, typer.Option(metavar="LIMIT", help="All of it ends about then.")] = 110.0,
    torch_threads: TorchThreadsOption = 1,
    out: Annotated[Path, typer.Option(metavar="FILE.toml", help="The profile, for segue serve --profile.")] = Path(
        "profile.toml"
    ),
    json: JsonOption = None,
) -> None:
    """Measure this machine's steps, copies and CPU help, fit a cost profile and write it."""
    with one_line_errors():
        check_outputs(json, None)
        if not out.absolute().parent.is_dir():
            raise UserError(f"--out: {out.absolute().parent} is not a folder")
        config = _config(
            model, shape, dtype, device, targets=targets, seconds=seconds, torch_threads=torch_threads,
            ranks=numbers("--ranks", ranks), batches=_numbers("--batch", batch),
            contexts=_numbers("--context", context), prompts=_numbers("--prompts", prompts),
            cpu_workers=min(2, len(os.sched_getaffinity(0))) if cpu_workers is None else cpu_workers, rounds=rounds,
        )  # fmt: skip
        from segue.bench.calibrate.run import run_calibration

        calibration = with_progress(lambda progress: run_calibration(config, progress))
        write_outputs(calibration.report, json, None)
        _write_profile(calibration, out)
    _show(calibration, out)


def _numbers(option: str, text: str | None) -> tuple[int, ...] | None:
    return None if text is None else numbers(option, text)


def _config(
    model: Path | None, shape: str | None, dtype: str | None, device: str | None, **options: Any
) -> CalibrateConfig:
    from segue.bench.calibrate.config import CalibrateConfig

    given = {name: value for name, value in options.items() if value is not None}
    points = _CUDA if device == "cuda" else {}
    return CalibrateConfig(**model_settings(shape, model, dtype, device, default_shape="small"), **{**points, **given})


def _write_profile(calibration: Calibration, out: Path) -> None:
    from segue.bench.calibrate.profile_file import profile_text

    try:
        out.write_text(profile_text(calibration))
    except OSError as error:
        raise UserError(f"--out: {out}: {error.strerror}") from error


def _show(calibration: Calibration, out: Path) -> None:
    table = Table(box=None)
    for place, name in enumerate(("steps that the fit did not see", "R squared", "mean error", "largest")):
        table.add_column(name, justify="right" if place else "left")
    for name, found in calibration.report.settings["judgement"].items():
        errors = (f"{found[key]:.1%}" for key in ("mean_relative_error", "max_relative_error"))
        table.add_row(name, f"{found['r_squared']:.4f}", *errors)
    console = show_console()
    console.print(table)
    console.print(f"wrote {out}", highlight=False)

"""``segue bench``: measure on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from segue.cli.common import UserError, one_line_errors

if TYPE_CHECKING:
    from segue.bench.engine import EngineBenchConfig
    from segue.bench.report import Report

_DEFAULT_SHAPE = "small"
_WIDTH_WITHOUT_TERMINAL = 120


def register(app: typer.Typer) -> None:
    bench = typer.Typer(help="Measure on this machine.", no_args_is_help=True)
    bench.command(name="engine")(engine)
    app.add_typer(bench, name="bench")


def engine(
    shape: Annotated[
        str | None, typer.Option(metavar="NAME", help="A random model: tiny, small (default), medium, llama-3.1-8b.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The base model's folder, in place of --shape.")
    ] = None,
    dtype: Annotated[str, typer.Option(metavar="NAME", help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(metavar="NAME", help="Where the model runs.")] = "cpu",
    batches: Annotated[str, typer.Option(metavar="N,...", help="Requests that decode together.")] = "1,16",
    adapters: Annotated[
        str,
        typer.Option(metavar="N,...", help="Adapters that a batch mixes, as far as it has requests; 0: base model."),
    ] = "0,1,8",
    ranks: Annotated[str, typer.Option(metavar="N,...", help="The adapters' ranks, in turn.")] = "16",
    targets: Annotated[str, typer.Option(metavar="qkvo|all", help="The projections that adapters change.")] = "qkvo",
    prompt: Annotated[int, typer.Option(metavar="N", help="Tokens of each prompt.")] = 32,
    steps: Annotated[int, typer.Option(metavar="N", help="Decode steps to time in a round.")] = 40,
    repeats: Annotated[int, typer.Option(metavar="N", help="Rounds through all cases.")] = 5,
    torch_threads: Annotated[int, typer.Option(metavar="N", help="Threads of torch's matrix products.")] = 1,
    out: Annotated[Path | None, typer.Option(metavar="FILE.json", help="Write the report here.")] = None,
) -> None:
    """Time the engine's decode step by batch and adapter mix, and the time to a first token."""
    with one_line_errors():
        if shape is not None and model is not None:
            raise UserError("give --shape or --model, not both")
        if out is not None and not out.absolute().parent.is_dir():
            raise UserError(f"--out: {out.absolute().parent} is not a folder")
        from segue.bench.engine import EngineBenchConfig

        config = EngineBenchConfig(
            shape=shape or (None if model is not None else _DEFAULT_SHAPE),
            model_dir=None if model is None else str(model),
            dtype=dtype,
            device=device,
            batches=_numbers("--batches", batches),
            adapters=_numbers("--adapters", adapters),
            ranks=_numbers("--ranks", ranks),
            targets=targets,
            prompt=prompt,
            steps=steps,
            repeats=repeats,
            torch_threads=torch_threads,
        )
        report = _measured(config)
        if out is not None:
            _write(report, out)
    _show(report)


def _measured(config: EngineBenchConfig) -> Report:
    from segue.bench.driver import BenchmarkError
    from segue.bench.engine import run_engine_bench
    from segue.engine.models.config import ModelError

    console = Console(stderr=True)
    try:
        with console.status("") as status:
            return run_engine_bench(config, progress=status.update)
    except (BenchmarkError, ModelError, OSError) as error:
        raise UserError(str(error)) from error


def _write(report: Report, out: Path) -> None:
    try:
        report.write(out)
    except OSError as error:
        raise UserError(f"--out: {error}") from error


def _show(report: Report) -> None:
    from segue.bench.ratios import ratios

    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH_WITHOUT_TERMINAL)
    table = Table(box=None)
    table.add_column("measure")
    for name in ("batch", "adapters", "ranks", "prompt", "median", "p10", "p90", "runs", "tokens/s"):
        table.add_column(name, justify="right")
    for row in report.rows:
        times = (f"{value:.3f}" for value in (row.median, row.p10, row.p90))
        ranks = ",".join(map(str, row.ranks))
        prompt = "" if row.prompt is None else str(row.prompt)
        rate = f"{1e3 * row.batch / row.median:.0f}" if row.measure == "decode_step_ms" else ""
        table.add_row(row.measure, str(row.batch), str(row.adapters), ranks, prompt, *times, str(row.runs), rate)
    console.print(table)
    console.print()
    for ratio in ratios(report.rows):
        console.print(f"{ratio.value:8.2f}  {ratio.name}", highlight=False)


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"{option}: must be whole numbers with commas between them, is {text!r}") from None

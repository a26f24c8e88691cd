"""``segue bench``: measure on this machine."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from segue.cli.bench_coldload import coldload
from segue.cli.bench_coldstart import coldstart
from segue.cli.bench_model import DeviceOption, DtypeOption, ModelOption, TorchThreadsOption, shape_and_model
from segue.cli.bench_options import JsonOption, check_outputs, numbers, show_console, with_progress, write_outputs
from segue.cli.bench_scheduler import scheduler
from segue.cli.bench_simulate import simulate
from segue.cli.bench_slo import slo
from segue.cli.common import UserError, one_line_errors

if TYPE_CHECKING:
    from segue.bench.cases import Case
    from segue.bench.engine import EngineBenchConfig
    from segue.bench.kernels import KernelBenchConfig
    from segue.bench.report import Report
    from segue.bench.server import ServerBenchConfig

_DEFAULT_SHAPE = "small"

PlotOption = Annotated[
    Path | None, typer.Option("--plot", metavar="FILE", help="Draw it: .png or .svg; needs the extra 'bench'.")
]


PresetOption = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="table-8b: the table of an 8B model in bfloat16 on CUDA."),
]
ShapeOption = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="A random model: tiny, small (default), medium, llama-2-7b, llama-3.1-8b."),
]
BatchOption = Annotated[str | None, typer.Option(metavar="N,...", help="Requests that decode together; default 1,16.")]
MixOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME,...",
        help="base; one adapter for all; distinct: one for each request; ranks: distinct, of the ranks in turn; "
        "or a number. Default base,one,8.",
    ),
]
RanksOption = Annotated[str | None, typer.Option(metavar="N,...", help="The adapters' ranks; default 16.")]
TargetsOption = Annotated[
    str | None, typer.Option(metavar="qkvo|all,...", help="The projections that adapters change; default qkvo.")
]
PromptOption = Annotated[int | None, typer.Option(metavar="N", help="Tokens of each prompt; default 32.")]
TtftPromptsOption = Annotated[
    str | None, typer.Option(metavar="N,...", help="Prompts to time to the first token; default 16,128.")
]
StepsOption = Annotated[int, typer.Option(metavar="N", help="Decode steps to time in a round.")]
RunsOption = Annotated[int, typer.Option(metavar="N", help="Rounds through all cases.")]
SecondsOption = Annotated[float, typer.Option(metavar="LIMIT", help="No round begins later than this after the start.")]
PartsOption = Annotated[
    bool, typer.Option("--parts", help="Add what the device does in a decode step, by kind of kernel; on CUDA.")
]
_DISK_SHAPE = "llama-3.1-8b"


def register(app: typer.Typer) -> None:
    bench = typer.Typer(help="Measure on this machine.", no_args_is_help=True)
    bench.command(name="engine")(engine)
    bench.command(name="server")(server)
    bench.command(name="kernels")(kernels)
    bench.command(name="cpu")(cpu)
    bench.command(name="disk")(disk)
    bench.command(name="simulate")(simulate)
    bench.command(name="slo")(slo)
    bench.command(name="scheduler")(scheduler)
    bench.command(name="coldstart")(coldstart)
    bench.command(name="coldload")(coldload)
    app.add_typer(bench, name="bench")


def engine(
    preset: PresetOption = None,
    shape: ShapeOption = None,
    model: ModelOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    batch: BatchOption = None,
    mix: MixOption = None,
    ranks: RanksOption = None,
    targets: TargetsOption = None,
    prompt: PromptOption = None,
    ttft_prompts: TtftPromptsOption = None,
    steps: StepsOption = 40,
    runs: RunsOption = 5,
    seconds: SecondsOption = 240.0,
    torch_threads: TorchThreadsOption = 1,
    parts: PartsOption = False,
    json: JsonOption = None,
    plot: PlotOption = None,
) -> None:
    """Time the engine's decode step by batch and adapter mix, and the time to a first token."""
    with one_line_errors():
        check_outputs(json, plot)
        if preset is None:
            cases = _cases(batch, mix, ranks, targets, prompt, ttft_prompts)
        else:
            cases = _preset(preset, (batch, mix, ranks, targets, prompt, ttft_prompts))
            shape = shape or (None if model is not None else "llama-3.1-8b")
            dtype, device = dtype or "bfloat16", device or "cuda"
        config = _engine_config(
            cases, shape, model, dtype, device, steps=steps, runs=runs, seconds=seconds, torch_threads=torch_threads
        )
        config = dataclasses.replace(config, parts=parts)
        report = with_progress(lambda progress: _engine_report(config, progress))
        write_outputs(report, json, plot)
    _show(report)


def server(
    shape: ShapeOption = None,
    model: ModelOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    batch: Annotated[str, typer.Option(metavar="N,...", help="Streams that decode together.")] = "16",
    mix: Annotated[str, typer.Option(metavar="NAME,...", help="As of bench engine.")] = "base",
    ranks: RanksOption = None,
    targets: TargetsOption = None,
    prompt: PromptOption = None,
    max_tokens: Annotated[
        int, typer.Option(metavar="N", help="Tokens of each stream; none may end while it is measured.")
    ] = 1024,
    window: Annotated[float, typer.Option(metavar="SECONDS", help="Time to measure in a round.")] = 2.0,
    clients: Annotated[int, typer.Option(metavar="N", help="Processes that share the streams.")] = 1,
    runs: RunsOption = 5,
    seconds: SecondsOption = 240.0,
    torch_threads: TorchThreadsOption = 1,
    json: JsonOption = None,
    plot: PlotOption = None,
) -> None:
    """Time streams that decode together through gRPC, and how long the device waits between their steps."""
    with one_line_errors():
        check_outputs(json, plot)
        from segue.bench.cases import decode_cases
        from segue.bench.server import ServerBenchConfig

        cases = _cases(batch, mix, ranks, targets, prompt, None)
        config = ServerBenchConfig(
            engine=_engine_config(
                tuple(dataclasses.replace(case, when=None) for case in decode_cases(cases)),
                shape,
                model,
                dtype,
                device,
                steps=max_tokens,
                runs=runs,
                seconds=seconds,
                torch_threads=torch_threads,
            ),
            window_seconds=window,
            clients=clients,
        )
        report = with_progress(lambda progress: _server_report(config, progress))
        write_outputs(report, json, plot)
    _show(report)


def kernels(
    dtype: Annotated[str, typer.Option(metavar="NAME", help="bfloat16, float16 or float32.")] = "bfloat16",
    runs: Annotated[int, typer.Option(metavar="N", help="Replays of each graph to time.")] = 50,
    check_only: Annotated[
        bool,
        typer.Option(
            "--check-only", help="Compare with float64, time nothing; without CUDA interpreted, at small shapes."
        ),
    ] = False,
    json: JsonOption = None,
    plot: PlotOption = None,
) -> None:
    """Time the LoRA kernels on a CUDA device, each after a check against float64."""
    with one_line_errors():
        if check_only and (json is not None or plot is not None):
            raise UserError("--check-only measures nothing to write: leave out --json and --plot")
        check_outputs(json, plot)
        import torch

        # Triton reads it when it is first imported.
        if not torch.cuda.is_available():
            os.environ.setdefault("TRITON_INTERPRET", "1")
        try:
            from segue.bench.kernels import KernelBenchConfig
        except ImportError as error:
            raise UserError(f"the kernels need triton: {error}") from error
        config = KernelBenchConfig(dtype=dtype, runs=runs, check_only=check_only)
        if check_only:
            _show_checks(config)
            return
        report = with_progress(lambda progress: _kernel_report(config, progress))
        write_outputs(report, json, plot)
    _show(report)


def cpu(
    tokens: Annotated[str, typer.Option(metavar="N,...", help="Rows of a call.")] = "1,4,16,64,128,512",
    ranks: Annotated[str, typer.Option(metavar="N,...", help="The adapters' ranks.")] = "8,64,128",
    dtype: Annotated[str, typer.Option(metavar="NAME,...", help="float32, bfloat16.")] = "float32,bfloat16",
    runs: Annotated[int, typer.Option(metavar="N", help="Timings of each case.")] = 30,
    cores: Annotated[
        int, typer.Option(metavar="N", help="Also time pools of 1 to N workers, each on a core of its own.")
    ] = 0,
    json: JsonOption = None,
) -> None:
    """Time the CPU LoRA kernel and torch on one core, and pools of workers, each case after a check against float64.

    Widths are those of an 8B model: 4096 to 4096 (o) and 4096 to 6144 (q, k and v together).
    """
    with one_line_errors():
        check_outputs(json, None)
        from segue.bench.cpu import CpuBenchConfig, run_cpu_bench

        config = CpuBenchConfig(
            tokens=numbers("--tokens", tokens),
            ranks=numbers("--ranks", ranks),
            dtypes=tuple(dtype.split(",")),
            runs=runs,
            cores=cores,
        )
        report = with_progress(lambda progress: run_cpu_bench(config, progress))
        write_outputs(report, json, None)
    _show(report)


def disk(
    shape: Annotated[str, typer.Option(metavar="NAME", help="The model that the adapters are for.")] = _DISK_SHAPE,
    ranks: Annotated[str, typer.Option(metavar="N,...", help="The adapters' ranks.")] = "8,64",
    targets: Annotated[str, typer.Option(metavar="qkvo|all,...", help="What they change.")] = "qkvo,all",
    threads: Annotated[str, typer.Option(metavar="N,...", help="Threads that read.")] = "1,2,4",
    part_bytes: Annotated[int, typer.Option(metavar="N", help="The most that is read at a time.")] = 2 << 20,
    runs: Annotated[int, typer.Option(metavar="N", help="Timings of each case.")] = 20,
    json: JsonOption = None,
) -> None:
    """Time how adapters come from files in the page cache into host memory, alone and beside a busy loop."""
    with one_line_errors():
        check_outputs(json, None)
        from segue.bench.disk import DiskBenchConfig, run_disk_bench

        config = DiskBenchConfig(
            shape=shape,
            ranks=numbers("--ranks", ranks),
            targets=tuple(targets.split(",")),
            threads=numbers("--threads", threads),
            part_bytes=part_bytes,
            runs=runs,
        )
        report = with_progress(lambda progress: run_disk_bench(config, progress))
        write_outputs(report, json, None)
    _show(report)


def _cases(
    batch: str | None,
    mix: str | None,
    ranks: str | None,
    targets: str | None,
    prompt: int | None,
    ttft_prompts: str | None,
) -> tuple[Case, ...]:
    from segue.bench.cases import cross_cases

    return cross_cases(
        batches=numbers("--batch", batch or "1,16"),
        mixes=(mix or "base,one,8").split(","),
        ranks=numbers("--ranks", ranks or "16"),
        targets=(targets or "qkvo").split(","),
        prompt=32 if prompt is None else prompt,
        first_token_prompts=numbers("--ttft-prompts", ttft_prompts or "16,128"),
    )


def _preset(name: str, own_cases: tuple[object, ...]) -> tuple[Case, ...]:
    from segue.bench.cases import PRESETS

    if name not in PRESETS:
        raise UserError(f"--preset: must be one of {', '.join(PRESETS)}, is {name!r}")
    if any(option is not None for option in own_cases):
        raise UserError("--preset names all cases: leave out --batch, --mix, --ranks, --targets and the prompts")
    return PRESETS[name]


def _engine_config(
    cases: tuple[Case, ...],
    shape: str | None,
    model: Path | None,
    dtype: str | None,
    device: str | None,
    *,
    steps: int,
    runs: int,
    seconds: float,
    torch_threads: int,
) -> EngineBenchConfig:
    from segue.bench.engine import EngineBenchConfig

    shape, model_dir = shape_and_model(shape, model, _DEFAULT_SHAPE)
    return EngineBenchConfig(
        cases=cases,
        shape=shape,
        model_dir=model_dir,
        dtype=dtype or "float32",
        device=device or "cpu",
        steps=steps,
        repeats=runs,
        seconds=seconds,
        torch_threads=torch_threads,
    )


def _engine_report(config: EngineBenchConfig, progress: Callable[[str], None]) -> Report:
    from segue.bench.engine import run_engine_bench
    from segue.engine.models.config import ModelError

    try:
        return run_engine_bench(config, progress)
    except ModelError as error:
        raise UserError(str(error)) from error


def _server_report(config: ServerBenchConfig, progress: Callable[[str], None]) -> Report:
    from segue.bench.server import run_server_bench
    from segue.engine.models.config import ModelError

    try:
        return run_server_bench(config, progress)
    except ModelError as error:
        raise UserError(str(error)) from error


def _kernel_report(config: KernelBenchConfig, progress: Callable[[str], None]) -> Report:
    from segue.bench.kernels import run_kernel_bench

    return run_kernel_bench(config, progress)


def _show(report: Report) -> None:
    from segue.bench.ratios import ratios
    from segue.bench.tables import terminal_table

    console = show_console()
    console.print(terminal_table(report))
    console.print()
    for ratio in ratios(report.rows):
        console.print(f"{ratio.value:8.2f}  {ratio.name}", highlight=False)


def _show_checks(config: KernelBenchConfig) -> None:
    from segue.bench.kernels import check_kernels

    table = Table(box=None)
    for name in ("case", "point", "largest error over largest output"):
        table.add_column(name)
    for check in with_progress(lambda progress: check_kernels(config, progress)):
        table.add_row(check.case, check.point, f"{check.max_relative_error:.1e}")
    show_console().print(table)

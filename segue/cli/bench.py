"""``segue bench``: measure on this machine."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from segue.cli.bench_coldload import coldload
from segue.cli.bench_coldstart import coldstart
from segue.cli.bench_options import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    PlotOption,
    RanksOption,
    RoundsOption,
    SecondsOption,
    ShapeOption,
    TargetsOption,
    TimingsOption,
    TorchThreadsOption,
    model_settings,
    numbers,
    preset_of,
)
from segue.cli.bench_report import check_outputs, show_console, with_progress, write_outputs
from segue.cli.bench_scheduler import scheduler
from segue.cli.bench_simulate import simulate
from segue.cli.bench_slo import slo
from segue.cli.common import UserError, one_line_errors

if TYPE_CHECKING:
    from segue.bench.cases import Case
    from segue.bench.kernels import KernelBenchConfig
    from segue.bench.report import Report

_DEFAULT_SHAPE = "small"

PresetOption = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="table-8b: the table of an 8B model in bfloat16 on CUDA."),
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
MixRanksOption = Annotated[str | None, typer.Option(metavar="N,...", help="The adapters' ranks; default 16.")]
PromptOption = Annotated[int | None, typer.Option(metavar="N", help="Tokens of each prompt; default 32.")]
TtftPromptsOption = Annotated[
    str | None, typer.Option(metavar="N,...", help="Prompts to time to the first token; default 16,128.")
]
StepsOption = Annotated[int, typer.Option(metavar="N", help="Decode steps to time in a round.")]
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
    ranks: MixRanksOption = None,
    targets: TargetsOption = None,
    prompt: PromptOption = None,
    ttft_prompts: TtftPromptsOption = None,
    steps: StepsOption = 40,
    runs: RoundsOption = 5,
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
        from segue.bench.engine import EngineBenchConfig, run_engine_bench

        config = EngineBenchConfig(
            cases=cases, **model_settings(shape, model, dtype, device, default_shape=_DEFAULT_SHAPE),
            steps=steps, repeats=runs, seconds=seconds, torch_threads=torch_threads, parts=parts,
        )  # fmt: skip
        report = with_progress(lambda progress: run_engine_bench(config, progress))
        write_outputs(report, json, plot)
    _show(report)


def server(
    shape: ShapeOption = None,
    model: ModelOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    batch: Annotated[str, typer.Option(metavar="N,...", help="Streams that decode together.")] = "16",
    mix: Annotated[str, typer.Option(metavar="NAME,...", help="As of bench engine.")] = "base",
    ranks: MixRanksOption = None,
    targets: TargetsOption = None,
    prompt: PromptOption = None,
    max_tokens: Annotated[
        int, typer.Option(metavar="N", help="Tokens of each stream; none may end while it is measured.")
    ] = 1024,
    window: Annotated[float, typer.Option(metavar="SECONDS", help="Time to measure in a round.")] = 2.0,
    clients: Annotated[int, typer.Option(metavar="N", help="Processes that share the streams.")] = 1,
    runs: RoundsOption = 5,
    seconds: SecondsOption = 240.0,
    torch_threads: TorchThreadsOption = 1,
    json: JsonOption = None,
    plot: PlotOption = None,
) -> None:
    """Time streams that decode together through gRPC, and how long the device waits between their steps."""
    with one_line_errors():
        check_outputs(json, plot)
        from segue.bench.cases import decode_cases
        from segue.bench.engine import EngineBenchConfig
        from segue.bench.server import ServerBenchConfig, run_server_bench

        cases = decode_cases(_cases(batch, mix, ranks, targets, prompt, None))
        engine = EngineBenchConfig(
            cases=tuple(dataclasses.replace(case, when=None) for case in cases),
            **model_settings(shape, model, dtype, device, default_shape=_DEFAULT_SHAPE),
            steps=max_tokens, repeats=runs, seconds=seconds, torch_threads=torch_threads,
        )  # fmt: skip
        config = ServerBenchConfig(engine=engine, window_seconds=window, clients=clients)
        report = with_progress(lambda progress: run_server_bench(config, progress))
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
            from segue.bench.kernels import KernelBenchConfig, run_kernel_bench
        except ImportError as error:
            raise UserError(f"the kernels need triton: {error}") from error
        config = KernelBenchConfig(dtype=dtype, runs=runs, check_only=check_only)
        if check_only:
            _show_checks(config)
            return
        report = with_progress(lambda progress: run_kernel_bench(config, progress))
        write_outputs(report, json, plot)
    _show(report)


def cpu(
    tokens: Annotated[str, typer.Option(metavar="N,...", help="Rows of a call.")] = "1,4,16,64,128,512",
    ranks: RanksOption = "8,64,128",
    dtype: Annotated[str, typer.Option(metavar="NAME,...", help="float32, bfloat16.")] = "float32,bfloat16",
    runs: TimingsOption = 30,
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
    ranks: RanksOption = "8,64",
    targets: Annotated[str, typer.Option(metavar="qkvo|all,...", help="What they change.")] = "qkvo,all",
    threads: Annotated[str, typer.Option(metavar="N,...", help="Threads that read.")] = "1,2,4,8",
    part_bytes: Annotated[int, typer.Option(metavar="N", help="The most that is read at a time.")] = 2 << 20,
    runs: TimingsOption = 20,
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

    cases = preset_of(PRESETS, name)
    if any(option is not None for option in own_cases):
        raise UserError("--preset names all cases: leave out --batch, --mix, --ranks, --targets and the prompts")
    return cases


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

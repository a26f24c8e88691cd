"""``segue bench kernels``: each kernel against float64, then its time, on one layer of an 8B model (Llama 3.1).

A CUDA graph calls one LoRA point of many layers in turn, so that weights, inputs and outputs come from memory and not
from the L2. Times are per call, compared with the bytes of a call at the copy bandwidth measured in the same run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch

from segue.bench.driver import BenchmarkError
from segue.bench.graph_timing import copy_bytes_per_second, replay_seconds
from segue.bench.kernel_cases import CASES_8B, LLAMA_8B, SMALL, SMALL_CASES, KernelBatch, KernelCase, KernelModel
from segue.bench.kernel_landing import LandingBatch
from segue.bench.report import Percentiles, Report, Row
from segue.config import require, require_positive

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# One rounding of the output, and sums in float32.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
_ROTATED_BYTES = 400e6
_LEAST_LAYERS, _MOST_LAYERS = 6, 128
_LANDING_RANK = 64
_SMALL_LANDING_RANK = 8
_INTERPRETED_MULTIPROCESSORS = 2
_TARGETS = {"qkv": "qkvo", "o": "qkvo", "gate_up": "all", "down": "all"}


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelBenchConfig:
    """``check_only`` times nothing; without a CUDA device the kernels are then interpreted, at small shapes."""

    dtype: str = "bfloat16"
    runs: int = 50
    check_only: bool = False

    def __post_init__(self) -> None:
        require(self.dtype in _DTYPES, "dtype", f"must be one of {', '.join(_DTYPES)}, is {self.dtype!r}")
        require_positive(self, "runs")


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelCheck:
    """A kernel's largest error, as Row.max_relative_error."""

    case: str
    point: str
    max_relative_error: float


def check_kernels(config: KernelBenchConfig, progress: Callable[[str], None]) -> tuple[KernelCheck, ...]:
    """Run every kernel once on every case. Raises BenchmarkError for an error beyond rounding."""
    dtype = _DTYPES[config.dtype]
    cuda = torch.cuda.is_available()
    model, cases = (LLAMA_8B, CASES_8B) if cuda else (SMALL, SMALL_CASES)
    checks = []
    for case, point in _points(cases):
        progress(f"checking {case.name}, {point}")
        checks.append(_check(case, point, _batch(model, case, point, dtype), dtype))
    landing = LandingBatch(model, _LANDING_RANK if cuda else _SMALL_LANDING_RANK, dtype, _device())
    return (*checks, _check_landing(landing))


def run_kernel_bench(config: KernelBenchConfig, progress: Callable[[str], None]) -> Report:
    """Check and time. Raises BenchmarkError without a CUDA device, and for an error beyond rounding."""
    if not torch.cuda.is_available():
        raise BenchmarkError("timing kernels needs a CUDA device, and torch finds none; --check-only does without")
    dtype = _DTYPES[config.dtype]
    progress("measuring the copy bandwidth")
    bandwidth = copy_bytes_per_second()
    rows = []
    for case, point in _points(CASES_8B):
        progress(f"{case.name}, {point}")
        batch = _batch(LLAMA_8B, case, point, dtype)
        error = _check(case, point, batch, dtype).max_relative_error
        rows.append(_lora_row(case, point, batch, error, config.runs, bandwidth))
    progress("landing")
    rows.append(_landing_row(LandingBatch(LLAMA_8B, _LANDING_RANK, dtype, _device()), config.runs, bandwidth))
    settings = {**asdict(config), "copy_bytes_per_second": round(bandwidth)}
    return Report.here("kernels", settings, rows)


def _lora_row(case: KernelCase, point: str, batch: KernelBatch, error: float, runs: int, bandwidth: float) -> Row:
    layers = [batch.make_layer() for _ in range(_layers(batch.call_bytes))]

    def step() -> None:
        for layer in layers:
            batch.run(layer)

    times = Percentiles.of([seconds * 1e6 / len(layers) for seconds in replay_seconds(step, runs)])
    return Row(
        measure="lora_kernels_us",
        batch=len(case.rows),
        adapters=len(case.ranks),
        ranks=tuple(sorted(set(case.ranks))),
        targets=_TARGETS[point],
        case=case.name,
        tokens=sum(case.rows),
        point=point,
        bytes=batch.call_bytes,
        copy_fraction=batch.call_bytes / bandwidth / (times.median * 1e-6),
        max_relative_error=error,
        median=times.median,
        p10=times.p10,
        p90=times.p90,
        runs=times.runs,
    )


def _landing_row(batch: LandingBatch, runs: int, bandwidth: float) -> Row:
    error = _check_landing(batch).max_relative_error
    layers = [batch.make_layer() for _ in range(_layers(batch.call_bytes))]

    def step() -> None:
        for layer in layers:
            batch.run(layer)

    times = Percentiles.of([seconds * 1e6 / len(layers) for seconds in replay_seconds(step, runs)])
    return Row(
        measure="landing_kernel_us",
        batch=0,
        adapters=1,
        ranks=(batch.rank,),
        targets="qkvo",
        case=batch.name,
        point="qkv+o",
        bytes=batch.call_bytes,
        copy_fraction=batch.call_bytes / bandwidth / (times.median * 1e-6),
        max_relative_error=error,
        median=times.median,
        p10=times.p10,
        p90=times.p90,
        runs=times.runs,
    )


def _points(cases: tuple[KernelCase, ...]) -> Iterator[tuple[KernelCase, str]]:
    return ((case, point) for case in cases for point in case.points)


def _batch(model: KernelModel, case: KernelCase, point: str, dtype: torch.dtype) -> KernelBatch:
    device = _device()
    processors = _INTERPRETED_MULTIPROCESSORS
    if device == "cuda":
        processors = torch.cuda.get_device_properties(0).multi_processor_count
    return KernelBatch(model, case, point, dtype, device, processors)


def _check(case: KernelCase, point: str, batch: KernelBatch, dtype: torch.dtype) -> KernelCheck:
    error = batch.max_relative_error(batch.make_layer())
    # Not "error > ...": NaN must not pass.
    if not error <= TOLERANCE[dtype]:
        raise BenchmarkError(f"{case.name}, {point}: the kernels are wrong by {error:.2g} of the largest output")
    return KernelCheck(case=case.name, point=point, max_relative_error=error)


def _check_landing(batch: LandingBatch) -> KernelCheck:
    if not batch.lands_exactly():
        raise BenchmarkError(f"{batch.name}: the pages differ from what the matrices hold")
    return KernelCheck(case=batch.name, point="qkv+o", max_relative_error=0.0)


def _layers(call_bytes: int) -> int:
    return int(min(max(_ROTATED_BYTES / call_bytes, _LEAST_LAYERS), _MOST_LAYERS))


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"

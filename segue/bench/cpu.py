"""``segue bench cpu``: the CPU LoRA kernel against torch on one core, and a pool of workers over several.

Weights are many equal sets used in turn, more than the caches hold, so that they come from memory, as those of an
adapter do that is used once per layer. Every case is compared with float64 before it is timed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import numpy as np
import torch

from segue.bench.cpu_pool import PoolRunner
from segue.bench.cpu_shapes import POINTS, CpuCase, WeightSets, matrices, relative_error
from segue.bench.report import Percentiles, Report, Row
from segue.config import require, require_positive
from segue.cpu_lora.elements import ElementType
from segue.cpu_lora.kernels import ROW_TILE, Scratch, lora_delta

_TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_ELEMENTS = {"float32": ElementType.FLOAT32, "bfloat16": ElementType.BFLOAT16}


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuBenchConfig:
    """Every case is one of ``tokens`` by ``ranks`` by ``dtypes``, at both LoRA points (POINTS).

    ``runs`` are the timings of each; ``cores`` are up to how many workers a pool has, 0 for none.
    """

    tokens: tuple[int, ...] = (1, 4, 16, 64, 128, 512)
    ranks: tuple[int, ...] = (8, 64, 128)
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    runs: int = 30
    cores: int = 0

    def __post_init__(self) -> None:
        for name in ("tokens", "ranks"):
            values = getattr(self, name)
            require(bool(values) and min(values) > 0, name, f"must be positive numbers, is {values}")
        require(max(self.ranks) <= 1024, "ranks", f"must be at most 1024, is {self.ranks}")
        for dtype in self.dtypes:
            require(dtype in _ELEMENTS, "dtypes", f"must be of {', '.join(_ELEMENTS)}, is {dtype!r}")
        require_positive(self, "runs")
        usable = len(os.sched_getaffinity(0))
        require(0 <= self.cores <= usable, "cores", f"must be 0 to {usable}, the cores of this process: {self.cores}")

    def cases(self) -> Iterator[CpuCase]:
        """All of them."""
        for dtype in self.dtypes:
            for rank in self.ranks:
                for point in POINTS:
                    for tokens in self.tokens:
                        yield CpuCase(tokens=tokens, rank=rank, point=point, element=_ELEMENTS[dtype], dtype=dtype)


def run_cpu_bench(config: CpuBenchConfig, progress: Callable[[str], None]) -> Report:
    """Check and time. Raises BenchmarkError for an error beyond rounding, and where workers do not start."""
    rows: list[Row] = []
    with _one_core():
        for case in config.cases():
            progress(f"{case.name}, {case.point}")
            rows += _one_core_rows(case, config.runs)
    for workers in range(1, config.cores + 1):
        progress(f"starting {workers} workers")
        with PoolRunner.for_cases(list(config.cases()), workers) as runner:
            for case in config.cases():
                progress(f"{case.name}, {case.point}, {workers} workers")
                seconds, error = runner.job_seconds(case, config.runs)
                rows.append(_row("cpu_workers_us", case, seconds, error, workers))
    return Report.here("cpu", asdict(config), rows)


def _one_core_rows(case: CpuCase, runs: int) -> list[Row]:
    """The kernel's and torch's row, timed in turn."""
    x, a, b = matrices(case)
    item = case.element.item_bytes
    y_at = -(-x.nbytes // 64) * 64
    weights_at = y_at + -(-case.tokens * case.out_features * item // 64) * 64
    memory = np.zeros(weights_at + WeightSets.size_bytes(case), np.uint8)
    memory[: x.nbytes] = x.view(np.uint8).reshape(-1)
    sets = WeightSets(case, memory[weights_at:], a, b)
    floats, halves, scratch = memory.view(np.float32), memory.view(np.uint16), Scratch.allocate()

    def kernel(turn: int) -> None:
        a_at, b_at = (weights_at + offset for offset in sets.offsets(turn))
        for t in range(0, case.tokens, ROW_TILE):
            lora_delta(
                floats, halves, int(case.element), t * case.in_features * item, y_at + t * case.out_features * item,
                case.out_features, min(ROW_TILE, case.tokens - t), case.in_features, case.out_features,
                int(case.element), case.rank, a_at, b_at, 1.0, scratch,
            )  # fmt: skip

    def tensor(start: int, rows: int, columns: int) -> torch.Tensor:
        octets = torch.from_numpy(memory[start : start + rows * columns * item])
        return octets.view(_TORCH_DTYPES[case.dtype]).view(rows, columns)

    torch_x = tensor(0, case.tokens, case.in_features)
    torch_sets = [
        (
            tensor(weights_at + a_at, case.rank, case.in_features).T,
            tensor(weights_at + b_at, case.out_features, case.rank).T,
        )
        for a_at, b_at in map(sets.offsets, range(sets.count))
    ]

    def peer(turn: int) -> None:
        # Half a round behind the kernel, which must not have brought the set into the caches.
        left, right = torch_sets[(turn + sets.count // 2) % sets.count]
        (torch_x @ left) @ right

    kernel(0)
    size = case.tokens * case.out_features * item
    error = relative_error(case, memory[y_at : y_at + size], x, a, b)
    kernel_seconds, peer_seconds = _interleaved([kernel, peer], runs)
    return [_row("cpu_kernel_us", case, kernel_seconds, error, 1), _row("torch_us", case, peer_seconds, None, 1)]


def _interleaved(calls: Sequence[Callable[[int], None]], runs: int) -> list[list[float]]:
    seconds: list[list[float]] = [[] for _ in calls]
    for turn in range(-2, runs):
        for call, timings in zip(calls, seconds, strict=True):
            start_seconds = time.perf_counter()
            call(turn)
            if turn >= 0:
                timings.append(time.perf_counter() - start_seconds)
    return seconds


def _row(measure: str, case: CpuCase, seconds: Sequence[float], error: float | None, cores: int) -> Row:
    times = Percentiles.of([value * 1e6 for value in seconds])
    return Row(
        measure=measure,
        batch=1,
        adapters=1,
        ranks=(case.rank,),
        case=case.name,
        tokens=case.tokens,
        point=case.point,
        dtype=case.dtype,
        cores=cores,
        bytes=case.call_bytes,
        max_relative_error=error,
        median=times.median,
        p10=times.p10,
        p90=times.p90,
        runs=times.runs,
    )


@contextmanager
def _one_core() -> Iterator[None]:
    """This thread on the last core that it may use, and torch on this thread alone."""
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(threads)

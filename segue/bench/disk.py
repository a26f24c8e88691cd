"""``segue bench disk``: adapters from files in the page cache into host memory, as the engine's reader threads do it.

Beside it stands what the machine allows: one thread that only reads the file to the same place, and a copy in memory.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from segue.bench.driver import BenchmarkError
from segue.bench.random_checkpoints import Targets, write_random_adapter
from segue.bench.report import Percentiles, Report, Row
from segue.bench.shapes import SHAPES
from segue.config import require, require_positive
from segue.cpu_lora import CpuLoraConfig, SharedLayout, SharedMemory
from segue.engine.lora.catalog import AdapterCatalog
from segue.engine.lora.file_runs import ReadRuns, Target
from segue.engine.lora.host_plan import HostPlan
from segue.engine.lora.reader import ReaderPool, ReadLimits
from segue.engine.lora.transfer import Completion, LayerRead, ReadEnded, ReadJob
from segue.engine.models.config import ModelConfig

_ALIGNED_BYTES = 4096
_FLOOR_PIECE_BYTES = 1 << 20
_PATIENCE_SECONDS = 60.0
# What a step of the loop does between two calls that give the GIL away.
_LOOP_CALLS = 10
_LEAST_TURNS = 200
_LEAST_TURNS_SECONDS = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskBenchConfig:
    """Adapters of ``ranks`` on ``targets`` (qkvo, all) for a model of ``shape``, read by each number of ``threads``."""

    shape: str = "llama-3.1-8b"
    ranks: tuple[int, ...] = (8, 64)
    targets: tuple[str, ...] = ("qkvo", "all")
    threads: tuple[int, ...] = (1, 2, 4)
    part_bytes: int = ReadLimits().part_bytes
    runs: int = 20

    def __post_init__(self) -> None:
        require(self.shape in SHAPES, "shape", f"must be one of {', '.join(SHAPES)}, is {self.shape!r}")
        for name in ("ranks", "threads"):
            values = getattr(self, name)
            require(bool(values) and min(values) > 0, name, f"must be positive numbers, is {values}")
        known = [item.value for item in Targets]
        for targets in self.targets:
            require(targets in known, "targets", f"must be of {', '.join(known)}, is {targets!r}")
        require_positive(self, "runs", "part_bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Adapter:
    rank: int
    targets: str
    job: ReadJob
    memory: npt.NDArray[np.uint8]


@dataclass(slots=True)
class _Timings:
    """Seconds: of whole adapters, until the first layer was there, and of a process's cores."""

    whole: list[float] = field(default_factory=list)
    first_layer: list[float] = field(default_factory=list)
    cores: list[float] = field(default_factory=list)


def run_disk_bench(config: DiskBenchConfig, progress: Callable[[str], None]) -> Report:
    """Read and time. Raises BenchmarkError where a read fails, OSError and MemoryError."""
    rows: list[Row] = []
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for targets in config.targets:
            for rank in config.ranks:
                progress(f"rank {rank}, {targets}")
                with _adapter(config.shape, rank, targets) as adapter:
                    rows += _adapter_rows(adapter, config)
    finally:
        torch.set_num_threads(torch_threads)
    return Report.here("disk", asdict(config), rows)


@contextmanager
def _adapter(shape: str, rank: int, targets: str) -> Iterator[_Adapter]:
    """One that has been written just now and is in the page cache, and memory for it as the engine's host store has."""
    with tempfile.TemporaryDirectory(prefix="segue-bench-") as folder:
        root = Path(folder)
        (root / "model").mkdir()
        (root / "model" / "config.json").write_text(json.dumps(SHAPES[shape].config_json("bfloat16")))
        model = ModelConfig.load(root / "model")
        (root / "adapters").mkdir()
        directory = root / "adapters" / "one"
        write_random_adapter(directory, model, rank=rank, targets=Targets(targets), dtype=torch.bfloat16)
        with AdapterCatalog(root / "adapters", model, rank).lookup("one") as opened:
            assert opened.fileno is not None
            plan = HostPlan.of(opened.manifest, torch.bfloat16.itemsize)
            store_bytes = -(-plan.host_bytes // _ALIGNED_BYTES) * _ALIGNED_BYTES
            layout = CpuLoraConfig(workers=0, row_bytes=64, delta_bytes=64, store_bytes=store_bytes)
            memory = SharedMemory.create(SharedLayout.plan(layout))
            try:
                memory.allocate_store(store_bytes)
                job = ReadJob(
                    version_id=1,
                    descriptor=opened.fileno,
                    identity=opened.manifest.identity,
                    plan=plan,
                    copy_offset=0,
                )
                yield _Adapter(rank=rank, targets=targets, job=job, memory=memory.store)
            finally:
                memory.close()


def _adapter_rows(adapter: _Adapter, config: DiskBenchConfig) -> list[Row]:
    rows = [
        _row("read_floor_ms", adapter, _timed(lambda: _read_only(adapter), config.runs), 1),
        _row("memory_copy_ms", adapter, _copy_seconds(adapter, config.runs), 1),
        _row("read_bookkeeping_ms", adapter, _pool_times(adapter, config, 1, _read_nothing).cores, 1),
    ]
    for threads in config.threads:
        times = _pool_times(adapter, config, threads, Target.read)
        rows.append(_row("read_adapter_ms", adapter, times.whole, threads))
        rows.append(_row("read_first_layer_ms", adapter, times.first_layer, threads))
        with _busy_loop() as turns:
            while len(turns) < _LEAST_TURNS:
                time.sleep(_LEAST_TURNS_SECONDS)
            alone = list(turns)
            turns.clear()
            beside = _Timings()
            while not beside.whole or len(turns) < _LEAST_TURNS:
                beside = _pool_times(adapter, config, threads, Target.read)
            disturbed = list(turns)
        rows.append(_row("read_beside_loop_ms", adapter, beside.whole, threads))
        rows.append(_row("loop_turn_alone_ms", adapter, alone, threads))
        rows.append(_row("loop_turn_beside_ms", adapter, disturbed, threads))
    return rows


def _pool_times(adapter: _Adapter, config: DiskBenchConfig, threads: int, read_runs: ReadRuns) -> _Timings:
    """One round before the first is not kept. Raises BenchmarkError."""
    ended = threading.Event()
    reports: list[Completion] = []

    def report(completion: Completion) -> None:
        reports.append(completion)
        if isinstance(completion, ReadEnded):
            ended.set()

    pool = ReaderPool(
        host=torch.from_numpy(adapter.memory),
        make_touchable=lambda _: None,
        dtype=torch.bfloat16,
        read_runs=read_runs,
        report=report,
        wake=lambda: None,
        limits=ReadLimits(threads=threads, part_bytes=config.part_bytes),
    )
    times = _Timings()
    try:
        for turn in range(-1, config.runs):
            ended.clear()
            reports.clear()
            start_cores, start = time.process_time(), time.monotonic()
            pool.put(adapter.job, urgent=True)
            if not ended.wait(_PATIENCE_SECONDS):
                raise BenchmarkError(f"the adapter was not read in {_PATIENCE_SECONDS:.0f} seconds")
            *layers, end = reports
            if not isinstance(end, ReadEnded) or not end.verified or not isinstance(layers[0], LayerRead):
                raise BenchmarkError(f"the adapter could not be read: {layers[-1]}")
            if turn >= 0:
                times.whole.append(end.monotonic_seconds - start)
                times.first_layer.append(layers[0].monotonic_seconds - start)
                times.cores.append(time.process_time() - start_cores)
    finally:
        pool.close()
    return times


def _read_nothing(_target: Target, _descriptor: int, runs: npt.NDArray[np.int64], _offset: int) -> int:
    """As if all had been read, so that what is left is what the threads do besides."""
    return int(runs[2::3].sum())


def _read_only(adapter: _Adapter) -> None:
    done, total, view = 0, adapter.job.plan.host_bytes, adapter.memory.data
    while done < total:
        done += os.preadv(adapter.job.descriptor, [view[done : min(total, done + _FLOOR_PIECE_BYTES)]], done)


def _copy_seconds(adapter: _Adapter, runs: int) -> list[float]:
    source = adapter.memory.copy()
    return _timed(lambda: np.copyto(adapter.memory, source), runs)


def _timed(call: Callable[[], None], runs: int) -> list[float]:
    seconds = []
    for turn in range(-1, runs):
        start = time.perf_counter()
        call()
        if turn >= 0:
            seconds.append(time.perf_counter() - start)
    return seconds


@contextmanager
def _busy_loop() -> Iterator[list[float]]:
    """A thread that makes small calls to torch all the time, as the engine's loop does; the seconds of each turn."""
    turns: list[float] = []
    stopped = threading.Event()

    def run() -> None:
        values = torch.zeros(16, 16)
        while not stopped.is_set():
            start = time.perf_counter()
            for _ in range(_LOOP_CALLS):
                values.add_(1)
            turns.append(time.perf_counter() - start)

    thread = threading.Thread(target=run, name="segue-bench-loop")
    thread.start()
    try:
        yield turns
    finally:
        stopped.set()
        thread.join()


def _row(measure: str, adapter: _Adapter, seconds: list[float], threads: int) -> Row:
    times = Percentiles.of([1e3 * value for value in seconds])
    return Row(
        measure=measure,
        batch=1,
        adapters=1,
        ranks=(adapter.rank,),
        targets=adapter.targets,
        case=f"rank {adapter.rank}",
        point=adapter.targets,
        dtype="bfloat16",
        cores=threads,
        bytes=adapter.job.plan.host_bytes,
        median=times.median,
        p10=times.p10,
        p90=times.p90,
        runs=times.runs,
    )

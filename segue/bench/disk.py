"""``segue bench disk``: adapters from files in the page cache into host memory, as the engine's reader threads do it.

Alone, and beside a loop whose turns hold the GIL, as the engine's loop does. Beside it stands what the machine allows:
one thread that only reads the file to the same place, and a copy in memory.
"""

from __future__ import annotations

import json
import os
import select
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
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
from segue.engine.interpreter import SWITCH_SECONDS
from segue.engine.lora.catalog import AdapterCatalog
from segue.engine.lora.host_plan import HostPlan
from segue.engine.lora.reader import ReaderPool, ReadLimits
from segue.engine.lora.transfer import LayerRead, ReadEnded, ReadJob, ReadReport
from segue.engine.models.config import ModelConfig

_ALIGNED_BYTES = 4096
_FLOOR_PIECE_BYTES = 1 << 20
_PATIENCE_SECONDS = 60.0
_TURN_ADDITIONS = 10_000
_LEAST_TURNS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskBenchConfig:
    """Adapters of ``ranks`` on ``targets`` (qkvo, all) for a model of ``shape``, read by each number of ``threads``."""

    shape: str = "llama-3.1-8b"
    ranks: tuple[int, ...] = (8, 64)
    targets: tuple[str, ...] = ("qkvo", "all")
    threads: tuple[int, ...] = (1, 2, 4, 8)
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
    """Seconds of reads: until all was there and the file unchanged, until the last and the first layer were there, and
    what the thread that asks for reads computes for them."""

    whole: list[float] = field(default_factory=list)
    last_layer: list[float] = field(default_factory=list)
    first_layer: list[float] = field(default_factory=list)
    bookkeeping: list[float] = field(default_factory=list)


def run_disk_bench(config: DiskBenchConfig, progress: Callable[[str], None]) -> Report:
    """Read and time. Raises BenchmarkError where a read fails, OSError and MemoryError."""
    rows: list[Row] = []
    torch_threads, switch_seconds = torch.get_num_threads(), sys.getswitchinterval()
    torch.set_num_threads(1)
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        for targets in config.targets:
            for rank in config.ranks:
                progress(f"rank {rank}, {targets}")
                with _adapter(config.shape, rank, targets) as adapter:
                    rows += _adapter_rows(adapter, config)
    finally:
        torch.set_num_threads(torch_threads)
        sys.setswitchinterval(switch_seconds)
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


class _Reader:
    """Reads one adapter again and again, as the engine's loop does."""

    def __init__(self, adapter: _Adapter, wake_fd: int, limits: ReadLimits) -> None:
        self._job = adapter.job
        self._wake_fd = wake_fd
        self._pool = ReaderPool(
            host=torch.from_numpy(adapter.memory),
            ready_bytes=lambda: len(adapter.memory),
            make_touchable=lambda _: None,
            dtype=torch.bfloat16,
            read_runs=None,
            wake_fd=wake_fd,
            limits=limits,
        )

    def close(self) -> None:
        self._pool.close()

    def read(self, times: _Timings, between: Callable[[], None]) -> None:
        """Read once more, looking for what there is behind each call of ``between``. Raises BenchmarkError."""
        job = replace(self._job)
        reports: list[ReadReport] = []
        start = time.monotonic()
        self._pool.put(job, urgent=True)
        bookkeeping = time.monotonic() - start
        while not reports or not isinstance(reports[-1], ReadEnded):
            between()
            look = time.monotonic()
            if look - start > _PATIENCE_SECONDS:
                raise BenchmarkError(f"the adapter was not read in {_PATIENCE_SECONDS:.0f} seconds")
            reports += self._pool.completed()
            bookkeeping += time.monotonic() - look
        *layers, end = reports
        if (
            not isinstance(end, ReadEnded)
            or not end.verified
            or not all(isinstance(layer, LayerRead) for layer in layers)
        ):
            raise BenchmarkError(f"the adapter could not be read: {layers[-1]}")
        times.whole.append(end.monotonic_seconds - start)
        times.last_layer.append(layers[-1].monotonic_seconds - start)
        times.first_layer.append(layers[0].monotonic_seconds - start)
        times.bookkeeping.append(bookkeeping)

    def wait(self) -> None:
        """Until something has come."""
        if select.select([self._wake_fd], [], [], _PATIENCE_SECONDS)[0]:
            os.eventfd_read(self._wake_fd)


@contextmanager
def _reader(adapter: _Adapter, limits: ReadLimits) -> Iterator[_Reader]:
    wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    reader = _Reader(adapter, wake_fd, limits)
    try:
        yield reader
    finally:
        reader.close()
        os.close(wake_fd)


def _adapter_rows(adapter: _Adapter, config: DiskBenchConfig) -> list[Row]:
    rows = [
        _row("read_floor_ms", adapter, _timed(lambda: _read_only(adapter), config.runs), 1),
        _row("memory_copy_ms", adapter, _copy_seconds(adapter, config.runs), 1),
    ]
    for threads in config.threads:
        alone, beside = _Timings(), _Timings()
        with _reader(adapter, ReadLimits(threads=threads, part_bytes=config.part_bytes)) as reader:
            reader.read(_Timings(), reader.wait)
            for _ in range(config.runs):
                reader.read(alone, reader.wait)
            turns_alone = _timed(_loop_turn, _LEAST_TURNS)
            turns_beside = _beside_loop(reader, beside, config.runs)
        for measure, seconds in (
            ("read_adapter_ms", alone.whole),
            ("read_layers_ms", alone.last_layer),
            ("read_first_layer_ms", alone.first_layer),
            ("read_bookkeeping_ms", alone.bookkeeping),
            ("read_beside_loop_ms", beside.whole),
            ("layers_beside_loop_ms", beside.last_layer),
            ("loop_turn_alone_ms", turns_alone),
            ("loop_turn_beside_ms", turns_beside),
        ):
            rows.append(_row(measure, adapter, seconds, threads))
    return rows


def _loop_turn() -> None:
    """Some tenths of a millisecond in which the GIL is never given away but for who asks, as planning a step is."""
    total = 0
    for index in range(_TURN_ADDITIONS):
        total += index & 7


def _beside_loop(reader: _Reader, times: _Timings, runs: int) -> list[float]:
    """Read so many times beside a loop that looks for layers between two turns; what the turns took meanwhile."""
    turns: list[float] = []

    def turn() -> None:
        start = time.perf_counter()
        _loop_turn()
        turns.append(time.perf_counter() - start)

    for _ in range(runs):
        reader.read(times, turn)
    return turns


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

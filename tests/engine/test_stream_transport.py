"""Rows to real workers and deltas back through the kernels, in a stream's order: every value, round after round.

Without a GPU the kernels run in Triton's interpreter and the stream is a FakeFlags; with one they are compiled, and the
stream's operations are the driver's.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch import Tensor

from segue.cpu_lora import DeltaTask, Job, JobRing, JobState
from segue.engine.cuda.bridge import StreamFlags, StreamTransport
from segue.engine.lora.bridge import (
    ColumnRanges,
    CpuBridge,
    PointWork,
    PostedJob,
    WorkerLostError,
    as_tensor,
    element_type,
)
from segue.engine.lora.device_lora import LoraSegment
from segue.engine.lora.link_throttle import LinkThrottle
from tests.cpu_lora.rig import Rig, running_rigs, wait_until
from tests.engine.fake_flags import FakeFlags

DEVICES = [
    pytest.param(
        "cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled where there is one")
    ),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
ROUNDS = {"cpu": 60, "cuda": 10_000}
MOST_ROWS = {"cpu": 12, "cuda": 129}
# (in, out) features of two projections that share their input, as at a LoRA point.
SHAPES = ((64, (64, 32)), (72, (40, 72)), (256, (192, 64)), (33, (7, 65)))
GAP = 5
SLOTS = 8


class NanRing(JobRing):
    """Fills the buffers of each job with NaN, so that what nobody writes is found."""

    def prepare(self, *args: Any, **kwargs: Any) -> Job | None:
        job = super().prepare(*args, **kwargs)
        if job is not None:
            as_tensor(job.rows).fill_(torch.nan)
            as_tensor(job.deltas_buffer).fill_(torch.nan)
        return job


@dataclass
class FakeHolds:
    """Counts who holds which version."""

    counts: Counter[int] = field(default_factory=Counter)

    def hold_host(self, version_id: int) -> None:
        self.counts[version_id] += 1

    def drop_host(self, version_id: int) -> None:
        assert self.counts[version_id] > 0
        self.counts[version_id] -= 1


@dataclass(frozen=True)
class Module:
    """A and B as the workers have them, and as float64 on the device."""

    rank: int
    a_offset_bytes: int
    b_offset_bytes: int
    scale: float
    a: Tensor
    b: Tensor


@dataclass
class StreamRig:
    """Real workers behind a stream."""

    rig: Rig
    flags: StreamFlags
    device: torch.device
    holds: FakeHolds = field(default_factory=FakeHolds)

    def __post_init__(self) -> None:
        self.ring = NanRing(self.rig.pool)
        transport = StreamTransport(self.ring, self.flags)
        self.bridge = CpuBridge(self.rig.pool, self.ring, transport, LinkThrottle(None), self.holds)

    def put(self, matrix: Tensor) -> int:
        """Copy a matrix to the store; its byte offset."""
        bits = matrix.view(torch.int16).numpy().view(np.uint16) if matrix.dtype is torch.bfloat16 else matrix.numpy()
        return self.rig.put(bits)

    def module(self, rank: int, in_features: int, out_features: int, dtype: torch.dtype) -> Module:
        a, b = torch.randn(rank, in_features).to(dtype), torch.randn(out_features, rank).to(dtype)
        return Module(rank, self.put(a), self.put(b), 0.5, a.double().to(self.device), b.double().to(self.device))

    def post(
        self, x: Tensor, segments: tuple[LoraSegment, ...], tasks: Sequence[DeltaTask], delta_width: int
    ) -> PostedJob:
        """Post a job as soon as there is a slot."""
        deadline = time.monotonic() + 20
        self.bridge.reap()
        work = PointWork(segments=segments, tasks=tuple(tasks), delta_width=delta_width)
        while (posted := self.bridge.post(x, work)) is None:
            assert time.monotonic() < deadline, "no slot and no worker"
            time.sleep(20e-6)
            self.bridge.reap()
        return posted

    def finish(self) -> None:
        """Wait for everything that is under way."""

        def is_over() -> bool:
            self.bridge.reap()
            return self.bridge.orphans == 0

        assert wait_until(is_over)
        assert self.ring.free_slots == SLOTS
        assert not +self.holds.counts
        self.bridge.check()


@pytest.fixture(params=DEVICES)
def stream_rig(request: pytest.FixtureRequest) -> Iterator[StreamRig]:
    with running_rigs() as start:
        rig = start(
            workers=2, slots=SLOTS, stall_seconds=0.5, row_bytes=1 << 19, delta_bytes=1 << 19, store_bytes=1 << 25
        )
        if request.param == "cpu":
            yield StreamRig(rig, FakeFlags(rig.memory), torch.device("cpu"))
            return
        from segue.engine.cuda.stream_flags import DriverFlags
        from segue.engine.device import CudaStreams

        streams = CudaStreams()
        streams.register_host(rig.memory.address, rig.memory.size_bytes)
        lane: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(lane):
            stream_rig = StreamRig(rig, DriverFlags(rig.memory.address, streams.device), streams.device)
            yield stream_rig
        # Answers what a stream may still wait for.
        rig.pool.close()
        stream_rig.bridge.close()
        streams.unregister_host(rig.memory.address)


@dataclass(frozen=True)
class Case:
    """One or two segments of a batch, and each one's modules, None where it has none."""

    in_features: int
    widths: tuple[int, ...]
    segments: tuple[LoraSegment, ...]
    modules: tuple[tuple[Module | None, ...], ...]
    rows: int

    @property
    def columns(self) -> ColumnRanges:
        """Side by side in the reply, ``GAP`` columns apart in the output, which begins with as many."""
        left = 0
        ranges = []
        for index, width in enumerate(self.widths):
            ranges.append((left, left + GAP * (index + 1), width))
            left += width
        return tuple(ranges)

    def tasks(self, dtype: torch.dtype) -> list[DeltaTask]:
        tasks = []
        row = 0
        for segment, modules in zip(self.segments, self.modules, strict=True):
            stop = row + segment.row_stop - segment.row_start
            for (left, _, width), module in zip(self.columns, modules, strict=True):
                place: dict[str, Any] = {"row_start": row, "row_stop": stop, "out_offset": left, "out_features": width}
                if module is None:
                    tasks.append(DeltaTask(**place, rank=0))
                    continue
                tasks.append(
                    DeltaTask(
                        **place,
                        rank=module.rank,
                        a_offset_bytes=module.a_offset_bytes,
                        b_offset_bytes=module.b_offset_bytes,
                        scale=module.scale,
                        dtype=element_type(dtype),
                    )
                )
            row = stop
        return tasks

    def worst_error(self, x: Tensor, before: Tensor, out: Tensor) -> Tensor:
        """The largest error of any value as a share of what rounding explains, on the device; NaN where one is wrong.

        Elsewhere ``out`` must be as ``before``, in which NaN stands between the columns.
        """
        expected, bound = before.double(), torch.zeros_like(before, dtype=torch.float64)
        for segment, modules in zip(self.segments, self.modules, strict=True):
            rows = slice(segment.row_start, segment.row_stop)
            for (_, left, width), module in zip(self.columns, modules, strict=True):
                if module is None:
                    continue
                place = (rows, slice(left, left + width))
                wide = x[rows].double()
                shrunk = module.scale * (wide @ module.a.T)
                delta = shrunk @ module.b.T
                terms = module.scale * (wide.abs() @ module.a.abs().T) @ module.b.abs().T
                expected[place] += delta
                # Of float32 sums over features and ranks; then, in the rows' dtype, of what goes from
                # one product to the other, of the delta and of the sum.
                rounded = 0.5 * shrunk.abs() @ module.b.abs().T + delta.abs() + expected[place].abs()
                bound[place] = 2e-5 * terms + torch.finfo(x.dtype).eps * rounded
        between = before.isnan()
        error = torch.where(between, 0.0, (out.double() - expected).abs())
        overwritten = (between & ~out.isnan()).any()
        return torch.where(overwritten, torch.nan, (error / (bound + 1e-30)).max())


def make_cases(stream_rig: StreamRig, dtype: torch.dtype, device: str, count: int) -> list[Case]:
    generator = random.Random(5)
    cases = []
    for index in range(count):
        in_features, widths = SHAPES[index % len(SHAPES)]
        first = generator.choice([1, 2, 7, 64, 129]) if device == "cuda" else generator.randint(1, MOST_ROWS["cpu"])
        second = generator.randint(1, MOST_ROWS[device]) if index % 2 else 0
        start = generator.randint(0, 3)
        segments = [LoraSegment(start, start + first, 1)]
        if second:
            segments.append(LoraSegment(start + first + 2, start + first + 2 + second, 2))
        modules = tuple(
            tuple(
                None
                if generator.random() < 0.2
                else stream_rig.module(generator.choice([1, 3, 8, 16, 24, 64]), in_features, width, dtype)
                for width in widths
            )
            for _ in segments
        )
        cases.append(
            Case(in_features, widths, tuple(segments), modules, segments[-1].row_stop + generator.randint(0, 3))
        )
    return cases


def run_round(stream_rig: StreamRig, case: Case, dtype: torch.dtype) -> tuple[PostedJob, Tensor]:
    """One hand-over of fresh rows, all enqueued; the job, and the worst error."""
    x = torch.randn(case.rows, case.in_features, dtype=dtype, device=stream_rig.device)
    width = case.columns[-1][1] + case.columns[-1][2] + GAP
    out = torch.full((case.rows, width), torch.nan, dtype=dtype, device=stream_rig.device)
    for _, left, columns in case.columns:
        out[:, left : left + columns] = torch.randn(case.rows, columns, dtype=dtype, device=stream_rig.device)
    before = out.clone()
    posted = stream_rig.post(x, case.segments, case.tasks(dtype), sum(case.widths))
    stream_rig.bridge.add(posted, case.columns, out)
    return posted, case.worst_error(x, before, out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_value_of_every_round(stream_rig: StreamRig, dtype: torch.dtype) -> None:
    device = stream_rig.device.type
    cases = make_cases(stream_rig, dtype, device, count=24 if device == "cuda" else 8)
    generator = random.Random(11)
    worst = torch.zeros((), dtype=torch.float64, device=stream_rig.device)
    for _ in range(ROUNDS[device]):
        _, error = run_round(stream_rig, generator.choice(cases), dtype)
        worst = torch.maximum(worst, error)
    stream_rig.finish()
    # A value that is NaN where none may be is NaN here.
    limit = 1.0 if device == "cuda" or dtype is torch.float32 else 2.0
    assert float(worst) <= limit


def freeze(pids: Sequence[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
        process = psutil.Process(pid)
        assert wait_until(lambda process=process: process.status() == psutil.STATUS_STOPPED)  # type: ignore[misc]


@pytest.mark.parametrize("killed", [True, False], ids=["killed", "stopped"])
@pytest.mark.parametrize("victims", [(0,), (1,), (0, 1)], ids=str)
def test_the_stream_goes_on_when_workers_are_lost(
    stream_rig: StreamRig, victims: tuple[int, ...], *, killed: bool
) -> None:
    """Between request and reply; the one that is stopped is killed by the watchdog."""
    dtype = torch.float32
    module = stream_rig.module(8, 64, 64, dtype)
    case = Case(64, (64,), (LoraSegment(0, 40, 1),), ((module,),), 40)
    run_round(stream_rig, case, dtype)
    stream_rig.finish()
    lost = [stream_rig.rig.pool.worker_pids[index] for index in victims]
    freeze(lost)
    x, out = (torch.randn(40, columns, device=stream_rig.device) for columns in (64, 64 + GAP))
    posted = stream_rig.post(x, case.segments, case.tasks(dtype), 64)
    assert len(posted.job.shares) == 2
    assert posted.poll() is JobState.PENDING

    def kill() -> None:
        for pid in lost if killed else ():
            os.kill(pid, signal.SIGKILL)
        if isinstance(stream_rig.flags, FakeFlags):
            stream_rig.flags.on_wait = lambda: None

    # The fake's waits are over when ``add`` returns.
    if isinstance(stream_rig.flags, FakeFlags):
        stream_rig.flags.on_wait = kill
        stream_rig.bridge.add(posted, case.columns, out)
        assert posted.poll() is JobState.FAILED, "it waited for one of the workers alone"
    else:
        stream_rig.bridge.add(posted, case.columns, out)
        assert stream_rig.bridge.orphans == 1
        kill()
    stream_rig.finish()
    assert posted.poll() is JobState.FAILED
    assert stream_rig.rig.pool.wait_ready(2, 20)
    assert not set(stream_rig.rig.pool.worker_pids) & set(lost)
    for _ in range(SLOTS + 1):
        again, error = run_round(stream_rig, case, dtype)
        assert float(error) <= 1.0
        stream_rig.finish()
        assert again.poll() is JobState.DONE


def test_a_job_that_is_known_to_have_failed_is_not_added(stream_rig: StreamRig) -> None:
    module = stream_rig.module(8, 64, 64, torch.float32)
    case = Case(64, (64,), (LoraSegment(0, 40, 1),), ((module,),), 40)
    freeze(stream_rig.rig.pool.worker_pids)
    posted = stream_rig.post(
        torch.randn(40, 64, device=stream_rig.device), case.segments, case.tasks(torch.float32), 64
    )
    assert wait_until(lambda: posted.poll() is JobState.FAILED)
    out = torch.ones(40, 64 + GAP, device=stream_rig.device)
    with pytest.raises(WorkerLostError):
        stream_rig.bridge.add(posted, case.columns, out)
    assert bool((out == 1).all())
    stream_rig.finish()


def test_a_job_that_is_left_before_it_is_added(stream_rig: StreamRig) -> None:
    """Its slot and its host bytes come back when the workers have answered."""
    module = stream_rig.module(8, 64, 64, torch.float32)
    segments = (LoraSegment(0, 3, 1), LoraSegment(4, 9, 2), LoraSegment(9, 12, 1))
    case = Case(64, (64,), segments, ((module,),) * 3, 12)
    pids = stream_rig.rig.pool.worker_pids
    freeze(pids)
    posted = stream_rig.post(
        torch.randn(12, 64, device=stream_rig.device), case.segments, case.tasks(torch.float32), 64
    )
    stream_rig.bridge.leave(posted)
    stream_rig.bridge.reap()
    assert stream_rig.bridge.orphans == 1
    assert stream_rig.holds.counts == {1: 1, 2: 1}
    stream_rig.bridge.check()
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    stream_rig.finish()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled where there is one")
def test_nothing_comes_back_before_the_stream_has_added_it() -> None:
    with running_rigs() as start:
        rig = start(workers=1, slots=SLOTS)
        flags = FakeFlags(rig.memory)
        stream_rig = StreamRig(rig, flags, torch.device("cpu"))
        module = stream_rig.module(8, 64, 64, torch.float32)
        case = Case(64, (64,), (LoraSegment(0, 3, 7),), ((module,),), 3)
        flags.is_late = True
        rounds = [run_round(stream_rig, case, torch.float32) for _ in range(SLOTS)]
        for posted, error in rounds:
            assert posted.poll() is JobState.DONE
            assert float(error) <= 1.0
        stream_rig.bridge.reap()
        assert stream_rig.bridge.orphans == SLOTS
        assert stream_rig.holds.counts == {7: SLOTS}
        work = PointWork(segments=case.segments, tasks=tuple(case.tasks(torch.float32)), delta_width=64)
        assert stream_rig.bridge.post(torch.zeros(3, 64), work) is None
        stream_rig.bridge.check()
        flags.is_late = False
        stream_rig.finish()
        assert all(posted.poll() is JobState.DONE for posted, _ in rounds)

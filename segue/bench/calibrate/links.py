"""Times what a cold adapter needs: copies to the device, and deltas by the CPU workers."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from segue.bench.calibrate.fitting import CopyTiming, DeltaTiming
from segue.bench.cpu_pool import PoolRunner
from segue.bench.driver import EngineDriver
from segue.bench.random_checkpoints import TARGET_PROJECTIONS, Targets
from segue.cpu_lora import DeltaTask
from segue.cpu_lora.elements import ElementType
from segue.engine.lora.points import POINT_PROJECTIONS
from segue.engine.models.config import ModelConfig
from segue.types import Tier

_COPY_RUNS = 5
_WORKERS_SECONDS = 120.0
_DELTA_RUNS = 8
_HANDOVER_RUNS = 3
_ELEMENTS = {"float32": ElementType.FLOAT32, "bfloat16": ElementType.BFLOAT16, "float16": ElementType.FLOAT16}
_SETS_BYTES = 100_000_000
_BLOCK_ELEMS = 1 << 20


def copy_timings(driver: EngineDriver, versions: Sequence[int]) -> list[CopyTiming]:
    """Each adapter's copies, through the engine's own way, on an engine that does nothing else."""
    timings = []
    for version_id in versions:
        seconds = []
        for _ in range(_COPY_RUNS):
            driver.move([version_id], Tier.HOST)
            seconds.append(driver.copy_seconds(version_id))
        copy_bytes = driver.cost(version_id).weight_bytes
        timings.append(CopyTiming(copy_bytes=copy_bytes, seconds=statistics.median(seconds)))
    return timings


def handover_timings(
    driver: EngineDriver, versions: Sequence[int], tokens: Sequence[int], *, layers: int, vocab_size: int, cores: int
) -> list[DeltaTiming]:
    """What a prompt's layers take longer with the deltas of all from the CPU, on an engine that hands over all of them.

    That engine has no profile of the workers: the ring's default says how many share a job. Prompts no longer with the
    CPU's deltas, as timers go, add nothing.
    """
    draw = np.random.default_rng(0)
    driver.wait_until_settled(cores, _WORKERS_SECONDS)
    timings = []
    for version_id in versions:
        for count in tokens:
            warm, cold = [], []
            # The first of each is not kept: on CUDA it records the graphs of its shape.
            for _ in range(1 + _HANDOVER_RUNS):
                prompt = draw.integers(vocab_size, size=count).tolist()
                warm.append(_first_token_seconds(driver, prompt, version_id))
                driver.move([version_id], Tier.HOST)
                cold.append(_first_token_seconds(driver, prompt, version_id))
                driver.move([version_id], Tier.DEVICE)
            added_seconds = max(statistics.median(cold[1:]) - statistics.median(warm[1:]), 1e-9) / layers
            rank = driver.cost(version_id).rank
            shares = driver.job_shares(count)
            timings.append(DeltaTiming(tokens=count, rank=rank, cores=shares, seconds=added_seconds, handed_over=True))
    return timings


def _first_token_seconds(driver: EngineDriver, prompt: Sequence[int], version_id: int) -> float:
    start_seconds = time.monotonic()
    driver.run_to_first_tokens([driver.submit(prompt, version_id, max_tokens=1)])
    return time.monotonic() - start_seconds


@dataclass(frozen=True, slots=True)
class _Point:
    """A LoRA point of a layer: its in features, and the out features of each module that adapters change."""

    in_features: int
    out_features: tuple[int, ...]


def job_timings(
    model: ModelConfig,
    *,
    targets: Targets,
    dtype: str,
    ranks: Sequence[int],
    tokens: Sequence[int],
    cores: Sequence[int],
    deadline_seconds: float,
    progress: Callable[[str], None],
) -> list[DeltaTiming]:
    """A layer's jobs, one LoRA point after the other, in shares of so many workers of a pool that has the most of them.

    Jobs of fewer rows are not shared by so many. What could not begin before the deadline is left out, but never the
    jobs of the first number of workers. Raises BenchmarkError.
    """
    points, element = _points(model, targets), _ELEMENTS[dtype]
    item = element.item_bytes
    timings: list[DeltaTiming] = []
    progress(f"starting {max(cores)} CPU workers")
    runner = PoolRunner(
        max(cores),
        row_bytes=max(tokens) * max(point.in_features for point in points) * item,
        delta_bytes=max(tokens) * max(sum(point.out_features) for point in points) * item,
        store_bytes=max(_SETS_BYTES, 2 * max(ranks) * item * max(map(_features, points))),
    )
    with runner:
        _fill(runner.store, element)
        for workers in cores:
            if timings and time.monotonic() > deadline_seconds:
                break
            progress(f"the deltas of {workers} CPU workers")
            for rank, count in itertools.product(ranks, tokens):
                if count >= workers:
                    seconds = sum(_job_seconds(runner, point, count, rank, element, workers) for point in points)
                    timings.append(
                        DeltaTiming(tokens=count, rank=rank, cores=workers, seconds=seconds, handed_over=False)
                    )
    return timings


def _points(model: ModelConfig, targets: Targets) -> list[_Point]:
    shapes = model.projection_shapes()
    present = [
        [item for item in projections if item in TARGET_PROJECTIONS[targets]]
        for projections in POINT_PROJECTIONS.values()
    ]
    return [
        _Point(shapes[members[0]][0], tuple(shapes[member][1] for member in members)) for members in present if members
    ]


def _features(point: _Point) -> int:
    """Elements of a point's weights for each rank."""
    return sum(point.in_features + width for width in point.out_features)


def _fill(store: npt.NDArray[np.uint8], element: ElementType) -> None:
    """Small random numbers everywhere, a block of them again and again."""
    values = np.random.default_rng(0).normal(scale=0.01, size=_BLOCK_ELEMS).astype(np.float32)
    match element:
        case ElementType.FLOAT32:
            block = values.view(np.uint8)
        case ElementType.FLOAT16:
            block = values.astype(np.float16).view(np.uint8)
        case ElementType.BFLOAT16:
            block = (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    for start in range(0, len(store), len(block)):
        part = store[start : start + len(block)]
        part[:] = block[: len(part)]


def _job_seconds(
    runner: PoolRunner, point: _Point, tokens: int, rank: int, element: ElementType, workers: int
) -> float:
    """The median of a point's jobs in so many shares, whose weights come from memory: one set after the other."""
    item = element.item_bytes
    set_bytes = rank * _features(point) * item
    sets = len(runner.store) // set_bytes

    def tasks(turn: int) -> list[DeltaTask]:
        at, column, found = turn % sets * set_bytes, 0, []
        for width in point.out_features:
            b_at = at + rank * point.in_features * item
            task = DeltaTask(
                row_start=0, row_stop=tokens, out_offset=column, out_features=width, rank=rank,
                a_offset_bytes=at, b_offset_bytes=b_at, dtype=element,
            )  # fmt: skip
            found.append(task)
            at, column = b_at + rank * width * item, column + width
        return found

    rows = np.full((tokens, point.in_features), 0x3F80 if element is ElementType.BFLOAT16 else 1, element.numpy_dtype)
    return statistics.median(runner.jobs_seconds(rows, tasks, sum(point.out_features), _DELTA_RUNS, workers=workers))

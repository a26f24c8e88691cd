"""What ``segue bench coldstart`` measures, and the engine that has room for it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from segue.bench.cases import Mix
from segue.bench.coldstart.points import Point
from segue.bench.engine_config import engine_config, with_room
from segue.bench.prepare import AdapterSize, Written, require_device, require_model, written
from segue.bench.random_checkpoints import Targets
from segue.config import require, require_positive
from segue.engine.config import EngineConfig
from segue.engine.lora.catalog import AdapterCatalog
from segue.engine.models.config import ModelConfig
from segue.scheduler.cost_model import CostProfile
from segue.scheduler.plan import pages_for

_BUDGET_TOKENS = 2048
_MOST_WORKERS, _OTHER_CORES = 12, 4
DECODE_PROMPT = 128
"""Prompt tokens of the requests that decode meanwhile."""
DECODE_TOKENS = 2048
"""The most tokens of their answers; they are cancelled before."""
DECODE_RANK = 64
"""Of their adapters, each of which has its own, on q, k, v and o."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ColdstartConfig:
    """Which points to measure and with which engine.

    Each point is measured in ``runs`` rounds through all modes, and in one more before that is not kept. No round
    begins later than ``seconds`` after the model is loaded; a point with fewer rounds than ``runs`` is left out.
    ``cpu_workers`` are pinned to the last cores where there are more cores than workers. ``seed`` is of prompts and
    bootstrap. With a ``profile``, those of ``map_points`` that are not measured are predicted from it.
    """

    points: tuple[Point, ...]
    shape: str | None = None
    model_dir: str | None = None
    dtype: str = "float32"
    device: str = "cpu"
    runs: int = 7
    seconds: float = 600.0
    cpu_workers: int = 1
    torch_threads: int = 1
    seed: int = 0
    profile: CostProfile | None = None
    map_points: tuple[Point, ...] = ()

    def __post_init__(self) -> None:
        require_model(self.shape, self.model_dir)
        require(bool(self.points), "points", "there must be at least one")
        require_positive(self, "runs", "seconds", "cpu_workers")
        # The engine's own checks, before anything is written.
        self.engine_config(Path(self.model_dir or "."))
        require_device(self.device)

    @property
    def budget_tokens(self) -> int:
        """Prompt tokens of one step: all that arrive together, at most 2048 or the longest prompt."""
        most = max(point.adapters * point.prompt for point in self.points)
        longest = max(point.prompt for point in self.points)
        return max(min(most, _BUDGET_TOKENS), longest, DECODE_PROMPT)

    @property
    def context_tokens(self) -> int:
        """The most tokens of any request."""
        longest = max(point.prompt for point in self.points) + 1
        return max(longest, DECODE_PROMPT + DECODE_TOKENS) if self.decodes else longest

    @property
    def decodes(self) -> int:
        """The most requests that decode meanwhile."""
        return max(point.decodes for point in self.points)

    @property
    def decode_mix(self) -> Mix:
        """Enough adapters of the kind that decodes use: those that decode are behind those that arrive."""
        same = (p.adapters for p in self.points if (p.rank, p.targets) == (DECODE_RANK, Targets.QKVO))
        return Mix(max(same, default=0) + self.decodes, (DECODE_RANK,), Targets.QKVO)

    @property
    def decode_names(self) -> tuple[str, ...]:
        """The adapters of the requests that decode."""
        return self.decode_mix.adapter_names[-self.decodes :] if self.decodes else ()

    @property
    def mixes(self) -> tuple[Mix, ...]:
        """All adapters that are needed."""
        arriving = [point.mix for point in self.points]
        return tuple(dict.fromkeys([*arriving, self.decode_mix] if self.decodes else arriving))

    @property
    def max_rank(self) -> int:
        """The largest rank of any adapter."""
        return max(rank for mix in self.mixes for rank in mix.ranks)

    def engine_config(self, model_dir: Path) -> EngineConfig:
        """Without pages and host bytes. Raises ConfigError."""
        running = max(point.adapters + point.decodes for point in self.points)
        return dataclasses.replace(
            engine_config(
                self, model_dir, max_running=running, max_lora_rank=self.max_rank, cpu_workers=self.cpu_workers
            ),
            budget_tokens=self.budget_tokens,
            max_context_tokens=self.context_tokens,
            max_waiting=running,
            record_ahead=False,
            cpu_cores=worker_cores(self.cpu_workers),
        )


def default_workers() -> int:
    """CPU workers where none are asked for: all cores but four, at least 1 and at most 12."""
    return max(1, min(_MOST_WORKERS, len(os.sched_getaffinity(0)) - _OTHER_CORES))


def worker_cores(workers: int) -> tuple[int, ...]:
    """The last cores of this process, one for each worker; none where that would leave none for the engine."""
    cores = sorted(os.sched_getaffinity(0))
    return tuple(cores[-workers:]) if workers < len(cores) else ()


@contextmanager
def away_from(cores: Sequence[int]) -> Iterator[None]:
    """This thread, and those that it starts, keep to the other cores in the block."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, before - set(cores) or before)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What is measured, on disk, and the engine that has room for it. ``sizes`` are by adapter name."""

    model: ModelConfig
    catalog: AdapterCatalog
    engine: EngineConfig
    sizes: Mapping[str, AdapterSize]


@contextmanager
def prepared(config: ColdstartConfig, progress: Callable[[str], None]) -> Iterator[Prepared]:
    """Write a random model's configuration and the adapters into a folder that goes with the block.

    Raises ConfigError, ModelError or OSError for a model that cannot be measured.
    """
    with written(
        shape=config.shape,
        model_dir=config.model_dir,
        dtype=config.dtype,
        mixes=config.mixes,
        max_rank=config.max_rank,
        request_tokens=config.context_tokens,
        progress=progress,
        longest="points",
    ) as found:
        yield _with_room(config, found)


def _with_room(config: ColdstartConfig, found: Written) -> Prepared:
    """An engine whose pool and host store hold any one point, with what decodes meanwhile."""
    engine = config.engine_config(found.model_dir)
    sizes = found.sizes(engine.page_tokens)

    def kv_pages(tokens: int) -> int:
        # A page to grow into besides.
        return pages_for(tokens, engine.page_tokens) + 1

    arriving = max(
        sum(sizes[name].pages for name in point.mix.adapter_names) + point.adapters * kv_pages(point.prompt + 1)
        for point in config.points
    )
    decoding = sum(sizes[name].pages for name in config.decode_names)
    decoding += config.decodes * kv_pages(DECODE_PROMPT + DECODE_TOKENS)
    host_bytes = max(sum(sizes[name].weight_bytes for name in point.mix.adapter_names) for point in config.points)
    host_bytes += sum(sizes[name].weight_bytes for name in config.decode_names)
    # An eighth more: where an extent is freed another need not fit.
    sized = with_room(engine, pages=arriving + decoding + 1, host_bytes=host_bytes * 9 // 8)
    return Prepared(model=found.model, catalog=found.catalog, engine=sized, sizes=sizes)

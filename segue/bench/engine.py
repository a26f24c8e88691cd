"""``segue bench engine``: the engine's decode step by batch and adapter mix, and the time to a first token.

The engine runs in this process, without its front end. All cases are measured in turn and the whole round is repeated,
so that what the machine does meanwhile hits all cases alike; a case's percentiles are of the timings of all rounds.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np
import torch

from segue.bench.driver import EngineDriver
from segue.bench.gemms import Gemms
from segue.bench.random_checkpoints import Targets, write_random_adapter, write_random_model
from segue.bench.report import Percentiles, Report, Row
from segue.bench.shapes import SHAPES
from segue.config import ConfigError, require, require_positive
from segue.engine.config import EngineConfig
from segue.engine.lora.catalog import AdapterCatalog
from segue.engine.memory.adapter_layout import AdapterLayout, choose_chunk_elems
from segue.engine.models.config import ModelConfig
from segue.scheduler.plan import pages_for
from segue.types import Tier

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_WARM_UP_STEPS = 3
_FIRST_TOKEN_PROMPTS = (16, 128)
_FIRST_TOKEN_RUNS = 5
_SPARE_HOST_BYTES = 64 << 20


class Measure(StrEnum):
    """What is timed: the matrix products of a decode step alone, the step, and a request's way to its first token."""

    GEMMS = "gemm_ms"
    DECODE_STEP = "decode_step_ms"
    FIRST_TOKEN = "ttft_ms"


@dataclass(frozen=True, slots=True)
class Case:
    """One row of the report. ``prompt`` is in tokens, None where there are no requests."""

    measure: Measure
    batch: int
    adapters: int = 0
    prompt: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineBenchConfig:
    """What to measure: every batch with every number of adapters that it has requests for, 0 being the base model.

    The model is the one in ``model_dir``, or a random one of ``shape``, a name in SHAPES. Request i of a batch uses
    adapter i modulo the number of adapters; adapter j has rank ``ranks[j % len(ranks)]``. ``steps`` decode steps are
    timed in each of ``repeats`` rounds, after prompts of ``prompt`` tokens.
    """

    shape: str | None = None
    model_dir: str | None = None
    dtype: str = "float32"
    device: str = "cpu"
    batches: tuple[int, ...] = (1, 16)
    adapters: tuple[int, ...] = (0, 1, 8)
    ranks: tuple[int, ...] = (16,)
    targets: str = "qkvo"
    prompt: int = 32
    steps: int = 40
    repeats: int = 5
    torch_threads: int = 1

    def __post_init__(self) -> None:
        if self.model_dir is None:
            require(self.shape in SHAPES, "shape", f"must be one of {', '.join(SHAPES)}, is {self.shape!r}")
        else:
            require(self.shape is None, "shape", f"is {self.shape!r}, but the model is the one in model_dir")
        require(self.targets in tuple(Targets), "targets", f"must be one of {', '.join(Targets)}, is {self.targets!r}")
        for name, least in (("batches", 1), ("adapters", 0), ("ranks", 1)):
            values: tuple[int, ...] = getattr(self, name)
            require(bool(values), name, "must name at least one number")
            require(min(values) >= least, name, f"must be at least {least}, is {min(values)}")
        fits = min(self.adapters) <= max(self.batches)
        require(fits, "adapters", f"no batch has {min(self.adapters)} requests, one for each adapter")
        require_positive(self, "prompt", "steps", "repeats")
        # The engine's own checks, before anything is written.
        self.engine_config(Path(self.model_dir or "."))

    @property
    def cases(self) -> tuple[Case, ...]:
        """What one round measures, in order. Each adapter of a case has at least one request."""
        cases = []
        for batch in dict.fromkeys(self.batches):
            cases.append(Case(Measure.GEMMS, batch))
            mixes = (adapters for adapters in dict.fromkeys(self.adapters) if adapters <= batch)
            cases += [Case(Measure.DECODE_STEP, batch, adapters, self.prompt) for adapters in mixes]
        for adapters in sorted({min(adapters, 1) for adapters in self.adapters}):
            cases += [Case(Measure.FIRST_TOKEN, 1, adapters, prompt) for prompt in _FIRST_TOKEN_PROMPTS]
        return tuple(cases)

    @property
    def adapter_ranks(self) -> tuple[int, ...]:
        """The rank of each adapter that some case uses."""
        count = max(case.adapters for case in self.cases)
        return tuple(self.ranks[index % len(self.ranks)] for index in range(count))

    @property
    def max_tokens(self) -> int:
        """New tokens of a request that decodes: one that its prompt brings, those of the timed steps, one to spare."""
        return 1 + _WARM_UP_STEPS + self.steps + 1

    @property
    def request_tokens(self) -> int:
        """The most tokens of any request."""
        return max(self.prompt + self.max_tokens, *(prompt + 1 for prompt in _FIRST_TOKEN_PROMPTS))

    def engine_config(self, model_dir: Path) -> EngineConfig:
        """An engine that takes all prompts of the largest batch in one step. Raises ConfigError."""
        largest = max(self.batches)
        return EngineConfig(
            model_dir=str(model_dir),
            device=self.device,
            dtype=self.dtype,
            torch_threads=self.torch_threads,
            budget_tokens=max(largest * self.prompt, *_FIRST_TOKEN_PROMPTS),
            max_running=largest,
            max_waiting=largest,
            max_lora_rank=max(self.ranks),
            prefix_cache=False,
            cpu_workers=0,
            cpu_slots=1,
        )


def run_engine_bench(config: EngineBenchConfig, progress: Callable[[str], None]) -> Report:
    """Measure; ``progress`` is told in one line what is done next.

    Raises ConfigError, ModelError or OSError for a model that cannot be measured, and BenchmarkError.
    """
    with tempfile.TemporaryDirectory(prefix="segue-bench-") as folder:
        progress("writing checkpoints")
        model_dir, adapters_dir = Path(config.model_dir or Path(folder) / "model"), Path(folder) / "adapters"
        if config.shape is not None:
            write_random_model(model_dir, SHAPES[config.shape], dtype=_DTYPES[config.dtype])
        model = ModelConfig.load(model_dir)
        if config.request_tokens > model.max_position_embeddings:
            needed, context = config.request_tokens, model.max_position_embeddings
            raise ConfigError(f"steps: a request would have {needed} tokens, the model's context is {context}")
        names = _write_adapters(config, model, adapters_dir)
        catalog = AdapterCatalog(adapters_dir, model, max(config.ranks))
        progress("starting the engine")
        with EngineDriver(_with_room(config, model_dir, model, catalog, names), catalog) as driver:
            gemms = Gemms(model, batches=config.batches, dtype=_DTYPES[config.dtype], device=config.device)
            bench = _EngineBench(config, driver, [driver.load(name) for name in names], gemms, model.vocab_size)
            timings = _measure_rounds(config, bench, progress)
    rows = [_row(config, case, seconds) for case, seconds in timings.items()]
    return Report.here("engine", dataclasses.asdict(config), rows)


class _EngineBench:
    """Measures single cases. ``versions`` are on the device."""

    def __init__(
        self, config: EngineBenchConfig, driver: EngineDriver, versions: Sequence[int], gemms: Gemms, vocab_size: int
    ) -> None:
        self._config = config
        self._driver = driver
        self._versions = versions
        self._gemms = gemms
        self._vocab_size = vocab_size
        self._random = np.random.default_rng(0)

    def seconds(self, case: Case) -> list[float]:
        """The timings of one round."""
        match case.measure:
            case Measure.GEMMS:
                return [self._gemms.seconds(case.batch) for _ in range(self._config.steps)]
            case Measure.DECODE_STEP:
                return self._decode(case)
            case Measure.FIRST_TOKEN:
                return [self._first_token(case) for _ in range(_FIRST_TOKEN_RUNS)]

    def _decode(self, case: Case) -> list[float]:
        numbers = [self._submit(case, index, self._config.max_tokens) for index in range(case.batch)]
        self._driver.run_to_first_tokens(numbers)
        for _ in range(_WARM_UP_STEPS):
            self._driver.decode_seconds()
        timings = [self._driver.decode_seconds() for _ in range(self._config.steps)]
        self._driver.cancel_all()
        return timings

    def _first_token(self, case: Case) -> float:
        start_seconds = time.perf_counter()
        self._driver.run_to_first_tokens([self._submit(case, 0, 1)])
        return time.perf_counter() - start_seconds

    def _submit(self, case: Case, index: int, max_tokens: int) -> int:
        prompt = self._random.integers(self._vocab_size, size=case.prompt).tolist()
        version_id = self._versions[index % case.adapters] if case.adapters else None
        return self._driver.submit(prompt, version_id, max_tokens=max_tokens)


def _measure_rounds(
    config: EngineBenchConfig, bench: _EngineBench, progress: Callable[[str], None]
) -> dict[Case, list[float]]:
    """Each case's timings in seconds, of all rounds; a first round is not kept."""
    timings: dict[Case, list[float]] = {case: [] for case in config.cases}
    progress("warming up")
    for case in config.cases:
        bench.seconds(case)
    for repeat in range(config.repeats):
        progress(f"round {repeat + 1} of {config.repeats}")
        for case in config.cases:
            timings[case] += bench.seconds(case)
    return timings


def _row(config: EngineBenchConfig, case: Case, seconds: Sequence[float]) -> Row:
    percentiles = Percentiles.of([1e3 * item for item in seconds])
    residency = Tier.DEVICE if case.adapters else Tier.NONE
    return Row(
        measure=case.measure.value,
        batch=case.batch,
        adapters=case.adapters,
        ranks=tuple(sorted(set(config.adapter_ranks[: case.adapters]))),
        targets=config.targets if case.adapters else None,
        prompt=case.prompt,
        residency=None if case.measure is Measure.GEMMS else residency.value,
        median=percentiles.median,
        p10=percentiles.p10,
        p90=percentiles.p90,
        runs=percentiles.runs,
    )


def _write_adapters(config: EngineBenchConfig, model: ModelConfig, adapters_dir: Path) -> list[str]:
    """Write the random adapters; their names."""
    adapters_dir.mkdir()
    names = []
    for index, rank in enumerate(config.adapter_ranks):
        targets, dtype = Targets(config.targets), _DTYPES[config.dtype]
        folder = adapters_dir / f"adapter-{index}"
        write_random_adapter(folder, model, rank=rank, targets=targets, dtype=dtype, seed=index)
        names.append(folder.name)
    return names


def _with_room(
    config: EngineBenchConfig, model_dir: Path, model: ModelConfig, catalog: AdapterCatalog, names: Sequence[str]
) -> EngineConfig:
    """An engine with room for all adapters and the largest batch, on the device and in host memory."""
    engine = config.engine_config(model_dir)
    page_elems = 2 * engine.page_tokens * model.kv_heads * model.head_dim
    chunk_elems = choose_chunk_elems(
        page_elems, {width for pair in model.projection_shapes().values() for width in pair}
    )
    # Each request keeps a page to grow into, and one page is for the engine's own margin.
    pages = max(config.batches) * (pages_for(config.request_tokens, engine.page_tokens) + 1) + 1
    host_bytes = _SPARE_HOST_BYTES
    for name in names:
        with catalog.lookup(name) as opened:
            pages += AdapterLayout.plan(opened.manifest, page_elems=page_elems, chunk_elems=chunk_elems).pages
            host_bytes += 2 * opened.manifest.weight_bytes
    return dataclasses.replace(engine, pages=pages, host_store_bytes=host_bytes)

"""``segue bench engine``: the engine's decode step by batch and adapter mix, and the time to a first token.

The engine runs in this process, without its front end. All cases are measured in turn and the whole round is repeated,
so that what the machine does meanwhile hits all cases alike; a case's percentiles are of the timings of all rounds.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from segue.bench.cases import Case, Measure, decode_cases
from segue.bench.driver import BenchmarkError, EngineDriver
from segue.bench.engine_config import engine_config, with_room
from segue.bench.gemms import Gemms
from segue.bench.prepare import DTYPES, Written, require_device, require_model, written
from segue.bench.report import Percentiles, Report, Row
from segue.bench.step_parts import record_spans, split_by_part
from segue.config import require, require_positive
from segue.engine.config import EngineConfig
from segue.engine.lora.catalog import AdapterCatalog
from segue.engine.models.config import ModelConfig
from segue.scheduler.plan import pages_for
from segue.types import Tier

_WARM_UP_STEPS = 3
_FIRST_TOKEN_RUNS = 5
_BUDGET_TOKENS = 2048
# Host copies of adapters that are on the device may go, so that the host store need not hold all.
_MOST_HOST_BYTES = 4 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineBenchConfig:
    """What to measure and with which engine.

    The model is the one in ``model_dir``, or a random one of ``shape``, a name in SHAPES. ``steps`` decode steps are
    timed in each of ``repeats`` rounds through ``cases``. No round begins later than ``seconds`` after the start; a run
    ends at most one round later. ``parts`` adds what the device does in a decode step, for each case of those.
    """

    cases: tuple[Case, ...]
    shape: str | None = None
    model_dir: str | None = None
    dtype: str = "float32"
    device: str = "cpu"
    steps: int = 40
    repeats: int = 5
    seconds: float = 600.0
    torch_threads: int = 1
    parts: bool = False

    def __post_init__(self) -> None:
        require_model(self.shape, self.model_dir)
        require(bool(self.cases), "cases", "there must be at least one")
        require_positive(self, "steps", "repeats", "seconds")
        # The engine's own checks, before anything is written.
        self.engine_config(Path(self.model_dir or "."))
        require_device(self.device)
        require(not self.parts or self.device == "cuda", "parts", f"needs the device 'cuda', is on {self.device!r}")

    @property
    def largest_batch(self) -> int:
        return max(case.batch for case in self.cases)

    @property
    def largest_prompt(self) -> int:
        """Tokens; 1 if no case has a prompt."""
        return max(case.longest_prompt for case in self.cases)

    @property
    def budget_tokens(self) -> int:
        """Prompt tokens of one step: all of a batch, at most 2048 or the longest prompt."""
        most = max(case.batch * (case.prompt or 1) for case in self.cases)
        return max(min(most, _BUDGET_TOKENS), self.largest_prompt)

    @property
    def max_tokens(self) -> int:
        """New tokens of a request that decodes: those of the steps that compute the other prompts and of the timed
        steps; its first, and some to spare, as an engine that runs ahead has two steps under way."""
        prompts = max(case.batch * (0 if case.prompt is None else case.longest_prompt) for case in self.cases)
        return 1 + 2 * (prompts // self.budget_tokens) + _WARM_UP_STEPS + self.steps + 3

    @property
    def request_tokens(self) -> int:
        """The most tokens of any request."""
        return self.largest_prompt + self.max_tokens

    @property
    def max_rank(self) -> int:
        return max((rank for case in self.cases for rank in case.mix.ranks), default=1)

    def engine_config(self, model_dir: Path) -> EngineConfig:
        """Raises ConfigError."""
        return dataclasses.replace(
            engine_config(self, model_dir, max_running=self.largest_batch, max_lora_rank=self.max_rank),
            budget_tokens=self.budget_tokens,
            chunk_tokens=self.budget_tokens,
            max_context_tokens=self.request_tokens,
            max_waiting=self.largest_batch,
            record_ahead=False,
            cpu_slots=1,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What is measured, on disk, and the engine that has room for it: adapters ``names`` in ``adapters_dir``."""

    model: ModelConfig
    adapters_dir: Path
    names: tuple[str, ...]
    catalog: AdapterCatalog
    engine: EngineConfig


@contextmanager
def prepared(config: EngineBenchConfig, progress: Callable[[str], None]) -> Iterator[Prepared]:
    """Write a random model's configuration and the adapters into a folder that goes with the block.

    Raises ConfigError, ModelError or OSError for a model that cannot be measured.
    """
    with written(
        shape=config.shape,
        model_dir=config.model_dir,
        dtype=config.dtype,
        mixes=[case.mix for case in config.cases],
        max_rank=config.max_rank,
        request_tokens=config.request_tokens,
        progress=progress,
        longest="steps",
    ) as found:
        yield Prepared(
            model=found.model,
            adapters_dir=found.adapters_dir,
            names=found.names,
            catalog=found.catalog,
            engine=_with_room(config, found),
        )


def run_engine_bench(config: EngineBenchConfig, progress: Callable[[str], None]) -> Report:
    """Measure; ``progress`` is told in one line what is done next.

    Raises ConfigError, ModelError or OSError for a model that cannot be measured, and BenchmarkError.
    """
    deadline_seconds = time.monotonic() + config.seconds
    with prepared(config, progress) as ready:
        progress("starting the engine")
        with EngineDriver(ready.engine, ready.catalog) as driver:
            gemm_batches = [case.batch for case in config.cases if case.measure is Measure.GEMMS]
            gemms = Gemms(ready.model, batches=gemm_batches, dtype=DTYPES[config.dtype], device=config.device)
            progress(f"loading {len(ready.names)} adapters")
            versions = {name: driver.load(name) for name in ready.names}
            bench = EngineBench(config, driver, versions, gemms, ready.model.vocab_size)
            timings = _measure_rounds(config, bench, progress, deadline_seconds)
            part_cases = decode_cases(config.cases) if config.parts else ()
            parts = [row for case in part_cases for row in _part_rows(case, bench.parts(case))]
    settings = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    del settings["cases"]
    rows = [case_row(case, case.measure.value, [1e3 * item for item in timings[case]]) for case in timings]
    return Report.here("engine", settings, [*rows, *parts])


class EngineBench:
    """Measures single cases. ``versions`` are the adapters by name, all on the device."""

    def __init__(
        self,
        config: EngineBenchConfig,
        driver: EngineDriver,
        versions: Mapping[str, int],
        gemms: Gemms | None,
        vocab: int,
    ) -> None:
        self._config = config
        self._driver = driver
        self._versions = versions
        self._gemms = gemms
        self._vocab_size = vocab
        self._random = np.random.default_rng(0)

    def seconds(self, case: Case) -> list[float]:
        """The timings of one round."""
        match case.measure:
            case Measure.GEMMS:
                assert self._gemms is not None
                return [self._gemms.seconds(case.batch) for _ in range(self._config.steps)]
            case Measure.DECODE_STEP:
                return self._decode(case)
            case Measure.FIRST_TOKEN:
                return [self._first_token(case) for _ in range(_FIRST_TOKEN_RUNS)]

    def parts(self, case: Case) -> dict[str, float]:
        """Milliseconds of each part of a decode step."""
        steps = self._config.steps
        with self.decoding(case):
            spans = record_spans(lambda: [self._driver.decode_seconds() for _ in range(steps)])
        return split_by_part(spans, steps)

    def _decode(self, case: Case) -> list[float]:
        with self.decoding(case):
            return [self._driver.decode_seconds() for _ in range(self._config.steps)]

    @contextmanager
    def decoding(self, case: Case) -> Iterator[None]:
        """Inside, the case's requests are past their prompts and the first steps; behind it they have ended."""
        numbers = [
            self.submit(case, index, self._config.max_tokens, case.prompt_of(index)) for index in range(case.batch)
        ]
        self._driver.run_to_first_tokens(numbers)
        for _ in range(_WARM_UP_STEPS):
            self._driver.decode_seconds()
        yield
        self._driver.cancel_all()

    def _first_token(self, case: Case) -> float:
        start_seconds = time.perf_counter()
        self._driver.run_to_first_tokens([self.submit(case, 0, 1)])
        return time.perf_counter() - start_seconds

    def submit(self, case: Case, index: int, max_tokens: int, prompt_tokens: int | None = None) -> int:
        """Queue the case's request ``index``, with a prompt of the case's length if no other is given; its number."""
        prompt = self._random.integers(self._vocab_size, size=prompt_tokens or case.prompt).tolist()
        name = case.adapter_of(index)
        version_id = None if name is None else self._versions[name]
        return self._driver.submit(prompt, version_id, max_tokens=max_tokens)


def _measure_rounds(
    config: EngineBenchConfig, bench: EngineBench, progress: Callable[[str], None], deadline_seconds: float
) -> dict[Case, list[float]]:
    """Each case's timings in seconds, of all rounds; a first round is not kept. Raises BenchmarkError."""
    timings: dict[Case, list[float]] = {case: [] for case in config.cases}
    for number, case in enumerate(config.cases, start=1):
        if time.monotonic() > deadline_seconds:
            raise BenchmarkError(f"seconds: {config.seconds:g} were over before the first round that counts")
        progress(f"warming up, case {number} of {len(config.cases)}")
        bench.seconds(case)
    for repeat in range(config.repeats):
        if time.monotonic() > deadline_seconds:
            if repeat == 0:
                raise BenchmarkError(f"seconds: {config.seconds:g} were over before the first round that counts")
            break
        progress(f"round {repeat + 1} of {config.repeats}")
        for case in config.cases:
            timings[case] += bench.seconds(case)
    return timings


def _part_rows(case: Case, parts: Mapping[str, float]) -> list[Row]:
    """The largest first."""
    ordered = sorted(parts.items(), key=lambda item: -item[1])
    return [case_row(case, "step_part_ms", [value], part) for part, value in ordered]


def case_row(case: Case, measure: str, values: Sequence[float], part: str | None = None) -> Row:
    """The row of what was measured of a case, in the unit that ``measure`` ends in."""
    percentiles = Percentiles.of(values)
    residency = Tier.DEVICE if case.mix.adapters else Tier.NONE
    return Row(
        measure=measure,
        batch=case.batch,
        adapters=case.mix.adapters,
        ranks=case.mix.distinct_ranks,
        targets=None if case.mix.targets is None else case.mix.targets.value,
        prompt=case.prompt,
        residency=None if case.prompt is None else residency.value,
        when=None if case.when is None else case.when.value,
        part=part,
        median=percentiles.median,
        p10=percentiles.p10,
        p90=percentiles.p90,
        runs=percentiles.runs,
    )


def _with_room(config: EngineBenchConfig, found: Written) -> EngineConfig:
    """An engine with room for all adapters and the largest batch on the device."""
    engine = config.engine_config(found.model_dir)
    sizes = found.sizes(engine.page_tokens).values()
    # Each request keeps a page to grow into, and one page is for the engine's own margin.
    pages = config.largest_batch * (pages_for(config.request_tokens, engine.page_tokens) + 1) + 1
    weight_bytes = [0, *(size.weight_bytes for size in sizes)]
    host_bytes = min(2 * sum(weight_bytes), max(_MOST_HOST_BYTES, 4 * max(weight_bytes)))
    return with_room(engine, pages=pages + sum(size.pages for size in sizes), host_bytes=host_bytes)

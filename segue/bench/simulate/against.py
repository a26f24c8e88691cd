"""The same requests on a real engine and in the simulator: does the one predict the other?"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from segue.bench.adapter_folders import write_adapters
from segue.bench.cases import Mix
from segue.bench.driver import EngineDriver, ServedRequest, TimedRequest
from segue.bench.engine_config import engine_config, with_room
from segue.bench.prepare import DTYPES
from segue.bench.random_checkpoints import TARGET_PROJECTIONS, Targets
from segue.bench.report import Report
from segue.bench.shapes import SHAPES
from segue.bench.simulate.config import Placement, ReplicaConfig, SimulationConfig, WorkloadConfig
from segue.bench.simulate.config import Targets as Times
from segue.bench.simulate.run import Measured, measure, placement_rows, simulate, simulation_settings
from segue.bench.simulate.served import Served
from segue.bench.simulate.workload import SimulatedRequest, draw_requests
from segue.config import require, require_positive, to_toml
from segue.engine.config import EngineConfig
from segue.engine.lora.catalog import AdapterCatalog
from segue.engine.models.config import ModelConfig
from segue.engine.settings import merged_rows
from segue.scheduler.cost_model import CostProfile
from segue.scheduler.plan import NO_LEVEL, SchedulerLimits, pages_for
from segue.types import Tier

_WORKERS_SECONDS = 120.0
_WARM_UP_REQUESTS = 4
_WARM_UP_TOKENS = 8
# What a prediction may be off by.
TOLERANCE = 0.15


@dataclass(frozen=True, slots=True, kw_only=True)
class AgainstConfig:
    """The engine: a random model of ``shape``, adapters on ``adapter_targets``, all in host memory at the beginning,
    and ``cpu_workers``. It has room for everything; a step's bounds are those that ``segue serve`` begins with.

    ``workload.rank_bytes`` does not count: the adapters have the bytes that they have. Requests before
    ``warmup_share`` are served and not measured. ``profile`` is what the simulator takes steps to cost. The engine
    serves the requests ``engine_runs`` times, one after the other, so that its runs can be compared with each other.
    """

    profile: CostProfile
    workload: WorkloadConfig
    requests_per_second: float
    shape: str = "small"
    dtype: str = "float32"
    device: str = "cpu"
    adapter_targets: str = Targets.QKVO.value
    cpu_workers: int = 0
    torch_threads: int = 1
    max_running: int = 64
    warmup_share: float = 0.1
    engine_runs: int = 2

    def __post_init__(self) -> None:
        require(self.shape in SHAPES, "shape", f"must be one of {', '.join(SHAPES)}, is {self.shape!r}")
        require(self.dtype in DTYPES, "dtype", f"must be one of {', '.join(DTYPES)}, is {self.dtype!r}")
        known, adapted = tuple(Targets), self.adapter_targets
        require(adapted in known, "adapter_targets", f"must be one of {', '.join(known)}, is {adapted!r}")
        rate = self.requests_per_second
        require(0 < rate < math.inf, "requests_per_second", f"must be positive and finite, is {rate}")
        require_positive(self, "torch_threads", "max_running", "engine_runs")
        require(0 <= self.warmup_share < 1, "warmup_share", f"must be in [0, 1), is {self.warmup_share}")
        require(self.cpu_workers >= 0, "cpu_workers", f"must not be negative, is {self.cpu_workers}")
        layers = SHAPES[self.shape].layers
        require(self.profile.layers == layers, "profile", f"is of {self.profile.layers} layers, not {layers}")

    @property
    def targets_of_adapters(self) -> Targets:
        return Targets(self.adapter_targets)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


@dataclass(frozen=True, slots=True)
class EngineRun:
    """One run of all requests. ``cpu_share`` is how much of its steps' time the loop's thread computed: on the CPU
    device what is missing went to other processes."""

    served: Sequence[ServedRequest]
    cpu_share: float


def run_against(config: AgainstConfig, progress: Callable[[str], None]) -> Report:
    """Simulate the requests and serve them, and compare.

    Raises ConfigError, OSError, BenchmarkError or SimulationError.
    """
    with tempfile.TemporaryDirectory(prefix="segue-bench-") as folder:
        model_dir, adapters_dir = Path(folder) / "model", Path(folder) / "adapters"
        model_dir.mkdir()
        (model_dir / "config.json").write_text(json.dumps(SHAPES[config.shape].config_json(config.dtype)))
        model = ModelConfig.load(model_dir)
        workload = dataclasses.replace(config.workload, rank_bytes=_rank_bytes(config, model))
        requests = draw_requests(workload)
        engine = _engine_config(config, model_dir, model, requests)
        profile_path = Path(folder) / "profile.toml"
        profile_path.write_text(to_toml(config.profile))
        engine = dataclasses.replace(engine, profile_path=str(profile_path))
        simulation = _simulation(config, workload, engine, model)
        progress("simulating")
        simulated = simulate(simulation, Placement.MOST_IDLE.value, requests, config.requests_per_second)
        progress("writing adapters")
        mix = Mix(workload.adapters, workload.ranks, config.targets_of_adapters)
        write_adapters([mix], model, adapters_dir, config.torch_dtype)
        progress("starting the engine")
        with EngineDriver(engine, AdapterCatalog(adapters_dir, model, engine.max_lora_rank)) as driver:
            versions = _ready(driver, requests, mix.adapter_names, engine.cpu_workers)
            timed = _timed(config, requests, versions, model.vocab_size)
            runs = [_run(driver, timed, versions, number, config, progress) for number in range(config.engine_runs)]
            costs = driver.costs
    first = int(config.warmup_share * len(requests))
    measured = [_as_served(config, requests, run.served)[first:] for run in runs]
    real = measure(list(itertools.chain.from_iterable(measured)), simulation.targets, 0)
    own = [figures(measure(served, simulation.targets, 0)) for served in measured]
    rows = [*placement_rows("engine", real, simulation), *placement_rows("simulated", simulated, simulation)]
    settings: dict[str, Any] = {
        **simulation_settings(simulation),
        **{name: getattr(config, name) for name in ("shape", "dtype", "device", "adapter_targets", "cpu_workers")},
        "corrections": None if costs is None else msgspec.to_builtins((costs.decode, costs.prefill)),
        "prediction_errors": prediction_errors(real, simulated),
        "engine_runs": [{**times, "cpu_share": run.cpu_share} for times, run in zip(own, runs, strict=True)],
        "engine_differences": differences(own),
        "simulated_times": figures(simulated),
        "tolerance": TOLERANCE,
    }
    return Report.here("simulate-against", settings, rows)


def prediction_errors(real: Measured, simulated: Measured) -> Mapping[str, float]:
    """By how much the simulated mean and p99 of each time differ from the real one, relative to that."""
    measured, predicted = figures(real), figures(simulated)
    return {name: predicted[name] / measured[name] - 1 for name in measured}


def figures(measured: Measured) -> Mapping[str, float]:
    """Mean and p99 of each time, in seconds."""
    found = {}
    for name, seconds in (("ttft", measured.ttft_seconds), ("tpot", measured.tpot_seconds)):
        found[f"{name} mean"] = float(np.mean(seconds))
        found[f"{name} p99"] = float(np.percentile(seconds, 99))
    return found


def differences(runs: Sequence[Mapping[str, float]]) -> Mapping[str, float]:
    """By how much the largest of each figure is above the smallest: what a machine is worth as a measure."""
    return {name: max(run[name] for run in runs) / min(run[name] for run in runs) - 1 for name in runs[0]}


def _run(
    driver: EngineDriver,
    requests: Sequence[TimedRequest],
    versions: Mapping[int, int],
    number: int,
    config: AgainstConfig,
    progress: Callable[[str], None],
) -> EngineRun:
    """All requests once, with all adapters in host memory at the beginning."""
    driver.move(list(versions.values()), Tier.HOST)
    seconds = requests[-1].arrival_seconds
    progress(f"serving {len(requests)} requests, {seconds:.0f} s, run {number + 1} of {config.engine_runs}")
    before_seconds, before_cpu_seconds = driver.step_seconds, driver.step_cpu_seconds
    served = driver.serve(requests)
    cpu_seconds = driver.step_cpu_seconds - before_cpu_seconds
    return EngineRun(served, cpu_seconds / (driver.step_seconds - before_seconds))


def _ready(
    driver: EngineDriver, requests: Sequence[SimulatedRequest], names: Sequence[str], cpu_workers: int
) -> Mapping[int, int]:
    """Have the adapters in use known and the engine run once; each adapter's version by its place."""
    driver.wait_until_settled(cpu_workers, _WORKERS_SECONDS)
    places = sorted({item.adapter.version_id for item in requests if item.adapter is not None})
    versions = {place: driver.load(names[place]) for place in places}
    numbers = [driver.submit(range(_WARM_UP_TOKENS), None, max_tokens=2) for _ in range(_WARM_UP_REQUESTS)]
    driver.run_to_first_tokens(numbers)
    driver.cancel_all()
    return versions


def _rank_bytes(config: AgainstConfig, model: ModelConfig) -> int:
    """Bytes of an adapter's weights for each rank."""
    shapes = model.projection_shapes()
    features = sum(sum(shapes[item]) for item in TARGET_PROJECTIONS[config.targets_of_adapters])
    return features * model.layers * config.torch_dtype.itemsize


def _engine_config(
    config: AgainstConfig, model_dir: Path, model: ModelConfig, requests: Sequence[SimulatedRequest]
) -> EngineConfig:
    """With pages for the longest requests, as many as may run, and for all adapters."""
    engine = engine_config(
        config,
        model_dir,
        max_running=config.max_running,
        max_lora_rank=max(config.workload.ranks),
        cpu_workers=config.cpu_workers,
    )
    longest = max(item.prompt_tokens + item.output_tokens for item in requests)
    ranks, adapters = config.workload.ranks, config.workload.adapters
    adapter_bytes = sum(ranks[place % len(ranks)] for place in range(adapters)) * _rank_bytes(config, model)
    page_bytes = _page_bytes(config, engine, model)
    # Rows of an adapter's matrices begin at multiples of a chunk, so that it takes more than its bytes.
    adapter_pages = 2 * -(-adapter_bytes // page_bytes) + adapters
    return with_room(
        dataclasses.replace(engine, max_waiting=len(requests)),
        pages=config.max_running * (pages_for(longest, engine.page_tokens) + 1) + adapter_pages,
        host_bytes=adapter_bytes,
    )


def _page_bytes(config: AgainstConfig, engine: EngineConfig, model: ModelConfig) -> int:
    return 2 * engine.page_tokens * model.kv_heads * model.head_dim * model.layers * config.torch_dtype.itemsize


def _simulation(
    config: AgainstConfig, workload: WorkloadConfig, engine: EngineConfig, model: ModelConfig
) -> SimulationConfig:
    """One replica with the engine's own bounds."""
    assert engine.pages is not None
    limits = SchedulerLimits(
        page_tokens=engine.page_tokens,
        max_running=engine.max_running,
        max_passes=engine.max_passes,
        budget_tokens=engine.budget_tokens,
        chunk_tokens=engine.chunk_tokens,
        layers_per_step=engine.layers_per_step,
        merged_rows=merged_rows(engine),
    )
    return SimulationConfig(
        replica=ReplicaConfig(
            profile=config.profile,
            limits=limits,
            pages=engine.pages,
            page_bytes=_page_bytes(config, engine, model),
            cpu_cores=config.cpu_workers,
            policy=engine.policy,
        ),
        workload=workload,
        targets=Times(),
        requests_per_second=config.requests_per_second,
        warmup_share=config.warmup_share,
        cooldown_share=1.0,
        placements=(Placement.MOST_IDLE.value,),
    )


def _timed(
    config: AgainstConfig, requests: Sequence[SimulatedRequest], versions: Mapping[int, int], vocab_size: int
) -> list[TimedRequest]:
    draw = np.random.default_rng(config.workload.seed)
    return [
        TimedRequest(
            arrival_seconds=item.arrival / config.requests_per_second,
            prompt=draw.integers(vocab_size, size=item.prompt_tokens).tolist(),
            version_id=None if item.adapter is None else versions[item.adapter.version_id],
            max_tokens=item.output_tokens,
        )
        for item in requests
    ]


def _as_served(
    config: AgainstConfig, requests: Sequence[SimulatedRequest], served: Sequence[ServedRequest]
) -> list[Served]:
    """The engine's times in the simulator's form."""
    return [
        Served(
            request=request,
            arrived=request.arrival / config.requests_per_second,
            tokens=request.prompt_tokens + times.tokens,
            prompt_rows=0,
            level=NO_LEVEL,
            generated=times.tokens,
            first_token=times.first_token_seconds,
            finished=times.last_token_seconds,
        )
        for request, times in zip(requests, served, strict=True)
    ]

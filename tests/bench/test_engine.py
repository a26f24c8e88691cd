from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from segue.bench import engine, engine_config
from segue.bench.cases import BASE, Case, Measure, Mix, cross_cases
from segue.bench.driver import BenchmarkError, EngineDriver
from segue.bench.engine import EngineBenchConfig, run_engine_bench
from segue.bench.random_checkpoints import Targets, write_random_adapter, write_random_model
from segue.bench.shapes import SHAPES
from segue.config import ConfigError
from segue.engine.config import EngineConfig
from segue.engine.lora.catalog import AdapterCatalog
from segue.engine.models.config import ModelConfig


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[EngineDriver]:
    """On a tiny model with one adapter, and pages for a few requests."""
    model_dir = write_random_model(tmp_path / "model", SHAPES["tiny"], dtype=torch.float32)
    model = ModelConfig.load(model_dir)
    write_random_adapter(tmp_path / "adapters" / "one", model, rank=8, targets=Targets.QKVO, dtype=torch.float32)
    config = EngineConfig(model_dir=str(model_dir), pages=64, max_running=2, prefix_cache=False, cpu_workers=0)
    with EngineDriver(config, AdapterCatalog(tmp_path / "adapters", model, 8)) as running:
        yield running


def test_every_request_decodes_in_every_timed_step(driver: EngineDriver) -> None:
    version_id = driver.load("one")
    numbers = [driver.submit(range(20), version, max_tokens=10) for version in (None, version_id)]
    driver.run_to_first_tokens(numbers)
    assert all(driver.decode_seconds() > 0 for _ in range(9))
    with pytest.raises(BenchmarkError, match="adapter one is loaded already"):
        driver.load("one")


def test_an_engine_that_runs_ahead_decodes_in_every_timed_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA, with prompts that take several steps."""
    cases = cross_cases(
        batches=(6,), mixes=("base", "distinct"), ranks=(4,), targets=("qkvo",), prompt=20, first_token_prompts=(30,)
    )
    monkeypatch.setattr(engine, "_BUDGET_TOKENS", 40)
    config = EngineBenchConfig(shape="tiny", cases=cases, steps=5, repeats=1)
    assert config.budget_tokens == 40
    model_dir = write_random_model(tmp_path / "model", SHAPES["tiny"], dtype=torch.float32)
    ahead = dataclasses.replace(config.engine_config(model_dir), pages=256, runs_ahead=True)
    with EngineDriver(ahead, AdapterCatalog(tmp_path, ModelConfig.load(model_dir), 4)) as driver:
        for _ in range(2):
            numbers = [driver.submit(range(20), None, max_tokens=config.max_tokens) for _ in range(6)]
            driver.run_to_first_tokens(numbers)
            assert all(driver.decode_seconds() > 0 for _ in range(3 + config.steps))
            driver.cancel_all()


def test_a_step_that_decodes_less_is_not_timed(driver: EngineDriver) -> None:
    """Of three requests only two may run at once."""
    numbers = [driver.submit(range(20), None, max_tokens=10) for _ in range(3)]
    driver.run_to_first_tokens(numbers[:2])
    with pytest.raises(BenchmarkError, match="2 of 3 running requests decoded"):
        driver.decode_seconds()
    driver.cancel_all()
    driver.run_to_first_tokens([driver.submit(range(5), None, max_tokens=1)])


def test_a_request_that_fails_ends_the_measurement(driver: EngineDriver) -> None:
    number = driver.submit(range(20), None, max_tokens=10_000)
    with pytest.raises(BenchmarkError, match="the request needs 628 pages"):
        driver.run_to_first_tokens([number])


def test_more_adapters_than_the_host_store_holds_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_MOST_HOST_BYTES", 0)
    monkeypatch.setattr(engine_config, "_SPARE_HOST_BYTES", 4096)
    case = Case(Measure.DECODE_STEP, 10, Mix(10, (4,), Targets.QKVO), 5)
    report = run_engine_bench(EngineBenchConfig(shape="tiny", cases=(case,), steps=2, repeats=1), lambda _: None)
    assert [(row.batch, row.adapters, row.runs) for row in report.rows] == [(10, 10, 2)]


def test_a_round_is_cut_short_by_its_limit() -> None:
    config = EngineBenchConfig(shape="tiny", cases=(Case(Measure.DECODE_STEP, 1, BASE, 4),), seconds=1e-9)
    with pytest.raises(BenchmarkError, match="seconds: 1e-09 were over before the first round that counts"):
        run_engine_bench(config, lambda _: None)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"shape": "huge"}, "shape: must be one of tiny, small, medium, llama-2-7b, llama-3.1-8b, is 'huge'"),
        ({"shape": None}, "shape: must be one of tiny, small, medium, llama-2-7b, llama-3.1-8b, is None"),
        ({"model_dir": "m"}, "shape: is 'tiny', but the model is the one in model_dir"),
        ({"dtype": "int8"}, "dtype: must be one of float32, bfloat16, float16, is 'int8'"),
        ({"cases": ()}, "cases: there must be at least one"),
        ({"steps": 0}, "steps: must be greater than 0, is 0"),
        ({"seconds": 0}, "seconds: must be greater than 0, is 0"),
        ({"torch_threads": 0}, "torch_threads: must be greater than 0, is 0"),
    ],
)
def test_what_cannot_be_measured_is_named(options: dict[str, object], problem: str) -> None:
    settings: dict[str, object] = {"shape": "tiny", "cases": (Case(Measure.GEMMS, 1),), **options}
    with pytest.raises(ConfigError, match=f"^{re.escape(problem)}$"):
        EngineBenchConfig(**settings)  # type: ignore[arg-type]

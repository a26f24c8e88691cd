from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from segue.bench.driver import BenchmarkError, EngineDriver
from segue.bench.engine import Case, EngineBenchConfig, Measure
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


def test_a_case_has_a_request_for_each_adapter() -> None:
    config = EngineBenchConfig(shape="tiny", batches=(1, 4, 4), adapters=(0, 4, 2), ranks=(8, 16), prompt=9)
    assert config.cases == (
        Case(Measure.GEMMS, 1),
        Case(Measure.DECODE_STEP, 1, 0, 9),
        Case(Measure.GEMMS, 4),
        Case(Measure.DECODE_STEP, 4, 0, 9),
        Case(Measure.DECODE_STEP, 4, 4, 9),
        Case(Measure.DECODE_STEP, 4, 2, 9),
        Case(Measure.FIRST_TOKEN, 1, 0, 16),
        Case(Measure.FIRST_TOKEN, 1, 0, 128),
        Case(Measure.FIRST_TOKEN, 1, 1, 16),
        Case(Measure.FIRST_TOKEN, 1, 1, 128),
    )
    assert config.adapter_ranks == (8, 16, 8, 16)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"shape": "huge"}, "shape: must be one of tiny, small, medium, llama-3.1-8b, is 'huge'"),
        ({"shape": None}, "shape: must be one of tiny, small, medium, llama-3.1-8b, is None"),
        ({"model_dir": "m"}, "shape: is 'tiny', but the model is the one in model_dir"),
        ({"dtype": "int8"}, "dtype: must be one of float32, bfloat16, float16, is 'int8'"),
        ({"targets": "qk"}, "targets: must be one of qkvo, all, is 'qk'"),
        ({"batches": (1, 0)}, "batches: must be at least 1, is 0"),
        ({"adapters": ()}, "adapters: must name at least one number"),
        ({"adapters": (-1,)}, "adapters: must be at least 0, is -1"),
        ({"adapters": (17,)}, "adapters: no batch has 17 requests, one for each adapter"),
        ({"ranks": (0,)}, "ranks: must be at least 1, is 0"),
        ({"steps": 0}, "steps: must be greater than 0, is 0"),
        ({"torch_threads": 0}, "torch_threads: must be greater than 0, is 0"),
    ],
)
def test_what_cannot_be_measured_is_named(options: dict[str, object], problem: str) -> None:
    settings: dict[str, object] = {"shape": "tiny", **options}
    with pytest.raises(ConfigError, match=f"^{re.escape(problem)}$"):
        EngineBenchConfig(**settings)  # type: ignore[arg-type]

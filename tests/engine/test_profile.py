"""A cost profile's file: what is wrong with it is said in one line before a model is loaded."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from segue.config import ConfigError, to_toml
from segue.engine.config import EngineConfig
from segue.engine.instance import EngineInstance
from segue.engine.profile import load_profile
from segue.scheduler.cost_model import CopyCoefficients, CostProfile, CpuCoefficients, StepCoefficients
from tests.checkpoints import TinyModel, write_random_model

PROFILE = CostProfile(
    name="a machine",
    layers=4,
    decode=StepCoefficients(fixed_seconds=4e-3, seconds_per_token=1e-5, seconds_per_adapter_byte=2.5e-13),
    prefill=StepCoefficients(fixed_seconds=5e-3, seconds_per_token=2e-5),
    copy=CopyCoefficients(fixed_seconds=1e-5, seconds_per_byte=1 / 55e9),
    cpu=CpuCoefficients(fixed_seconds=1e-5, core_seconds_per_token_rank=1e-8),
)


@pytest.mark.parametrize("name", ["profile-cpu-small", "profile-h200"])
def test_profiles_of_earlier_versions_are_read(name: str) -> None:
    """They say nothing of how batches are padded, nor of what a CPU worker costs that has a share of a job."""
    profile = load_profile(Path(__file__).parents[2] / "docs" / "benchmarks" / f"{name}.toml")
    assert profile.decode.base_seconds(5) > profile.decode.base_seconds(1) > 0
    assert profile.cpu is not None
    assert profile.cpu.seconds_per_worker == 0
    assert profile.cpu.workers(1, 64, 12) < profile.cpu.workers(128, 64, 12)


def written(folder: Path, text: str) -> Path:
    path = folder / "profile.toml"
    path.write_text(text)
    return path


def test_a_profile_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert load_profile(written(tmp_path, to_toml(PROFILE)), layers=4) == PROFILE
    without = dataclasses.replace(PROFILE, cpu=None, prompts_ride=False)
    assert load_profile(written(tmp_path, to_toml(without))) == without


@pytest.mark.parametrize("table", ["decode", "prefill", "copy", "cpu"])
@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("-1.0", "must be finite and not negative, is -1.0"),
        ("nan", "must be finite and not negative, is nan"),
        ("inf", "must be finite and not negative, is inf"),
        ('"fast"', "must be a number, is 'fast'"),
        ("true", "must be a number, is True"),
    ],
)
def test_a_coefficient_that_is_none_is_named_with_its_table(
    tmp_path: Path, table: str, value: str, problem: str
) -> None:
    lines = to_toml(PROFILE).splitlines()
    at = lines.index(f"[{table}]") + 1
    lines[at] = f"fixed_seconds = {value}"
    path = written(tmp_path, "\n".join(lines))
    with pytest.raises(ConfigError) as caught:
        load_profile(path)
    assert str(caught.value) == f"{path}: {table}.fixed_seconds: {problem}"


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("[decode]", "[decode]\nseconds_per_day = 1.0", "decode.seconds_per_day: unknown; known are fixed_seconds"),
        ("[prefill]", "[preface]", "profile.preface: unknown"),
        ("[decode]", "[decoded]", "profile.decoded: unknown"),
        ('name = "a machine"\n', "", "profile.name: is missing"),
        ('name = "a machine"', 'name = ""', "name: must be a text that is not empty"),
        ("layers = 4", "layers = 0", "layers: must be a whole number from 1 on, is 0"),
        ("layers = 4", "layers = 4.0", "layers: must be a whole number from 1 on, is 4.0"),
        ("layers = 4", "layers = 4\nmood = 1", "profile.mood: unknown"),
        ("layers = 4", "layers = 4\n[decode", "line 3"),
        ("prompts_ride = true", "prompts_ride = 1", "prompts_ride: must be true or false, is 1"),
        ("fixed_seconds = 0.004", "fixed_seconds = 0.0", "decode.fixed_seconds: must be greater than 0"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, old: str, new: str, problem: str) -> None:
    text = to_toml(PROFILE)
    assert old in text
    path = written(tmp_path, text.replace(old, new))
    with pytest.raises(ConfigError) as caught:
        load_profile(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert problem in message
    assert "\n" not in message


def test_a_table_must_be_a_table(tmp_path: Path) -> None:
    path = written(tmp_path, 'name = "a"\nlayers = 1\ndecode = 3\nprefill = {}\n')
    with pytest.raises(ConfigError, match=r"profile\.decode: must be a table"):
        load_profile(path)


def test_an_engine_has_its_profile_and_refuses_that_of_another_model(tmp_path: Path) -> None:
    model_dir = tmp_path / "model"
    model = TinyModel()
    write_random_model(model_dir, model)
    fitting = dataclasses.replace(PROFILE, layers=model.layers)
    config = EngineConfig(
        model_dir=str(model_dir), pages=16, cpu_workers=0, profile_path=str(written(tmp_path, to_toml(fitting)))
    )
    with EngineInstance.build(config) as instance:
        assert instance.profile == fitting
    with EngineInstance.build(dataclasses.replace(config, profile_path=None)) as instance:
        assert instance.profile is None
    path = written(tmp_path, to_toml(dataclasses.replace(PROFILE, layers=80)))
    with pytest.raises(ConfigError) as caught:
        EngineInstance.build(config)
    problem = f"the profile is of a model with 80, this one has {model.layers}"
    assert str(caught.value) == f"{path}: layers: {problem}"

"""The same requests on an engine and in the simulator."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from segue.bench.report import Report
from segue.bench.simulate.against import differences, prediction_errors
from segue.bench.simulate.run import Measured
from segue.cli.main import build_app
from segue.config import to_toml
from segue.scheduler.cost_model import CopyCoefficients, CostProfile, StepCoefficients

PROFILE = CostProfile(
    name="about right",
    layers=4,
    decode=StepCoefficients(fixed_seconds=2e-3, seconds_per_token=1e-4),
    prefill=StepCoefficients(fixed_seconds=2e-3, seconds_per_token=1e-4),
    copy=CopyCoefficients(fixed_seconds=1e-3),
)


def simulate(folder: Path, *arguments: str) -> Result:
    profile = folder / "profile.toml"
    profile.write_text(to_toml(PROFILE))
    options = ("--profile", str(profile), "--requests", "12", "--rate", "40", "--prompt", "6", "--output", "4")
    more = ("--adapters", "3", "--ranks", "4,8", *arguments)
    return CliRunner().invoke(build_app(), ("bench", "simulate", *options, *more), env={"COLUMNS": "200"})


def test_an_engine_serves_what_the_simulator_serves(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    result = simulate(tmp_path, "--against", "tiny", "--json", str(out))
    assert (result.exit_code, result.stderr) == (0, "")
    report = Report.read(out)
    assert {row.placement for row in report.rows} == {"engine", "simulated"}
    times = {(row.placement, row.measure): row for row in report.rows}
    for measure in ("ttft_ms", "tpot_ms", "time_per_token_ms"):
        # One request of twelve is not measured.
        assert times["simulated", measure].runs == 11
        assert times["engine", measure].runs == 2 * 11
        assert times["engine", measure].median > 0
    errors = report.settings["prediction_errors"]
    engine, simulated = times["engine", "ttft_ms"], times["simulated", "ttft_ms"]
    assert engine.mean is not None
    assert simulated.mean is not None
    assert errors["ttft mean"] == pytest.approx(simulated.mean / engine.mean - 1)
    assert set(errors) == {"ttft mean", "ttft p99", "tpot mean", "tpot p99"}
    runs, apart = report.settings["engine_runs"], report.settings["engine_differences"]
    assert [set(run) for run in runs] == 2 * [{*errors, "cpu_share"}]
    assert np.mean([run["ttft mean"] for run in runs]) == pytest.approx(engine.mean / 1e3)
    slower, faster = sorted((run["tpot p99"] for run in runs), reverse=True)
    assert apart["tpot p99"] == pytest.approx(slower / faster - 1)
    assert all(0 < run["cpu_share"] <= 1.01 for run in runs), "a thread computes no longer than time passes"
    decodes, prompts = report.settings["corrections"]
    assert decodes["steps"] > 0
    assert prompts["steps"] > 0
    assert "simulated against the engine" in result.stdout
    lines = [line.split() for line in result.stdout.splitlines()]
    of_runs = [f"{simulated.mean / 1e3 / run['ttft mean'] - 1:+.1%}" for run in runs]
    assert ["ttft", "mean", *of_runs] in [[*line[:2], *line[4:6]] for line in lines]
    assert "the engine's thread had a core" in result.stdout


def test_runs_differ_by_the_largest_over_the_smallest() -> None:
    assert differences([{"a": 2.0, "b": 1.0}, {"a": 1.0, "b": 1.5}, {"a": 4.0, "b": 1.0}]) == {"a": 3.0, "b": 0.5}
    assert differences([{"a": 2.0}]) == {"a": 0.0}


def test_errors_are_relative_to_the_engine() -> None:
    def times(ttft: float, tpot: float) -> Measured:
        return Measured(
            ttft_seconds=[ttft] * 3,
            tpot_seconds=[tpot] * 3,
            time_per_token_seconds=[tpot] * 3,
            attainment=1.0,
            preemptions=0,
        )

    errors = prediction_errors(times(2.0, 0.5), times(1.0, 0.75))
    assert errors == {"ttft mean": -0.5, "ttft p99": -0.5, "tpot mean": 0.5, "tpot p99": 0.5}
    assert all(math.isfinite(value) for value in errors.values())


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ("--against", "huge"),
            "segue: shape: must be one of tiny, small, medium, llama-2-7b, ",
        ),
        (("--against", "small"), "segue: profile: is of 4 layers, not 8\n"),
        (("--against", "tiny", "--dtype", "int8"), "segue: dtype: must be one of float32, bfloat16, float16, is "),
        (("--against", "tiny", "--cpu-workers", "-1"), "segue: cpu_workers: must not be negative, is -1\n"),
        (("--against", "tiny", "--engine-runs", "0"), "segue: engine_runs: must be greater than 0, is 0\n"),
        (("--against", "tiny", "--profile", "caraserve-bgmv"), "segue: profile: is of 32 layers, not 4\n"),
    ],
)
def test_what_cannot_be_compared_is_one_line(arguments: tuple[str, ...], line: str, tmp_path: Path) -> None:
    result = simulate(tmp_path, *arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith(line)


def test_it_needs_a_profile_and_a_rate() -> None:
    result = CliRunner().invoke(build_app(), ("bench", "simulate", "--against", "tiny"))
    assert result.exit_code == 1
    assert result.stderr == "segue: --against: needs --profile FILE.toml of segue calibrate, and --rate\n"

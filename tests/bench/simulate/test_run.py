"""What a simulation reports, and the search for a rate."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from segue.bench.report import Report
from segue.bench.simulate.config import Targets
from segue.bench.simulate.presets import CARASERVE, DEFAULT
from segue.bench.simulate.profiles import CARASERVE_BGMV
from segue.bench.simulate.run import find_rate, run_simulate_bench, simulate
from segue.bench.simulate.served import SimulationError
from segue.bench.simulate.workload import draw_requests
from segue.cli.main import build_app
from segue.config import ConfigError, to_toml

SMALL = dataclasses.replace(
    DEFAULT,
    replicas=2,
    workload=dataclasses.replace(DEFAULT.workload, requests=200, prompt_mean=16, output_mean=8),
    targets=Targets(time_per_token_seconds=0.06),
)


def quiet(_text: str) -> None:
    pass


def test_all_placements_are_reported_over_the_same_requests() -> None:
    report = run_simulate_bench(SMALL, quiet)
    placements = list(dict.fromkeys(row.placement for row in report.rows))
    assert placements == ["rank-aware", "most-idle", "first-fit", "random"]
    for placement in placements:
        rows = {row.measure: row for row in report.rows if row.placement == placement}
        assert set(rows) == {
            "slo_attainment_fraction", "ttft_ms", "tpot_ms", "time_per_token_ms", "preemptions_count"
        }  # fmt: skip
        assert 0 <= rows["slo_attainment_fraction"].median <= 1
        assert rows["ttft_ms"].runs == rows["ttft_ms"].batch == 120
        for measure in ("ttft_ms", "tpot_ms", "time_per_token_ms"):
            row = rows[measure]
            assert row.mean is not None
            assert row.p99 is not None
            assert 0 < row.p10 <= row.median <= row.p90 <= row.p99
            assert row.p10 <= row.mean <= row.p99
    assert run_simulate_bench(SMALL, quiet).rows == report.rows


def test_the_rate_that_is_found_attains_the_share() -> None:
    requests = draw_requests(SMALL.workload)
    rate = find_rate(SMALL, "most-idle", 0.5, requests)
    assert simulate(SMALL, "most-idle", requests, rate).attainment == pytest.approx(0.5, abs=0.05)
    assert simulate(SMALL, "most-idle", requests, rate / 4).attainment > 0.9


def test_targets_that_nothing_meets_have_no_rate() -> None:
    impossible = dataclasses.replace(SMALL, targets=Targets(ttft_seconds=1e-6))
    with pytest.raises(SimulationError, match=r"most-idle does not attain 0.5"):
        find_rate(impossible, "most-idle", 0.5, draw_requests(SMALL.workload))


def test_caraserves_target_is_one_and_a_half_times_its_time_without_lora() -> None:
    without_lora = (0.06286 + 213.5 * 0.03212) / 214.5
    assert CARASERVE.targets.time_per_token_seconds == pytest.approx(1.5 * without_lora, rel=1e-3)
    assert (CARASERVE.replicas, CARASERVE.workload.adapters) == (60, 40_000)


def test_rank_aware_placement_beats_the_most_idle_on_caraserves_kernels() -> None:
    """A tenth of CaraServe's cluster at a rate that is hard for it."""
    config = dataclasses.replace(
        CARASERVE, replicas=6, requests_per_second=18.0, workload=dataclasses.replace(CARASERVE.workload, requests=1200)
    )
    requests = draw_requests(config.workload)
    aware, idle = (simulate(config, name, requests, 18.0) for name in ("rank-aware", "most-idle"))
    assert aware.attainment > idle.attainment
    assert sum(aware.time_per_token_seconds) < 0.95 * sum(idle.time_per_token_seconds)


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"replicas": 1001}, "replicas: must be 1 to 1000, is 1001"),
        ({"requests_per_second": 0.0}, "requests_per_second: must be positive"),
        ({"placements": ("nearest",)}, "placements: must be among rank-aware"),
        ({"placements": ("random", "random")}, "placements: must not name one twice"),
        ({"warmup_share": 0.9}, "warmup_share: must be below cooldown_share"),
    ],
)
def test_a_simulation_that_cannot_be_is_refused_by_the_field(values: dict[str, object], error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        dataclasses.replace(SMALL, **values)  # type: ignore[arg-type]


def command(*arguments: str) -> Result:
    return CliRunner().invoke(build_app(), ("bench", "simulate", *arguments), env={"COLUMNS": "200"})


def test_the_command_writes_what_it_shows(tmp_path: Path) -> None:
    profile, out = tmp_path / "profile.toml", tmp_path / "report.json"
    profile.write_text(to_toml(dataclasses.replace(CARASERVE_BGMV, name="mine")))
    options = ("--requests", "100", "--output", "8", "--placements", "most-idle,rank-aware", "--ranks", "4,8")
    result = command("--profile", str(profile), *options, "--tpot-ms", "60", "--json", str(out))
    assert (result.exit_code, result.stderr) == (0, "")
    report = Report.read(out)
    assert report.settings["replica"]["profile"]["name"] == "mine"
    assert report.settings["targets"] == {"tpot_seconds": 0.06}
    assert report.settings["workload"]["ranks"] == [4, 8]
    lines = result.stdout.splitlines()
    assert lines[0].startswith("4 replicas of mine, 8.0 requests/s; targets: tpot 60.0 ms")
    assert [line.split()[0] for line in lines[-2:]] == ["most-idle", "rank-aware"]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (("--preset", "mine"), "--preset: must be one of caraserve, is 'mine'"),
        (("--profile", "mine"), "--profile: must be one of caraserve-bgmv, caraserve-mbgmv or a file"),
        (("--profile", "none.toml"), "none.toml: No such file or directory"),
        (("--attain", "1.5"), "--attain: must be above 0 and below 1, is 1.5"),
        (("--attain", "0.5", "--rate", "3"), "give --rate or --attain, not both"),
        (("--attain", "0.5", "--attain-with", "best"), "--attain-with: must be one of rank-aware"),
        (("--ranks", "a"), "--ranks: must be whole numbers"),
        (("--requests", "1"), "no request is measured"),
    ],
)
def test_wrong_options_get_one_line(options: tuple[str, ...], error: str) -> None:
    result = command(*options)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"segue: {error}")
    assert result.stderr.count("\n") == 1

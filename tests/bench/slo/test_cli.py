"""Wrong options are one line each, before anything is started or sent."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from segue.bench.slo.presets import DEFAULT, PRESETS
from segue.cli.bench_slo_run import bench_config
from segue.cli.main import build_app

TRACES = Path(__file__).parent / "traces"
TARGETS = ("--ttft-ms", "200", "--tpot-ms", "30")


def bench(*arguments: str) -> Result:
    return CliRunner().invoke(build_app(), ("bench", "slo", *arguments), env={"COLUMNS": "200"})


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ((), "segue: ttft_ms: a search needs targets: give --ttft-ms, --tpot-ms or --class, or else --rate\n"),
        (("--preset", "fast"), "segue: --preset: must be one of goodput-8b, three-classes, is 'fast'\n"),
        (("--start", "huge", *TARGETS), "segue: start: must be one of tiny, small, medium, llama-3.1-8b, is 'huge'\n"),
        (("--start", "tiny", "--device", "tpu", *TARGETS), "segue: device: must be 'cpu' or 'cuda', is 'tpu'\n"),
        (("--start", "tiny", "--dtype", "int8", *TARGETS), "segue: dtype: must be one of float32, bfloat16, float16"),
        (("--start", "tiny", "--ranks", "8,x", *TARGETS), "segue: --ranks: must be whole numbers with commas"),
        (("--start", "tiny", "--set", "engine.speed=9", *TARGETS), "segue: engine.speed: unknown; known are "),
        (("--start", "tiny", "--set", "quick", *TARGETS), "segue: set: must be KEY=VALUE with a value as in the "),
        (("--set", "drain_seconds=1", *TARGETS), "segue: --set is of a server that --start starts\n"),
        (("--pin", *TARGETS), "segue: --pin is of a server that --start starts\n"),
        (("--arrivals", "bursty", *TARGETS), "segue: arrivals: must be one of constant, poisson, gamma, trace, is "),
        (("--arrivals", "poisson", "--burstiness", "2", *TARGETS), "segue: --burstiness is of gamma arrivals, not of "),
        (("--ramp", "1", *TARGETS), "segue: --ramp: must be FROM:TO, is '1'\n"),
        (("--popularity", "pareto", *TARGETS), "segue: popularity: must be one of uniform, zipf, geometric, "),
        (("--prompt", "long", *TARGETS), "segue: prompt: must be N, lognormal:MEAN:SIGMA[:MOST] or trace, is 'long'\n"),
        (
            ("--arrivals", "trace", *TARGETS),
            "segue: --arrivals, --prompt or --output trace needs a file: --trace FILE\n",
        ),
        (("--popularity", "trace", *TARGETS), "segue: --popularity trace needs a file: --function-trace FILE\n"),
        (("--trace", "t.csv", *TARGETS), "segue: --trace is not used: give --arrivals, --prompt or --output trace\n"),
        (("--prompt", "trace", "--trace", "none.csv", *TARGETS), "segue: none.csv: No such file or directory\n"),
        (("--tenants", "a=", *TARGETS), "segue: tenants: '' in 'a=' is no number\n"),
        (("--churn", "evict", *TARGETS), "segue: --churn: must be NAME:RATE, is 'evict'\n"),
        (("--churn", "drop:1", *TARGETS), "segue: churn: must be one of evict, reload, is 'drop'\n"),
        (("--class", "ttft=5"), "segue: class: 'ttft' in 'ttft=5' is not one of ttft_ms, tpot_ms, share\n"),
        (("--class", "ttft_ms=5", *TARGETS), "segue: give --class, or --ttft-ms and --tpot-ms, not both\n"),
        (("--ttft-ms", "-1"), "segue: ttft_ms: of class 'all' must be greater than 0 and finite, is -1.0\n"),
        (("--attain", "95", *TARGETS), "segue: attain: must be above 0 and below 1, is 95\n"),
        (("--from-rate", "9", "--to-rate", "8", *TARGETS), "segue: to_rate: must be at least from_rate (9) and finite"),
        (("--rate", "0", *TARGETS), "segue: rate: must be positive and finite, is 0.0\n"),
        (("--duration", "0", *TARGETS), "segue: measured_seconds: must be greater than 0, is 0.0\n"),
        (("--send-slo", "loud", *TARGETS), "segue: send_slo: must be one of none, fields, headers: 'loud'\n"),
        (("--reject-on-miss", *TARGETS), "segue: reject_on_miss: needs send_slo to be 'fields'\n"),
        (("--html", "none/page.html", *TARGETS), "segue: --html: "),
        (("--server", "127.0.0.1:1", *TARGETS), "segue: failed to connect to all addresses"),
    ],
)
def test_a_wrong_option_is_one_line(arguments: tuple[str, ...], line: str) -> None:
    result = bench(*arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(line)
    assert result.stderr.count("\n") == 1


def test_a_broken_trace_is_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text((TRACES / "azure-llm-2023.csv").read_text() + "2023-11-16,1\n")
    result = bench("--prompt", "trace", "--trace", str(path), *TARGETS)
    assert result.stderr == f"segue: {path}:6: has 2 fields, the first line has 3\n"


NOTHING_GIVEN = dict.fromkeys(
    ("adapters", "arrivals", "burstiness", "ramp", "popularity", "rank_correlation", "base_share", "prompt", "output",
     "tenants", "churn", "seed", "ttft_ms", "tpot_ms", "classes", "attain", "send_slo", "reject_on_miss", "rate",
     "from_rate", "to_rate", "precision", "repeats", "seconds", "settle", "duration", "warmup", "cooldown", "clients",
     "timeout", "max_lag_ms")
)  # fmt: skip


def test_options_go_before_the_preset() -> None:
    base = PRESETS["goodput-8b"].bench
    assert (base.workload.prompt.mean, base.workload.output.mean) == (128, 64)
    assert [(each.ttft_ms, each.tpot_ms) for each in base.workload.classes] == [(200, 30)]
    config = bench_config(base, {**NOTHING_GIVEN, "ttft_ms": 500.0, "prompt": "64", "to_rate": 99.0, "burstiness": 2.0})
    assert [(each.ttft_ms, each.tpot_ms) for each in config.workload.classes] == [(500, None)]
    assert (config.workload.prompt.mean, config.workload.output.mean) == (64, 64)
    assert (config.search.from_rate, config.search.to_rate) == (16, 99)
    assert (config.workload.arrivals.kind, config.workload.arrivals.burstiness) == ("gamma", 2.0)
    unchanged = bench_config(base, {**NOTHING_GIVEN, "clients": base.client.processes})
    assert unchanged == base


def test_presets_are_the_ones_of_the_targets() -> None:
    classes = PRESETS["three-classes"].bench.workload.classes
    assert [(each.ttft_ms, each.tpot_ms, each.share) for each in classes] == [
        (100, 20, 1),
        (200, 30, 1),
        (2000, 100, 1),
    ]
    assert {name: (each.start.adapters, each.start.ranks) for name, each in PRESETS.items()} == {
        "goodput-8b": (64, (8, 16, 32, 64)),
        "three-classes": (256, (8, 16, 32, 64)),
    }
    for preset in (*PRESETS.values(), DEFAULT):
        popularity = preset.bench.workload.popularity
        assert (popularity.kind, popularity.parameter) == ("zipf", 1.0)
        assert preset.bench.workload.arrivals.kind == "poisson"


def test_the_help_names_every_option() -> None:
    text = bench("--help").stdout
    for option in (
        "--server",
        "--preset",
        "--start",
        "--trace",
        "--class",
        "--attain",
        "--send-slo",
        "--html",
        "--churn",
    ):
        assert option in text

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

import pytest
from typer.testing import CliRunner

from segue.bench.coldstart.load import LoadStage, run_load_bench
from segue.bench.coldstart.load_config import LoadConfig
from segue.bench.coldstart.load_view import Server, lines
from segue.bench.driver import BenchmarkError, EngineDriver
from segue.bench.prepare import written
from segue.cli.main import build_app
from segue.config import ConfigError
from segue.types import Tier

CONFIG = LoadConfig(
    shape="tiny", rank=4, contents=12, requests_per_second=30.0, seconds=0.4, rounds=2, max_running=4, cpu_workers=1
)


@pytest.fixture
def stage() -> Iterator[tuple[EngineDriver, list[int], LoadStage]]:
    """Two adapters."""
    config = dataclasses.replace(CONFIG, contents=2)
    with written(
        shape=config.shape, model_dir=None, dtype="float32", mixes=[config.mix], max_rank=4, request_tokens=2048,
        progress=lambda _: None, longest="shape",
    ) as found:  # fmt: skip
        engine = dataclasses.replace(config.engine_config(found.model_dir), pages=600)
        with EngineDriver(engine, found.catalog) as driver:
            versions = [driver.open(name) for name in found.names]
            yield driver, versions, LoadStage(driver, versions, 1024, 1000.0)


def test_both_servers_serve_the_same_requests() -> None:
    report = run_load_bench(CONFIG, lambda _: None)
    assert (report.benchmark, report.settings["seconds"]) == ("coldload", 0.4)
    ttft = {row.mode: row for row in report.rows if row.measure == "ttft_ms"}
    assert {mode: (row.runs, row.residency) for mode, row in ttft.items()} == {
        "warm": (12, "device"),
        "cold": (12, "host"),
    }
    ratio = next(row for row in report.rows if row.measure == "ttft_cold_over_warm_ratio")
    warm, cold = ttft["warm"].mean, ttft["cold"].mean
    assert warm is not None
    assert cold is not None
    assert ratio.median == pytest.approx(cold / warm)
    assert [line[0] for line in lines(report)] == ["ttft", "tpot", "time per token", "end to end"]


def test_an_adapter_leaves_the_device_after_use_on_the_cold_server_alone(
    stage: tuple[EngineDriver, list[int], LoadStage],
) -> None:
    driver, versions, load = stage
    request = CONFIG.drawn(1, seed=0)
    load.serve(Server.WARM, request, seed=0)
    assert [driver.tier(version) for version in versions] == [Tier.DEVICE, Tier.DEVICE]
    served = load.serve(Server.COLD, request, seed=0)
    driver.move(versions, Tier.HOST)
    assert len(served) == 1
    assert served[0].end_to_end >= served[0].ttft > 0
    assert served[0].time_per_token == pytest.approx(served[0].end_to_end / request[0].output_tokens)


@pytest.mark.parametrize("server", Server)
def test_an_adapter_that_is_still_in_use_ends_the_load(
    stage: tuple[EngineDriver, list[int], LoadStage], server: Server
) -> None:
    """Three requests at once for two contents."""
    _, _, load = stage
    requests = [dataclasses.replace(item, arrival=0.0, output_tokens=50) for item in CONFIG.drawn(3, seed=0)]
    with pytest.raises(BenchmarkError, match="contents: with 2 an adapter is asked for while it is in use"):
        load.serve(server, requests, seed=0)


def test_the_same_seed_draws_the_same_requests_as_long_as_alpacas() -> None:
    requests = CONFIG.drawn(4000, seed=3)
    assert requests == CONFIG.drawn(4000, seed=3)
    assert sum(item.prompt_tokens for item in requests) / 4000 == pytest.approx(19.31, rel=0.05)
    assert sum(item.output_tokens for item in requests) / 4000 == pytest.approx(58.45, rel=0.05)
    assert requests[-1].arrival == pytest.approx(4000, rel=0.05)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"contents": 0}, "contents: must be greater than 0, is 0"),
        ({"seconds": 0.01}, "seconds: bring 0 requests, fewer than there are rounds"),
        ({"shape": "huge"}, "shape: must be one of tiny, small, medium, llama-2-7b, llama-3.1-8b, is 'huge'"),
    ],
)
def test_what_cannot_be_measured_is_named(options: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(problem)}$"):
        dataclasses.replace(CONFIG, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--preset", "none"), "--preset: must be caraserve, is 'none'"),
        (("--targets", "mlp"), "--targets: must be one of qkvo, all, is 'mlp'"),
        (("--shape", "tiny", "--model", "m"), "give --shape or --model, not both"),
        (("--rate", "0"), "requests_per_second: must be greater than 0, is 0.0"),
    ],
)
def test_a_wrong_option_is_told_in_one_line(options: tuple[str, ...], problem: str) -> None:
    result = CliRunner().invoke(build_app(), ("bench", "coldload", *options), env={"COLUMNS": "200"})
    assert (result.exit_code, result.stderr) == (1, f"segue: {problem}\n")

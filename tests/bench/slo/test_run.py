"""A real server on the CPU, found out from outside."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from segue.bench.report import Report
from segue.bench.slo.start import StartConfig, started_server
from segue.cli.main import build_app

SHORT = ("--settle", "0.5", "--warmup", "0.5", "--cooldown", "0.2", "--prompt", "8", "--output", "4")
# A machine that runs other tests meanwhile is late for reasons of its own.
PATIENT = ("--max-lag-ms", "5000")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    config = StartConfig(shape="tiny", adapters=6, ranks=(4, 8), context_tokens=256, settings=("engine.pages=512",))
    with started_server(config, lambda _: None) as running:
        yield running


def bench(address: str, *arguments: str) -> Result:
    options = ("bench", "slo", "--server", address, *SHORT, *arguments)
    return CliRunner().invoke(build_app(), options, env={"COLUMNS": "200"})


def test_a_rate_is_measured_and_written_in_every_form(address: str, tmp_path: Path) -> None:
    files = {kind: tmp_path / f"out.{kind}" for kind in ("json", "csv", "html")}
    outputs = [text for kind, path in files.items() for text in (f"--{kind}", str(path))]
    load = ("--rate", "20", "--duration", "2", "--clients", "2", "--base-share", "0.3", "--tenants", "loud=3,quiet=1")
    classes = ("--class", "fast:ttft_ms=30000,tpot_ms=30000", "--class", "never:ttft_ms=0.001")
    result = bench(address, *load, *classes, "--send-slo", "headers", *PATIENT, *outputs)
    assert result.exit_code == 0, result.stderr
    assert " of the requests in time (" in result.stdout.splitlines()[0]
    with files["csv"].open(newline="") as file:
        rows = list(csv.DictReader(file))
    measured = [row for row in rows if row["measured"] == "1"]
    assert len(rows) > len(measured) > 10
    assert {(row["class"], row["verdict"]) for row in rows} == {("fast", "met"), ("never", "late first token")}
    assert {row["received_tokens"] for row in measured} == {"4"}
    assert {row["tenant"] for row in rows} == {"loud", "quiet"}
    assert {row["rank"] for row in rows} == {"", "4", "8"}
    assert {row["tier"] for row in rows if not row["adapter"]} == {"none"}
    report = Report.read(files["json"])
    total = next(row for row in report.rows if row.part == "all" and row.measure == "slo_attainment_fraction")
    assert total.batch == len(measured)
    assert total.median == pytest.approx(Counter(row["class"] for row in measured)["fast"] / len(measured))
    assert report.settings["server"]["vocab_size"] == 1024
    assert "By tenant" in files["html"].read_text()


def test_the_search_goes_up_to_the_highest_rate_that_it_may(address: str, tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    result = bench(
        address, "--from-rate", "10", "--to-rate", "20", "--duration", "1.5", "--attain", "0.5", *PATIENT,
        "--class", "ttft_ms=20000,tpot_ms=20000", "--json", str(out),
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("at least 20 requests/s with 50% of the requests in time\n")
    report = Report.read(out)
    assert [row.requests_per_second for row in report.rows if row.part == "trial"] == [10, 20]
    assert [row.median for row in report.rows if row.measure == "goodput_requests_per_second"] == [20]


def test_no_rate_will_do_for_targets_that_cannot_be_met(address: str) -> None:
    result = bench(
        address, "--from-rate", "32", "--to-rate", "64", "--duration", "0.3", "--seconds", "1", "--ttft-ms", "0.001",
        "--tpot-ms", "0.001", *PATIENT,
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("no rate from ")


def test_a_client_that_lags_makes_the_run_void(address: str, tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    result = bench(
        address, "--rate", "20", "--duration", "1", "--max-lag-ms", "0.000001", "--ttft-ms", "9000", "--json", str(out)
    )
    assert result.exit_code == 3
    assert result.stdout.startswith("no result: the run is void\n")
    assert "segue: void: at 20 requests/s the clients lag behind their schedule: " in result.stderr
    report = Report.read(out)
    assert report.settings["void"].startswith("at 20 requests/s the clients lag")
    assert not [row for row in report.rows if row.measure == "goodput_requests_per_second"]


@pytest.mark.parametrize("kind", ["evict", "reload"])
def test_adapters_are_taken_from_it_meanwhile(address: str, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "requests.csv"
    result = bench(
        address, "--rate", "20", "--duration", "2", "--popularity", "uniform", "--churn", f"{kind}:10", *PATIENT,
        "--csv", str(out), "--timeout", "20",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert " adapters were taken from the server, 0 calls for it failed\n" in result.stdout
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    # Evicted adapters are in no memory, so some of those who ask for them next find them on disk.
    assert "disk" in {row["tier"] for row in rows}
    assert {row["status"] for row in rows} <= {"OK", "NOT_FOUND"}


def test_a_timeout_is_a_miss(address: str) -> None:
    result = bench(address, "--rate", "20", "--duration", "1", "--timeout", "0.001", "--ttft-ms", "9000", *PATIENT)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("0.0% of the requests in time (0.0% to ")
    assert " unfinished" in result.stdout


def test_a_rate_too_low_to_send_anything_is_told(address: str) -> None:
    result = bench(address, "--rate", "0.001", "--duration", "0.5", *PATIENT)
    line = "segue: no request was measured: a longer --duration or a higher rate is needed"
    assert (result.exit_code, result.stdout, result.stderr.splitlines()[-1]) == (1, "", line)


def test_more_adapters_than_there_are_cannot_be_asked(address: str) -> None:
    result = bench(address, "--rate", "5", "--adapters", "7")
    assert (result.exit_code, result.stderr) == (1, "segue: adapters: the server has 6, not 7\n")

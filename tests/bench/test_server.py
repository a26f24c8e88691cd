"""Streams through a real server, measured; and what is made of what was recorded."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from segue.bench.cases import BASE, Case, Measure
from segue.bench.driver import BenchmarkError
from segue.bench.engine import EngineBenchConfig
from segue.bench.report import Report
from segue.bench.server import (
    ServerBenchConfig,
    idle_fraction,
    step_seconds,
    token_gaps,
    within,
    write_tokenizer,
)
from segue.bench.stream_client import StreamRecord
from segue.cli.main import build_app
from segue.config import ConfigError
from segue.server.tokenizer import load_tokenizer
from segue.v1 import server_pb2


def bench(*arguments: str) -> Result:
    return CliRunner().invoke(build_app(), ("bench", "server", *arguments), env={"COLUMNS": "200"})


def test_the_file_has_four_rows_for_each_mix(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    options = ("--batch", "4", "--mix", "base,2", "--ranks", "4,8", "--prompt", "12", "--max-tokens", "2000")
    result = bench("--shape", "tiny", *options, "--window", "0.2", "--runs", "2", "--clients", "2", "--json", str(out))
    assert (result.exit_code, result.stderr) == (0, "")
    report = Report.read(out)
    measures = ("decode_step_ms", "device_idle_fraction", "tokens_per_second", "time_per_token_ms")
    assert [(row.measure, row.batch, row.adapters, row.ranks, row.residency) for row in report.rows] == [
        *((measure, 4, 0, (), "none") for measure in measures),
        *((measure, 4, 2, (4, 8), "device") for measure in measures),
    ]
    by_measure = {row.measure: row for row in report.rows if row.adapters}
    assert [by_measure[measure].runs for measure in measures[:3]] == [2, 2, 2]
    assert by_measure["time_per_token_ms"].runs > 4
    assert 0 <= by_measure["device_idle_fraction"].median < 1
    assert all(row.p10 <= row.median <= row.p90 for row in report.rows)
    assert all(row.median > 0 for row in report.rows if row.measure != "device_idle_fraction")
    assert (report.benchmark, report.settings["clients"], report.settings["window_seconds"]) == ("server", 2, 0.2)


@pytest.mark.gpu
@pytest.mark.timeout(700)
def test_a_server_on_cuda_is_measured(tmp_path: Path) -> None:
    """Kernels are compiled when they are first met."""
    out = tmp_path / "report.json"
    device = ("--device", "cuda", "--dtype", "bfloat16", "--batch", "20", "--mix", "base,ranks", "--ranks", "8,16")
    result = bench(
        "--shape", "tiny", *device, "--max-tokens", "3500", "--window", "0.5", "--runs", "2", "--json", str(out)
    )
    assert (result.exit_code, result.stderr) == (0, "")
    rows = [row for row in Report.read(out).rows if row.measure == "device_idle_fraction"]
    assert [(row.batch, row.adapters, row.runs) for row in rows] == [(20, 0, 2), (20, 20, 2)]
    assert all(0 <= row.median < 1 for row in rows)


def test_streams_that_end_too_early_are_told() -> None:
    options = ("--shape", "tiny", "--batch", "2", "--prompt", "4", "--max-tokens", "9", "--window", "2")
    result = bench(*options, "--runs", "1")
    assert result.exit_code == 1
    assert result.stderr.startswith("segue: max_tokens: streams of 18 tokens ended before 2 s of all 2 were measured")


def test_only_decode_steps_are_measured() -> None:
    engine = EngineBenchConfig(shape="tiny", cases=(Case(Measure.FIRST_TOKEN, 1, BASE, 4),))
    with pytest.raises(ConfigError, match="cases: must be decode steps"):
        ServerBenchConfig(engine=engine)


def test_times_are_of_what_lies_between_two_states() -> None:
    before = server_pb2.DeviceTime(batches=10, busy_seconds=4.0, idle_seconds=1.0)
    after = server_pb2.DeviceTime(batches=14, busy_seconds=5.8, idle_seconds=1.2)
    assert step_seconds(before, after) == pytest.approx(0.5)
    assert idle_fraction(before, after) == pytest.approx(0.1)
    with pytest.raises(BenchmarkError, match="no step has ended"):
        step_seconds(before, before)


def test_a_chunks_tokens_share_the_time_since_the_chunk_before() -> None:
    record = StreamRecord(arrivals=((1.0, 1), (2.0, 1), (2.5, 2), (3.5, 1), (9.0, 1)))
    assert within(record, 1.0, 3.5) == [(2.0, 1), (2.5, 2), (3.5, 1)]
    assert token_gaps(within(record, 1.0, 3.5)) == [0.25, 0.25, 1.0]
    assert token_gaps([(1.0, 1)]) == []


@pytest.mark.parametrize("vocab_size", [300, 1024])
def test_every_id_of_a_random_model_has_a_text(tmp_path: Path, vocab_size: int) -> None:
    write_tokenizer(tmp_path, vocab_size)
    tokenizer = load_tokenizer(tmp_path, required=True)
    assert len(tokenizer.vocabulary() or {}) == vocab_size
    detokenizer = tokenizer.detokenizer()
    text = detokenizer.push([vocab_size - 1, 260]) + detokenizer.flush()
    assert re.fullmatch(r"token\d+token260", text)

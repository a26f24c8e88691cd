from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from segue.bench.disk import DiskBenchConfig, run_disk_bench
from segue.bench.driver import BenchmarkError
from segue.bench.tables import describe
from segue.cli.main import build_app
from segue.config import ConfigError
from segue.engine.lora import reader

PER_ADAPTER = ("read_floor_ms", "memory_copy_ms")
PER_THREADS = (
    "read_adapter_ms",
    "read_layers_ms",
    "read_first_layer_ms",
    "read_bookkeeping_ms",
    "read_beside_loop_ms",
    "layers_beside_loop_ms",
    "loop_turn_alone_ms",
    "loop_turn_beside_ms",
)
# Four layers of width 256, with k and v of width 128; q, k, v and o, two bytes each.
RANK_8_BYTES = 4 * 8 * 2 * (2 * (256 + 256) + 2 * (256 + 128))


def test_the_command_reports_every_measure_of_every_case(tmp_path: Path) -> None:
    arguments = ("--shape", "tiny", "--ranks", "8", "--targets", "qkvo", "--threads", "1,2", "--runs", "2")
    path = tmp_path / "report.json"
    result = CliRunner().invoke(build_app(), ("bench", "disk", *arguments, "--json", str(path)))
    assert result.exit_code == 0, result.output
    rows = json.loads(path.read_text())["rows"]
    wanted = [(measure, 1) for measure in PER_ADAPTER]
    wanted += [(measure, threads) for threads in (1, 2) for measure in PER_THREADS]
    assert [(row["measure"], row["cores"]) for row in rows] == wanted
    assert {row["bytes"] for row in rows} == {RANK_8_BYTES}
    assert all(row["median"] > 0 for row in rows)
    assert [row["runs"] for row in rows if not row["measure"].startswith("loop")] == [2] * 14


def test_rows_are_told_in_words() -> None:
    report = run_disk_bench(
        DiskBenchConfig(shape="tiny", ranks=(8,), targets=("all",), threads=(2,), runs=1), lambda _: None
    )
    words = [describe(row) for row in report.rows]
    assert words[2] == "adapter read, rank 8, all, 2 cores"
    assert len(set(words)) == len(words)


def test_a_read_that_fails_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "verify", lambda _job: "the weights file changed")
    with pytest.raises(BenchmarkError, match="the weights file changed"):
        run_disk_bench(DiskBenchConfig(shape="tiny", ranks=(8,), targets=("qkvo",), runs=1), lambda _: None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": "huge"}, "shape: must be one of"),
        ({"ranks": (0,)}, "ranks: must be positive"),
        ({"threads": ()}, "threads: must be positive"),
        ({"targets": ("q",)}, "targets: must be of qkvo, all"),
        ({"runs": 0}, "runs"),
    ],
)
def test_what_cannot_be_measured_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DiskBenchConfig(**options)  # type: ignore[arg-type]

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from segue.bench.machine import Machine, checkout_commit, commit, versions
from segue.bench.report import Percentiles, Report, ReportError, Row
from segue.cli.main import build_app
from segue.config import ConfigError


def row(**changes: object) -> Row:
    values = {
        "measure": "decode_step_ms",
        "batch": 32,
        "adapters": 32,
        "ranks": (16, 64),
        "targets": "qkvo",
        "prompt": 128,
        "residency": "device",
        "median": 2.5,
        "p10": 2.0,
        "p90": 3.0,
        "runs": 200,
    }
    return msgspec.convert({**values, **changes}, Row)


def report(*rows: Row) -> Report:
    return Report(
        benchmark="engine",
        machine=Machine(cpu="a cpu", cores=2, memory_bytes=1 << 34, gpu=None, kernel="6.1"),
        versions={"torch": "2.13.0"},
        commit="0123-dirty",
        settings={"dtype": "float32", "batches": [1, 16]},
        rows=rows,
    )


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = report(row(), row(adapters=0, ranks=(), targets=None, residency="none"))
    written.write(tmp_path / "report.json")
    assert Report.read(tmp_path / "report.json") == written


def test_the_file_has_the_form_of_all_benchmarks(tmp_path: Path) -> None:
    report(row()).write(tmp_path / "report.json")
    data = json.loads((tmp_path / "report.json").read_text())
    assert set(data) == {"benchmark", "machine", "versions", "commit", "settings", "rows"}
    assert set(data["machine"]) == {"cpu", "cores", "memory_bytes", "gpu", "kernel"}
    fields = dataclasses.asdict(row()).items()
    assert data["rows"] == [{**{key: value for key, value in fields if value is not None}, "ranks": [16, 64]}]


@pytest.mark.parametrize("text", ["{", "[]", '{"benchmark": "engine", "rows": []}'])
def test_a_file_of_another_form_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(ReportError, match=r"^[^\n]*report.json: is no benchmark report: [^\n]+$"):
        Report.read(tmp_path / "report.json")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"report.json: No such file"):
        Report.read(tmp_path / "report.json")


def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    report(row()).write(path)
    before = path.read_bytes()

    def fail_to_replace(_draft: Path, _target: Path) -> Path:
        raise OSError("no room")

    monkeypatch.setattr(Path, "replace", fail_to_replace)
    with pytest.raises(OSError, match="no room"):
        report(row(batch=1)).write(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["report.json"]


def test_percentiles_of_known_numbers() -> None:
    tenths = Percentiles.of([float(value) for value in reversed(range(101))])
    assert (tenths.p10, tenths.median, tenths.p90, tenths.runs) == (10.0, 50.0, 90.0, 101)
    pair = Percentiles.of([1.0, 2.0])
    assert (pair.p10, pair.median, pair.p90, pair.runs) == pytest.approx((1.1, 1.5, 1.9, 2))
    one = Percentiles.of([3.0])
    assert (one.p10, one.median, one.p90, one.runs) == (3.0, 3.0, 3.0, 1)
    with pytest.raises(ValueError, match="timings"):
        Percentiles.of([])


def test_the_machine_and_the_versions_are_known() -> None:
    machine = Machine.here()
    assert machine.cpu
    assert machine.cores is not None
    assert 0 < machine.cores <= (os.cpu_count() or 1)
    assert machine.memory_bytes is not None
    assert machine.memory_bytes > 1 << 28
    assert {"torch", "numpy", "numba", "segue"} <= set(versions())


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_tells_changed_files(tmp_path: Path) -> None:
    assert checkout_commit(tmp_path) is None
    git(tmp_path, "init")
    assert checkout_commit(tmp_path) is None
    (tmp_path / "file").write_text("one")
    (tmp_path / "inner").mkdir()
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-m", "one")
    head = git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "untracked").write_text("")
    assert checkout_commit(tmp_path) == head
    (tmp_path / "file").write_text("two")
    assert checkout_commit(tmp_path) == f"{head}-dirty"
    assert checkout_commit(tmp_path / "inner") is None


def test_a_commit_may_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEGUE_COMMIT", "0123abc-dirty")
    assert commit() == Report.here("engine", {}, ()).commit == "0123abc-dirty"
    monkeypatch.delenv("SEGUE_COMMIT")
    assert commit() != "0123abc-dirty"


@pytest.mark.parametrize("name", ["", "012345", "0123abg", "0" * 41, "0123abc-new", "0123ABC", "0123abc\n"])
def test_what_names_no_commit_is_refused_before_anything_is_measured(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEGUE_COMMIT", name)
    problem = f"SEGUE_COMMIT: must be 7 to 40 digits of 0-9 and a-f, and may end in -dirty, is {name!r}"
    with pytest.raises(ConfigError, match=f"^{re.escape(problem)}$"):
        commit()
    for command in ("engine", "slo"):
        result = CliRunner().invoke(build_app(), ("bench", command))
        assert (result.exit_code, result.stdout, result.stderr) == (1, "", f"segue: {problem}\n")


def test_a_short_commit_still_tells_changed_files() -> None:
    assert report().short_commit == "0123-dirty"
    assert dataclasses.replace(report(), commit="0123456789abc-dirty").short_commit == "0123456789-dirty"
    assert dataclasses.replace(report(), commit=None).short_commit == "unknown"

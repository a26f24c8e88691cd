from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from segue.bench.machine import Machine
from segue.bench.plots import PlotError, write_plot
from segue.bench.report import Report, Row
from segue.bench.tables import readme_tables

ROOT = Path(__file__).parent.parent.parent
ENGINE = Report(
    benchmark="engine",
    machine=Machine(cpu="a cpu", cores=2, gpu=None),
    versions={"torch": "2.13.0"},
    commit="0123456789abcdef",
    rows=(
        Row(measure="gemm_ms", batch=2, adapters=0, median=1.0, p10=0.5, p90=1.5, runs=9),
        Row(
            measure="decode_step_ms", batch=2, adapters=2, ranks=(8, 16), targets="qkvo", prompt=4, residency="device",
            median=2.0, p10=1.0, p90=3.0, runs=9,
        ),
        Row(measure="ttft_ms", batch=1, adapters=0, prompt=4, residency="none", median=3.0, p10=2.0, p90=4.0, runs=9),
    ),
)  # fmt: skip
KERNELS = Report(
    benchmark="kernels",
    machine=Machine(gpu="a gpu"),
    versions={"triton": "3.6.0"},
    commit=None,
    rows=(
        Row(
            measure="lora_kernels_us", batch=1, adapters=1, case="1 token", point="o", bytes=9, copy_fraction=0.25,
            median=5.04, p10=5.0, p90=5.1, runs=9,
        ),
    ),
)  # fmt: skip


def placement(name: str, measure: str, mean: float, p99: float) -> Row:
    return Row(
        measure=measure,
        batch=9,
        adapters=2,
        placement=name,
        mean=mean,
        p99=p99,
        median=mean,
        p10=mean,
        p90=mean,
        runs=9,
    )


def test_what_a_model_predicts_stands_beside_what_was_measured() -> None:
    machine = Machine(cpu="a cpu", cores=2, gpu=None)
    quality = {"r_squared": 0.98765, "mean_relative_error": 0.0321, "max_relative_error": 0.5}
    calibrated = Report(
        benchmark="calibrate",
        machine=machine,
        versions={},
        commit=None,
        settings={"judgement": {"decode": quality, "all": {**quality, "r_squared": 1.0}}},
        rows=(),
    )
    errors = {"ttft mean": 0.1, "ttft p99": -0.1, "tpot mean": 0.0, "tpot p99": 0.5}
    compared = Report(
        benchmark="simulate-against",
        machine=machine,
        versions={},
        commit=None,
        settings={"prediction_errors": errors},
        rows=(
            placement("engine", "ttft_ms", 10.0, 20.0),
            placement("simulated", "ttft_ms", 11.0, 18.0),
            placement("engine", "tpot_ms", 5.0, 6.0),
            placement("simulated", "tpot_ms", 5.0, 9.0),
        ),
    )
    lines = readme_tables({"c.json": calibrated, "s.json": compared}).splitlines()
    assert [line for line in lines if line.startswith("| ") and "---" not in line] == [
        "| steps not fitted: mean error, R squared | `c.json` |",
        "| decode | 3.2%, 0.9877 |",
        "| all | 3.2%, 1.0000 |",
        "| milliseconds: engine, simulated, off by | `s.json` |",
        "| ttft mean | 10.0, 11.0, +10.0% |",
        "| ttft p99 | 20.0, 18.0, -10.0% |",
        "| tpot mean | 5.0, 5.0, +0.0% |",
        "| tpot p99 | 6.0, 9.0, +50.0% |",
    ]


def test_a_table_for_each_benchmark_and_a_column_for_each_file() -> None:
    assert readme_tables({"a.json": ENGINE, "k.json": KERNELS, "b.json": ENGINE}).splitlines() == [
        "| milliseconds: median (p10 to p90) | `a.json` | `b.json` |",
        "| --- | ---: | ---: |",
        "| GEMMs alone, batch 2 | 1.00 (0.50 to 1.50) | 1.00 (0.50 to 1.50) |",
        f"| decode step, batch 2, prompt 4, 2 adapters of rank 8, 16 on qkvo |{' 2.00 (1.00 to 3.00) |' * 2}",
        "| first token, prompt 4, base | 3.00 (2.00 to 4.00) | 3.00 (2.00 to 4.00) |",
        "",
        "`a.json`: a cpu, 2 cores, torch 2.13.0, commit 0123456789.",
        "",
        "`b.json`: a cpu, 2 cores, torch 2.13.0, commit 0123456789.",
        "",
        "| microseconds: median, part of the copy bandwidth | `k.json` |",
        "| --- | ---: |",
        "| LoRA kernels, 1 token, o | 5.0, 25% |",
        "",
        "`k.json`: a gpu, triton 3.6.0, commit unknown.",
    ]


def test_the_readme_has_the_tables_of_the_reports() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "benchmark-tables"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, ""), result.stderr


@pytest.mark.parametrize("report", [ENGINE, KERNELS])
def test_a_plot_is_written(tmp_path: Path, report: Report) -> None:
    pytest.importorskip("matplotlib")
    write_plot(report, tmp_path / "plot.svg")
    assert "</svg>" in (tmp_path / "plot.svg").read_text()


def test_a_plot_that_cannot_be_made_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PlotError, match=r"must end in \.png or \.svg, is 'plot\.doc'"):
        write_plot(ENGINE, tmp_path / "plot.doc")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(PlotError, match=r"needs matplotlib, which is not installed: pip install 'segue\[bench\]'"):
        write_plot(ENGINE, tmp_path / "plot.svg")

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from segue.bench import cpu
from segue.bench.cpu import CpuBenchConfig, run_cpu_bench
from segue.bench.cpu_shapes import CpuCase, WeightSets
from segue.bench.driver import BenchmarkError
from segue.bench.ratios import ratios
from segue.bench.report import Report, Row
from segue.bench.tables import readme_tables
from segue.cli.main import build_app
from segue.config import ConfigError
from segue.cpu_lora.elements import ElementType


def bench(*arguments: str) -> Result:
    return CliRunner().invoke(build_app(), ("bench", "cpu", *arguments), env={"COLUMNS": "200"})


def test_every_case_is_checked_and_timed(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    affinity = os.sched_getaffinity(0)
    result = bench("--tokens", "1,5", "--ranks", "3", "--runs", "2", "--cores", "1", "--json", str(out))
    assert (result.exit_code, result.stderr) == (0, "")
    assert os.sched_getaffinity(0) == affinity
    report = Report.read(out)
    cases = [(dtype, point, tokens) for dtype in ("float32", "bfloat16") for point in ("o", "qkv") for tokens in (1, 5)]
    one_core = [(measure, *case) for case in cases for measure in ("cpu_kernel_us", "torch_us")]
    assert [(row.measure, row.dtype, row.point, row.tokens) for row in report.rows] == [
        *one_core,
        *(("cpu_workers_us", *case) for case in cases),
    ]
    assert all(0 < row.p10 <= row.median <= row.p90 and (row.cores, row.runs) == (1, 2) for row in report.rows)
    for row in report.rows:
        if row.measure != "torch_us":
            assert row.max_relative_error is not None
            assert 0 < row.max_relative_error < (1e-5 if row.dtype == "float32" else 1e-2)
    assert "5 tokens, rank 3, bfloat16, qkv: torch in float32 over this" in result.stdout


def test_a_kernel_that_does_nothing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def fake_lora_delta(*_: Any) -> None: ...

    monkeypatch.setattr(cpu, "lora_delta", fake_lora_delta)
    with pytest.raises(BenchmarkError, match=r"1 tokens, rank 8, float32, o: the kernel is wrong by 1 "):
        run_cpu_bench(CpuBenchConfig(tokens=(1,), ranks=(8,), runs=1), lambda _: None)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"tokens": (0,)}, "tokens"),
        ({"ranks": ()}, "ranks"),
        ({"ranks": (2048,)}, "ranks"),
        ({"dtypes": ("float16",)}, "dtypes"),
        ({"runs": 0}, "runs"),
        ({"cores": 100_000}, "cores"),
    ],
)
def test_a_wrong_setting_is_named(settings: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=f"^{field}"):
        CpuBenchConfig(**settings)


def test_the_weights_outgrow_the_caches() -> None:
    case = CpuCase(tokens=1, rank=64, point="qkv", element=ElementType.BFLOAT16, dtype="bfloat16")
    assert case.weight_bytes == 64 * (4096 + 6144) * 2
    assert WeightSets.size_bytes(case) == 76 * case.weight_bytes
    assert case.call_bytes == case.weight_bytes + (4096 + 6144) * 2


def row(measure: str, median: float, dtype: str = "float32", cores: int = 1) -> Row:
    return Row(
        measure=measure, batch=1, adapters=1, ranks=(8,), case=f"4 tokens, rank 8, {dtype}", tokens=4, point="o",
        dtype=dtype, cores=cores, median=median, p10=1.0, p90=99.0, runs=1,
    )  # fmt: skip


ROWS = (
    row("cpu_kernel_us", 10.0),
    row("torch_us", 20.0),
    row("cpu_kernel_us", 5.0, "bfloat16"),
    row("torch_us", 4.0, "bfloat16"),
    row("cpu_workers_us", 12.0),
    row("cpu_workers_us", 8.0, cores=2),
)


def test_ratios_of_known_medians() -> None:
    assert {ratio.name: ratio.value for ratio in ratios(ROWS)} == pytest.approx(
        {
            "4 tokens, rank 8, float32, o: torch in float32 over this": 2.0,
            "4 tokens, rank 8, bfloat16, o: torch in bfloat16 over this": 0.8,
            "4 tokens, rank 8, bfloat16, o: torch in float32 over this": 4.0,
            "4 tokens, rank 8, float32, o: tokens/s of 2 workers over one": 1.5,
        }
    )


def test_the_readme_has_a_line_for_each_shape() -> None:
    report = Report.here("cpu", {}, ROWS)
    assert readme_tables({"c.json": report}).splitlines()[:3] == [
        "| microseconds on one core: median; torch's over it | `c.json` float32 | `c.json` bfloat16 |",
        "| --- | ---: | ---: |",
        "| 4 tokens, rank 8, o | 10.0, 2.00 | 5.0, 0.80 |",
    ]

"""Without a GPU the kernels are interpreted, at small shapes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from segue.bench import kernel_cases
from segue.bench.driver import BenchmarkError
from segue.bench.kernel_cases import CASES_8B, LLAMA_8B, SMALL, SMALL_CASES, KernelBatch, KernelCase, Layer
from segue.bench.kernels import KernelBenchConfig, check_kernels, run_kernel_bench
from segue.bench.report import Report


def test_every_kernel_agrees_with_float64() -> None:
    checks = check_kernels(KernelBenchConfig(), lambda _: None)
    cases = CASES_8B if torch.cuda.is_available() else SMALL_CASES
    assert len(checks) == sum(len(case.points) for case in cases) + 1
    assert {check.point for check in checks} == {"qkv", "o", "gate_up", "down", "qkv+o"}
    assert all(0 < check.max_relative_error < 1e-2 for check in checks[:-1])


def test_a_kernel_that_does_nothing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def fake_run(_batch: KernelBatch, _layer: Layer) -> None: ...

    monkeypatch.setattr(kernel_cases.KernelBatch, "run", fake_run)
    with pytest.raises(BenchmarkError, match=r"1 token, rank \d+, qkv: the kernels are wrong by"):
        check_kernels(KernelBenchConfig(), lambda _: None)


def test_the_bytes_of_a_call() -> None:
    """As in the report of an H200."""
    expected = {("1 token, rank 64", "qkv"): 2392064, ("128 distinct, mixed", "o"): 66060288}
    cases = {case.name: case for case in CASES_8B}
    for (name, point), size in expected.items():
        assert KernelBatch(LLAMA_8B, cases[name], point, torch.bfloat16, "cpu", 132).call_bytes == size


def test_float32_is_exact_to_its_rounding() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch = KernelBatch(SMALL, KernelCase("two", (1, 3), (4, 8)), "qkv", torch.float32, device, 2)
    assert batch.max_relative_error(batch.make_layer()) < 1e-6


@pytest.mark.gpu
def test_a_report_has_every_row(tmp_path: Path) -> None:
    report = run_kernel_bench(KernelBenchConfig(runs=3), lambda _: None)
    assert len(report.rows) == sum(len(case.points) for case in CASES_8B) + 1
    assert all(row.copy_fraction is not None and 0 < row.copy_fraction < 1.2 for row in report.rows)
    report.write(tmp_path / "report.json")
    assert Report.read(tmp_path / "report.json") == report

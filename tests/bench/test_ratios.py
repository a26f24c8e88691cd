from __future__ import annotations

from pathlib import Path

import pytest

from segue.bench.ratios import ratios
from segue.bench.report import Report, Row


def step(batch: int, adapters: int, median: float, measure: str = "decode_step_ms", when: str | None = None) -> Row:
    return Row(measure=measure, batch=batch, adapters=adapters, when=when, median=median, p10=0.0, p90=99.0, runs=1)


def test_ratios_of_known_medians() -> None:
    rows = [
        step(1, 0, 2.0, "gemm_ms"),
        step(1, 0, 4.0),
        step(16, 0, 4.0, "gemm_ms"),
        step(16, 0, 8.0),
        step(16, 8, 12.0),
        step(1, 0, 50.0, "ttft_ms"),
        step(1, 1, 60.0, "ttft_ms"),
    ]
    assert {ratio.name: ratio.value for ratio in ratios(rows)} == pytest.approx(
        {
            "GEMMs alone, base: tokens/s of batch 16 over batch 1": 8.0,
            "decode step, base: tokens/s of batch 16 over batch 1": 8.0,
            "batch 16: time per token with 8 adapters over base": 1.5,
            "batch 1, base: decode step over its GEMMs alone": 2.0,
            "batch 16, base: decode step over its GEMMs alone": 2.0,
            "batch 16, 8 adapters: decode step over its GEMMs alone": 3.0,
        }
    )


def test_no_ratio_without_both_rows() -> None:
    assert ratios([]) == ()
    assert ratios([step(16, 8, 12.0)]) == ()
    assert ratios([step(1, 0, 4.0), step(16, 8, 12.0)]) == ()


def test_base_rows_measured_again_tell_the_drift_and_nothing_else() -> None:
    rows = [step(4, 0, 4.0, when="before"), step(4, 2, 6.0), step(4, 0, 5.0, when="after")]
    assert {ratio.name: ratio.value for ratio in ratios(rows)} == pytest.approx(
        {
            "batch 4: time per token with 2 adapters over base": 1.5,
            "batch 4: base step after those with adapters over before": 1.25,
        }
    )


def test_kernels_are_compared_with_peers() -> None:
    """As docs/notes-kernels.md has it for the report of an H200."""
    folder = Path(__file__).parent.parent.parent / "docs" / "benchmarks"
    found = {ratio.name: ratio.value for ratio in ratios(Report.read(folder / "kernels-h200.json").rows)}
    assert len(found) == 10
    name = "1 token, rank 64, q, k, v and o: best peer on an H200 (19.7 us) over this"
    assert found[name] == pytest.approx(1.93, abs=0.005)

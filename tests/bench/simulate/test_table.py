"""A simulation's report in words."""

from __future__ import annotations

from segue.bench.machine import Machine
from segue.bench.report import Report, Row
from segue.bench.tables import readme_tables


def times(placement: str, measure: str, mean: float) -> Row:
    return Row(
        measure=measure, batch=9, adapters=4, placement=placement, mean=mean, p99=3 * mean,
        median=mean, p10=mean, p90=2 * mean, runs=9,
    )  # fmt: skip


def once(placement: str, measure: str, value: float) -> Row:
    return Row(
        measure=measure,
        batch=9,
        adapters=4,
        placement=placement,
        mean=value,
        median=value,
        p10=value,
        p90=value,
        runs=1,
    )


def test_the_readmes_table_has_a_column_for_each_placement() -> None:
    rows = [
        row
        for placement, share, mean in (("rank-aware", 0.995, 30.0), ("most-idle", 0.5, 40.0))
        for row in (
            once(placement, "slo_attainment_fraction", share),
            times(placement, "ttft_ms", 100.0),
            times(placement, "time_per_token_ms", mean),
            once(placement, "preemptions_count", 2.0),
        )
    ]
    report = Report(
        benchmark="simulate", machine=Machine(cpu="a cpu", gpu=None), versions={}, commit=None, rows=(*rows,)
    )
    assert readme_tables({"s.json": report}).splitlines() == [
        "| `s.json`: placement | rank-aware | most-idle |",
        "| --- | ---: | ---: |",
        "| attained | 99.5% | 50.0% |",
        "| TTFT mean, ms | 100.0 | 100.0 |",
        "| TTFT p99, ms | 300.0 | 300.0 |",
        "| TPOT mean, ms |  |  |",
        "| TPOT p99, ms |  |  |",
        "| time per token mean, ms | 30.0 | 40.0 |",
        "| time per token p99, ms | 90.0 | 120.0 |",
        "| preemptions | 2 | 2 |",
        "| time per token against most-idle | -25.0% | +0.0% |",
        "",
        "`s.json`: a cpu, commit unknown.",
    ]

"""The requests of a result as a CSV file, one a line."""

from __future__ import annotations

import csv
from pathlib import Path

from segue.bench.slo.outcome import Outcome
from segue.bench.slo.run import SloResult

COLUMNS = (
    "requests_per_second", "run", "request", "measured", "due_seconds", "send_lag_ms", "class", "tenant", "adapter",
    "rank", "popularity_decile", "prompt_tokens", "output_tokens", "received_tokens", "ttft_ms", "tpot_ms", "queue_ms",
    "tier", "verdict", "status", "message",
)  # fmt: skip


def write_csv(result: SloResult, path: Path) -> None:
    """All requests of the reported rate, those that are not measured included. Raises OSError."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for number, run in enumerate(result.runs, start=1):
            for outcome in run.outcomes:
                writer.writerow([f"{run.requests_per_second:.6g}", number, *_cells(outcome)])


def _cells(outcome: Outcome) -> list[object]:
    request, record = outcome.request, outcome.record
    adapter = request.adapter
    return [
        request.number,
        int(request.measured),
        f"{request.at_seconds:.6f}",
        _ms(outcome.send_lag_seconds),
        request.slo.name,
        request.tenant or "",
        "" if adapter is None else adapter.name,
        "" if adapter is None else adapter.rank,
        "" if adapter is None else adapter.decile,
        request.prompt_tokens,
        request.output_tokens,
        record.tokens,
        _ms(outcome.ttft_seconds),
        _ms(outcome.tpot_seconds),
        _ms(record.queue_seconds),
        record.tier or "",
        outcome.verdict.value,
        record.code,
        record.message,
    ]


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:.3f}"

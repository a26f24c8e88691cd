"""Ratios between the rows of one run. Unlike the times themselves, they may be compared between machines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from segue.bench.report import Row

_STEP, _GEMMS = "decode_step_ms", "gemm_ms"
_NAMES = {_STEP: "decode step", _GEMMS: "GEMMs alone"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """``value`` is what ``name`` says in words, made of medians."""

    name: str
    value: float


def ratios(rows: Sequence[Row]) -> tuple[Ratio, ...]:
    """Tokens a second of a larger batch over the smallest; time per token with adapters over the base model's; and
    time of a step over that of its GEMMs. Each where both rows are there."""
    return (*_batch_gains(rows), *_adapter_costs(rows), *_gemm_overheads(rows))


def _batch_gains(rows: Sequence[Row]) -> Iterator[Ratio]:
    for row in rows:
        mates = [mate for mate in rows if row.measure in _NAMES and _case(mate) == _case(row)]
        least = min(mates, key=lambda mate: mate.batch, default=row)
        if least.batch < row.batch:
            value = (row.batch / row.median) / (least.batch / least.median)
            what = f"{_NAMES[row.measure]}, {_adapters(row)}"
            yield Ratio(name=f"{what}: tokens/s of batch {row.batch} over batch {least.batch}", value=value)


def _adapter_costs(rows: Sequence[Row]) -> Iterator[Ratio]:
    base = {row.batch: row for row in rows if row.measure == _STEP and not row.adapters}
    for row in rows:
        if row.measure == _STEP and row.adapters and row.batch in base:
            value = row.median / base[row.batch].median
            yield Ratio(name=f"batch {row.batch}: time per token with {_adapters(row)} over base", value=value)


def _gemm_overheads(rows: Sequence[Row]) -> Iterator[Ratio]:
    gemms = {row.batch: row for row in rows if row.measure == _GEMMS}
    for row in rows:
        if row.measure == _STEP and row.batch in gemms:
            value = row.median / gemms[row.batch].median
            yield Ratio(name=f"batch {row.batch}, {_adapters(row)}: decode step over its GEMMs alone", value=value)


def _case(row: Row) -> tuple[object, ...]:
    """All of a case but its batch."""
    return row.measure, row.adapters, row.ranks, row.targets, row.prompt, row.residency


def _adapters(row: Row) -> str:
    match row.adapters:
        case 0:
            return "base"
        case 1:
            return "1 adapter"
        case count:
            return f"{count} adapters"

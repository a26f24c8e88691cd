"""Ratios between the rows of one run. Unlike the times themselves, they may be compared between machines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from segue.bench.cases import When
from segue.bench.report import Row
from segue.bench.tables import mix_words

_STEP, _GEMMS = "decode_step_ms", "gemm_ms"
_NAMES = {_STEP: "decode step", _GEMMS: "GEMMs alone"}
# Microseconds of the faster of SGLang 0.5.23 and vLLM 0.33.0 for q, k, v and o together, on an H200: see
# docs/notes-kernels.md.
_PEER_US = {
    "1 token, rank 64": 19.7,
    "8 distinct, mixed 8..64": 25.2,
    "32 distinct, mixed": 45.5,
    "32 distinct, rank 64": 51.1,
    "128 distinct, mixed": 130.0,
    "128 tokens over 8 adapters, mixed": 37.6,
    "prefill 128, one adapter": 43.2,
    "prefill 512, one adapter": 61.8,
    "prefill 4 x 512, four adapters": 112.0,
    "prefill 4092 over 6 adapters": 182.0,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """``value`` is what ``name`` says in words, made of medians."""

    name: str
    value: float


def ratios(rows: Sequence[Row]) -> tuple[Ratio, ...]:
    """Tokens a second of a larger batch over the smallest; time per token with adapters over the base model's; time of
    a step over that of its GEMMs; and the base model's steps after those with adapters over before. Each where both
    rows are there. Of base rows, all but the last use those measured before. Of kernels: a published time of the best
    peer on an H200 over q, k, v and o together. Of the CPU's kernel: torch's time over its own on the same core, in the
    same element type and in float32, and tokens a second of several workers over one."""
    first = [row for row in rows if row.when != When.AFTER]
    engine = (*_batch_gains(first), *_adapter_costs(first), *_gemm_overheads(first), *_drifts(rows))
    return (*engine, *_peer_gains(rows), *_torch_gains(rows), *_worker_gains(rows))


def _batch_gains(rows: Sequence[Row]) -> Iterator[Ratio]:
    for row in rows:
        mates = [mate for mate in rows if row.measure in _NAMES and _case(mate) == _case(row)]
        least = min(mates, key=lambda mate: mate.batch, default=row)
        if least.batch < row.batch:
            value = (row.batch / row.median) / (least.batch / least.median)
            what = f"{_NAMES[row.measure]}, {mix_words(row)}"
            yield Ratio(name=f"{what}: tokens/s of batch {row.batch} over batch {least.batch}", value=value)


def _adapter_costs(rows: Sequence[Row]) -> Iterator[Ratio]:
    base = {row.batch: row for row in rows if row.measure == _STEP and not row.adapters}
    for row in rows:
        if row.measure == _STEP and row.adapters and row.batch in base:
            value = row.median / base[row.batch].median
            yield Ratio(name=f"batch {row.batch}: time per token with {mix_words(row)} over base", value=value)


def _gemm_overheads(rows: Sequence[Row]) -> Iterator[Ratio]:
    gemms = {row.batch: row for row in rows if row.measure == _GEMMS}
    for row in rows:
        if row.measure == _STEP and row.batch in gemms:
            value = row.median / gemms[row.batch].median
            yield Ratio(name=f"batch {row.batch}, {mix_words(row)}: decode step over its GEMMs alone", value=value)


def _drifts(rows: Sequence[Row]) -> Iterator[Ratio]:
    before = {row.batch: row for row in rows if row.when == When.BEFORE}
    for row in rows:
        if row.when == When.AFTER and row.batch in before:
            value = row.median / before[row.batch].median
            yield Ratio(name=f"batch {row.batch}: base step after those with adapters over before", value=value)


def _peer_gains(rows: Sequence[Row]) -> Iterator[Ratio]:
    own = {(row.case, row.point): row.median for row in rows if row.measure == "lora_kernels_us"}
    for case, peer_us in _PEER_US.items():
        if (case, "qkv") in own and (case, "o") in own:
            value = peer_us / (own[case, "qkv"] + own[case, "o"])
            yield Ratio(name=f"{case}, q, k, v and o: best peer on an H200 ({peer_us:g} us) over this", value=value)


def _torch_gains(rows: Sequence[Row]) -> Iterator[Ratio]:
    torch = {(row.tokens, row.ranks, row.point, row.dtype): row.median for row in rows if row.measure == "torch_us"}
    for row in rows:
        if row.measure != "cpu_kernel_us":
            continue
        for dtype in dict.fromkeys((row.dtype, "float32")):
            peer = torch.get((row.tokens, row.ranks, row.point, dtype))
            if peer is not None:
                yield Ratio(name=f"{row.case}, {row.point}: torch in {dtype} over this", value=peer / row.median)


def _worker_gains(rows: Sequence[Row]) -> Iterator[Ratio]:
    own = [row for row in rows if row.measure == "cpu_workers_us"]
    one = {(row.case, row.point): row.median for row in own if row.cores == 1}
    for row in own:
        if row.cores != 1 and (row.case, row.point) in one:
            name = f"{row.case}, {row.point}: tokens/s of {row.cores} workers over one"
            yield Ratio(name=name, value=one[row.case, row.point] / row.median)


def _case(row: Row) -> tuple[object, ...]:
    """All of a case but its batch."""
    return row.measure, row.adapters, row.ranks, row.targets, row.prompt, row.residency

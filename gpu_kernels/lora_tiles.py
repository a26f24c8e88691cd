"""Tile sizes of the LoRA kernels: pure integers, chosen once per model, device and regime.

An item of shrink serves one row without tensor cores or up to ``rows`` rows with them. Both kinds run in one launch, so
that any mix of adapters and rows is served by the same two kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import Enum
from types import MappingProxyType
from typing import NamedTuple

# Elements of one vector tile of a 16-bit dtype: 16 KiB, which 128 threads hold in 32 registers each.
_VECTOR_TILE_ELEMS = 8192
_MIN_DOT = 16


class Regime(Enum):
    """What batches the tiles are for; every batch is served by all of them.

    FEW: about 16 rows at most, so that latency counts. DECODE: more, with few rows per segment, so that time is the
    bytes of the weights. PREFILL: many rows per segment.
    """

    FEW = "few"
    DECODE = "decode"
    PREFILL = "prefill"


@dataclass(frozen=True, slots=True, kw_only=True)
class PointShape:
    """The GEMM that a LoRA point adds to: x [T, in_features], out [T, sum(out_features)], one module per output."""

    in_features: int
    out_features: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.in_features <= 0:
            raise ValueError(f"in_features: must be greater than 0, is {self.in_features}")
        if not self.out_features or min(self.out_features) <= 0:
            raise ValueError(f"out_features: must name at least one width greater than 0, is {self.out_features}")

    @property
    def modules(self) -> int:
        """How many modules share x."""
        return len(self.out_features)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraTiles:
    """Sizes of tiles, all powers of two, and of the grids. Work lists fit only the tiles that they were built with.

    Shrink: ``rows`` x ``ranks`` is the dot tile, fed ``step`` columns at a time; pages are looked up once for ``span``
    columns. ``vector`` is the tile [ranks, columns] of an item of one row, which multiplies without tensor cores.
    Partials have at most ``max_splits`` splits. Expand: ``rows`` rows times a tile [ranks, columns], ``tall``, or
    ``wide`` where the segment has few ranks. A grid of programs takes
    one item after the other; registers are per thread and say how many programs a multiprocessor holds.
    """

    chunk_elems: int
    page_elems: int
    rows: int
    ranks: int
    span: int
    step: int
    vector: tuple[int, int]
    wide: tuple[int, int]
    tall: tuple[int, int]
    max_splits: int
    shrink_programs: int
    expand_programs: int
    shrink_warps: int
    expand_warps: int
    shrink_registers: int
    expand_registers: int
    stages: int
    vector_stages: int
    expand_stages: int

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if min(value if isinstance(value, tuple) else (value,)) <= 0:
                raise ValueError(f"{field.name}: must be greater than 0, is {value}")
        if self.page_elems % self.chunk_elems:
            raise ValueError(f"page_elems: {self.page_elems} must be a multiple of chunk_elems {self.chunk_elems}")
        if self.span % self.step or (self.span > self.step and self.chunk_elems % self.span):
            raise ValueError(f"span: {self.span} must be {self.step} steps, and whole in a chunk of {self.chunk_elems}")

    @property
    def page_chunks(self) -> int:
        """Chunks in one page."""
        return self.page_elems // self.chunk_elems


class Architecture(Enum):
    """What of a GPU's generation the tiles depend on: the shared memory of a multiprocessor, and of one program.

    All of them have 65,536 registers a multiprocessor. SM_90 stands for 228 KiB and 227 KiB (Hopper, B100 and B200),
    SM_80 for 164 KiB and 163 KiB (A100), SM_86 for 100 KiB and 99 KiB (all others from 8.0 on); source: the table
    "Technical specifications per compute capability" of the CUDA C++ programming guide.
    """

    SM_80 = "sm_80"
    SM_86 = "sm_86"
    SM_90 = "sm_90"

    @classmethod
    def of(cls, capability: tuple[int, int]) -> Architecture:
        """That of a device by its compute capability. Raises ValueError below 8.0."""
        if capability < (8, 0):
            raise ValueError(f"the kernels need compute capability 8.0, the device has {capability[0]}.{capability[1]}")
        if capability[0] in (9, 10):
            return cls.SM_90
        return cls.SM_80 if capability == (8, 0) else cls.SM_86


class _Pipeline(NamedTuple):
    """Shrink's dot tile: columns of 16 bits that it is fed at a time, and how many of these are under way."""

    columns: int
    stages: int


# By (architecture, whether for prefill). A stage of shrink holds a step of x and of A: (16 rows + 32 ranks) x 128
# columns are 12 KiB, and 64 + 64 of prefill x 64 columns 16 KiB.
_PIPELINES: Mapping[tuple[Architecture, bool], _Pipeline] = MappingProxyType(
    {
        (Architecture.SM_90, False): _Pipeline(128, 3),
        (Architecture.SM_90, True): _Pipeline(64, 3),
        (Architecture.SM_80, False): _Pipeline(128, 2),
        (Architecture.SM_80, True): _Pipeline(64, 3),
        (Architecture.SM_86, False): _Pipeline(64, 3),
        (Architecture.SM_86, True): _Pipeline(64, 2),
    }
)


def choose_tiles(
    regime: Regime,
    *,
    chunk_elems: int,
    page_elems: int,
    element_bytes: int,
    multiprocessors: int,
    architecture: Architecture = Architecture.SM_90,
) -> LoraTiles:
    """The tiles for a model (its chunk and page), a dtype and a device. Plans' capacities do not depend on the
    architecture.

    Those of SM_90 are measured, on an H200. Those of SM_80 and SM_86 are reckoned from them and have not been measured:
    a grid is sized so that all of its programs run at once, and one whose stages of shared memory do not fit beside
    each other would leave some of them, and the items that they would take, for a second round. So shrink's stages are
    made to fit: the five programs of a multiprocessor (three for prefill) take 5 x 36 KiB on SM_90, 5 x 24 KiB on
    SM_80, where there is one stage less, and 5 x 18 KiB on SM_86, where a step has half the columns; for prefill
    3 x 48 KiB, the same, and 3 x 32 KiB. Registers bound the programs alike on all three, so that the rest is as it is.
    """
    widest = max(chunk_elems, _MIN_DOT)
    prefill = regime is Regime.PREFILL
    pipeline = _PIPELINES[architecture, prefill]
    vector_columns = min(256 if regime is Regime.DECODE else 1024, widest)
    step = max(min(pipeline.columns, widest) * 2 // element_bytes, _MIN_DOT)
    return LoraTiles(
        chunk_elems=chunk_elems,
        page_elems=page_elems,
        rows=64 if prefill else 16,
        ranks=64 if prefill else 32,
        span=max(min(chunk_elems, 512), step),
        step=step,
        vector=(max(_VECTOR_TILE_ELEMS * 2 // element_bytes // vector_columns, 4), vector_columns),
        wide=(16, min(64 if prefill else 256, widest)),
        tall=(64, min(64 if prefill else 128, widest)),
        max_splits=8,
        shrink_programs=multiprocessors * (3 if prefill else 5),
        expand_programs=multiprocessors * 3,
        shrink_warps=4,
        expand_warps=4,
        shrink_registers=168 if prefill else 96,
        expand_registers=168,
        stages=pipeline.stages,
        vector_stages=1,
        expand_stages=1,
    )

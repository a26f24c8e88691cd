"""The LoRA kernels against float64: in Triton's interpreter without a GPU, compiled with one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch

from segue.gpu_kernels.lora import add_lora
from segue.gpu_kernels.lora_tiles import Architecture, LoraTiles, PointShape, Regime, choose_tiles
from tests.gpu_kernels.lora_cases import TOLERANCE, Adapters, exact, make_adapters, relative_rms, run_batch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SLOTS = 6
Segments = list[tuple[int, int, int]]


@dataclass(frozen=True)
class Geometry:
    """A model's pages and widths. Rows are padded where a width is not a multiple of the chunk."""

    kv_heads: int
    chunk_elems: int
    shape: PointShape

    @property
    def page_elems(self) -> int:
        return 2 * 16 * self.kv_heads * (128 if self.chunk_elems > 32 else 16)


GEOMETRIES = {
    1: Geometry(1, 8, PointShape(in_features=72, out_features=(72, 24, 40))),
    3: Geometry(3, 32, PointShape(in_features=96, out_features=(96, 32, 32))),
    8: Geometry(8, 1024, PointShape(in_features=1280, out_features=(1024, 256, 512))),
}


def tiles_for(
    geometry: Geometry, dtype: torch.dtype, regime: Regime, architecture: Architecture = Architecture.SM_90
) -> LoraTiles:
    return choose_tiles(
        regime,
        chunk_elems=geometry.chunk_elems,
        page_elems=geometry.page_elems,
        element_bytes=dtype.itemsize,
        multiprocessors=132 if DEVICE == "cuda" else 1,
        architecture=architecture,
    )


def identical(batch: int) -> list[int]:
    return [batch]


def distinct(batch: int) -> list[int]:
    return [1] * batch


def uniform(batch: int) -> list[int]:
    return [rows for rows in np.bincount(np.random.default_rng(batch).integers(SLOTS, size=batch)).tolist() if rows]


def zipf(batch: int) -> list[int]:
    draws = np.random.default_rng(batch).zipf(1.5, size=batch)
    return [rows for rows in np.bincount(np.minimum(draws, SLOTS)).tolist() if rows]


def ragged(lengths: list[int]) -> tuple[Segments, int]:
    """Segments of these lengths over the slots in turn, with a base row before every third; and the number of rows."""
    segments = []
    row = 0
    for number, length in enumerate(lengths):
        row += number % 3 == 0
        segments.append((row, row + length, number % SLOTS))
        row += length
    return segments, row + 1


@lru_cache(maxsize=8)
def adapters_of_rank(kv_heads: int, rank: int, dtype: torch.dtype) -> Adapters:
    """The first adapter has ``rank`` everywhere, others less of it, and some do not target every module."""
    geometry = GEOMETRIES[kv_heads]
    small, half = min(rank, 8), max(rank // 2, 1)
    ranks = [(rank, rank, rank), (half, small, rank), (small, 0, half), (0, rank, 0), (0, 0, 0), (rank, small, 1)]
    return make_adapters(
        geometry.shape,
        ranks,
        page_elems=geometry.page_elems,
        chunk_elems=geometry.chunk_elems,
        dtype=dtype,
        device=DEVICE,
    )


def check(
    kv_heads: int,
    rank: int,
    batch: int,
    popularity: Callable[[int], list[int]],
    dtype: torch.dtype,
    regime: Regime,
    architecture: Architecture = Architecture.SM_90,
) -> None:
    geometry = GEOMETRIES[kv_heads]
    adapters = adapters_of_rank(kv_heads, rank, dtype)
    segments, rows = ragged(popularity(batch))
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(rows, geometry.shape.in_features, generator=generator).to(dtype).to(DEVICE)
    base = torch.randn(rows, sum(geometry.shape.out_features), generator=generator).to(dtype).to(DEVICE)
    tiles = tiles_for(geometry, dtype, regime, architecture)
    result = run_batch(adapters, x, base, segments, tiles)
    assert relative_rms(result, exact(adapters, x, base, segments)) < TOLERANCE[dtype]
    others = torch.ones(rows, dtype=torch.bool)
    for start, stop, _ in segments:
        others[start:stop] = False
    assert torch.equal(result[others], base[others])
    assert torch.equal(result, run_batch(adapters, x, base, segments, tiles))


F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    ("kv_heads", "rank", "batch", "popularity", "dtype", "regime"),
    [
        (1, 1, 1, identical, F32, Regime.FEW),
        (1, 8, 17, zipf, BF16, Regime.DECODE),
        (1, 256, 2, distinct, F32, Regime.DECODE),
        (1, 24, 63, uniform, F16, Regime.PREFILL),
        (3, 16, 17, distinct, F32, Regime.DECODE),
        (3, 24, 63, zipf, F32, Regime.DECODE),
        (3, 64, 129, identical, BF16, Regime.DECODE),
        (3, 128, 63, uniform, F32, Regime.PREFILL),
        (3, 256, 129, zipf, BF16, Regime.PREFILL),
        (3, 1, 129, distinct, F16, Regime.DECODE),
        (8, 8, 2, distinct, BF16, Regime.FEW),
        (8, 24, 2, distinct, BF16, Regime.DECODE),
        (8, 64, 17, zipf, F32, Regime.DECODE),
        (8, 24, 129, uniform, BF16, Regime.PREFILL),
        (8, 16, 1, identical, F16, Regime.PREFILL),
        (8, 128, 17, uniform, F32, Regime.DECODE),
    ],
)
def test_against_float64(
    kv_heads: int,
    rank: int,
    batch: int,
    popularity: Callable[[int], list[int]],
    dtype: torch.dtype,
    regime: Regime,
) -> None:
    check(kv_heads, rank, batch, popularity, dtype, regime)


@pytest.mark.parametrize("architecture", [Architecture.SM_80, Architecture.SM_86])
@pytest.mark.parametrize(("regime", "dtype"), [(Regime.DECODE, BF16), (Regime.PREFILL, F32)])
def test_tiles_of_other_architectures(architecture: Architecture, regime: Regime, dtype: torch.dtype) -> None:
    check(8, 24, 17, zipf, dtype, regime, architecture)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("regime", Regime)
@pytest.mark.parametrize("kv_heads", [1, 3, 8])
@pytest.mark.parametrize("popularity", [identical, distinct, uniform, zipf])
@pytest.mark.parametrize("rank", [1, 8, 16, 24, 64, 128, 256])
def test_whole_grid_against_float64(
    rank: int, popularity: Callable[[int], list[int]], kv_heads: int, regime: Regime, dtype: torch.dtype
) -> None:
    for batch in (1, 2, 17, 63, 129):
        check(kv_heads, rank, batch, popularity, dtype, regime)


@pytest.mark.parametrize("regime", Regime)
def test_rows_with_several_segments(regime: Regime) -> None:
    """An adapter and minus a merged one, on the same rows, and segments that overlap in part."""
    geometry = GEOMETRIES[3]
    adapters = adapters_of_rank(3, 24, F32)
    segments = [(0, 1, 1), (0, 1, 0), (1, 20, 0), (1, 20, 2), (3, 9, 5), (19, 22, 1)]
    scales = [1.0, -1.0, 1.0, -1.0, 0.5, 2.0]
    x, base = torch.randn(24, 96, device=DEVICE), torch.randn(24, 160, device=DEVICE)
    tiles = tiles_for(geometry, F32, regime)
    result = run_batch(adapters, x, base, segments, tiles, segment_scales=scales)
    assert relative_rms(result, exact(adapters, x, base, segments, segment_scales=scales)) < TOLERANCE[F32]


def test_layer_ranks_below_the_plan() -> None:
    """One plan serves every layer: a layer's smaller rank is read from its table, and what lies behind it is not."""
    geometry = GEOMETRIES[3]
    adapters = adapters_of_rank(3, 24, F32)
    planned = replace(adapters, ranks=np.where(adapters.ranks > 0, 40, 0).astype(np.int32))
    segments = [(0, 1, 0), (1, 2, 1), (2, 20, 2), (20, 22, 5)]
    x, base = torch.randn(22, 96, device=DEVICE), torch.randn(22, 160, device=DEVICE)
    result = run_batch(planned, x, base, segments, tiles_for(geometry, F32, Regime.DECODE))
    assert relative_rms(result, exact(adapters, x, base, segments)) < TOLERANCE[F32]


def test_strided_rows() -> None:
    """x and out may be slices of columns of wider tensors."""
    geometry = GEOMETRIES[3]
    adapters = adapters_of_rank(3, 16, F32)
    x = torch.full((20, 128), torch.nan, device=DEVICE)
    x[:, 16:112] = torch.randn(20, 96)
    base = torch.full((20, 192), torch.nan, device=DEVICE)
    base[:, 16:176] = torch.randn(20, 160)
    segments = [(0, 1, 0), (1, 20, 1)]
    tiles = tiles_for(geometry, F32, Regime.DECODE)
    result = run_batch(adapters, x[:, 16:112], base[:, 16:176], segments, tiles)
    expected = exact(adapters, x[:, 16:112], base[:, 16:176], segments)
    assert relative_rms(result, expected) < TOLERANCE[F32]


def test_no_segments() -> None:
    geometry = GEOMETRIES[3]
    adapters = adapters_of_rank(3, 8, F32)
    x, base = torch.randn(5, 96, device=DEVICE), torch.randn(5, 160, device=DEVICE)
    result = run_batch(adapters, x, base, [], tiles_for(geometry, F32, Regime.DECODE))
    assert torch.equal(result, base)


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("x", torch.zeros(4, 95), "x: must be"),
        ("x", torch.zeros(4, 96, dtype=torch.float64), "one dtype"),
        ("out", torch.zeros(4, 96), "out: must be"),
        ("pool_layer", torch.zeros(4, 100), "pool_layer: must be"),
        ("modules", torch.zeros(1, 3, dtype=torch.int32), "modules: must be"),
        ("scales", torch.zeros(1, 3, dtype=torch.float64), "scales: must be"),
        ("plan", torch.zeros(16, dtype=torch.int64), "must be int32"),
    ],
)
def test_wrong_arguments_are_refused(name: str, value: torch.Tensor, match: str) -> None:
    geometry = GEOMETRIES[3]
    arguments: dict[str, Any] = {
        "x": torch.zeros(4, 96),
        "out": torch.zeros(4, 160),
        "pool_layer": torch.zeros(4, geometry.page_elems),
        "page_tables": torch.zeros(1, 4, dtype=torch.int32),
        "modules": torch.zeros(1, 3, 3, dtype=torch.int32),
        "scales": torch.zeros(1, 3),
        "plan": torch.zeros(16, dtype=torch.int32),
        "workspace": torch.zeros(16),
    }
    arguments[name] = value
    tensors = {key: tensor.to(DEVICE) for key, tensor in arguments.items()}
    tiles = tiles_for(geometry, F32, Regime.DECODE)
    with pytest.raises(ValueError, match=match):
        add_lora(**tensors, shape=geometry.shape, tiles=tiles)

"""The torch references of the paged LoRA kernels and of landing, against dense float64 arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from segue.gpu_kernels.landing import land_rows
from segue.gpu_kernels.paged_lora import lora_expand_add, lora_shrink, read_rows, row_stride

PAGE_TOKENS = 16
HEAD_DIM = 16
# Relative root mean square error: a 16-bit output is rounded once, which costs at most the unit roundoff.
OUTPUT_TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@dataclass(frozen=True)
class PagedMatrix:
    """A matrix in pages that are scattered over a pool whose every other element is NaN."""

    dense: Tensor
    pool_layer: Tensor
    page_table: Tensor
    start: int
    chunk_elems: int


def paged(
    dense: Tensor, *, kv_heads: int = 2, chunk_elems: int = 32, start: int = 64, transpose: bool = False
) -> PagedMatrix:
    """Land ``dense`` [rows, columns] behind ``start`` elements of something else."""
    page_elems = 2 * PAGE_TOKENS * kv_heads * HEAD_DIM
    elements = start + dense.shape[0] * row_stride(dense.shape[1], chunk_elems)
    pages = math.ceil(elements / page_elems)
    pool_layer = torch.full((2 * pages + 3, page_elems), torch.nan, dtype=dense.dtype)
    page_table = torch.randperm(len(pool_layer), generator=torch.Generator().manual_seed(pages))[:pages]
    source = dense.T.contiguous() if transpose else dense
    land_rows(source, pool_layer, page_table, start, chunk_elems, transpose=transpose)
    return PagedMatrix(dense, pool_layer, page_table, start, chunk_elems)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative_rms(result: Tensor, exact: Tensor) -> float:
    error = (result.double() - exact).square().mean().sqrt()
    return float(error / exact.square().mean().sqrt())


@pytest.mark.parametrize("kv_heads", [1, 3, 8])
@pytest.mark.parametrize("columns", [32, 96, 80, 8])
@pytest.mark.parametrize("rows", [1, 24, 256])
@pytest.mark.parametrize("transpose", [False, True])
def test_landed_matrix_reads_back_whole(rows: int, columns: int, kv_heads: int, transpose: bool) -> None:
    dense = random(rows, columns)
    matrix = paged(dense, kv_heads=kv_heads, transpose=transpose)
    read = read_rows(matrix.pool_layer, matrix.page_table, matrix.start, rows, columns, matrix.chunk_elems)
    assert torch.equal(read, dense)


@pytest.mark.parametrize("columns", [96, 80])
def test_landing_writes_its_own_elements_only(columns: int) -> None:
    matrix = paged(random(24, columns), kv_heads=3)
    assert int(matrix.pool_layer.isfinite().sum()) == 24 * columns
    others = torch.ones(len(matrix.pool_layer), dtype=torch.bool)
    others[matrix.page_table] = False
    assert matrix.pool_layer[others].isnan().all()


def test_chunks_lie_at_their_place_in_the_stream() -> None:
    """Element e of the stream is at page e // page_elems, offset e % page_elems, rows ``row_stride`` apart."""
    dense = random(5, 80)
    matrix = paged(dense, kv_heads=1, start=480)
    page_elems = matrix.pool_layer.shape[1]
    assert page_elems == 512
    for row in range(5):
        for column in range(80):
            element = 480 + row * 96 + column
            page = matrix.page_table[element // page_elems]
            assert matrix.pool_layer[page, element % page_elems] == dense[row, column]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kv_heads", [1, 3])
@pytest.mark.parametrize("rank", [1, 24, 256])
@pytest.mark.parametrize("tokens", [1, 63, 129])
def test_shrink(tokens: int, rank: int, kv_heads: int, dtype: torch.dtype) -> None:
    a = paged(random(rank, 96, dtype=dtype, seed=1), kv_heads=kv_heads)
    x = random(tokens, 96, dtype=dtype, seed=2)
    s = lora_shrink(x, a.pool_layer, a.page_table, a.start, rank, a.chunk_elems)
    assert s.dtype == torch.float32
    assert s.shape == (tokens, rank)
    assert relative_rms(s, x.double() @ a.dense.double().T) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kv_heads", [1, 3])
@pytest.mark.parametrize("rank", [1, 24, 256])
@pytest.mark.parametrize("tokens", [1, 63, 129])
def test_expand_adds_into_a_slice_of_columns(tokens: int, rank: int, kv_heads: int, dtype: torch.dtype) -> None:
    b = paged(random(rank, 80, dtype=dtype, seed=1), kv_heads=kv_heads)
    s, base = random(tokens, rank, seed=2), random(tokens, 80, dtype=dtype, seed=3)
    merged = torch.full((tokens, 176), torch.nan, dtype=dtype)
    merged[:, 32:112] = base
    lora_expand_add(s, b.pool_layer, b.page_table, b.start, merged[:, 32:112], 0.625, b.chunk_elems)
    exact = base.double() + 0.625 * (s.double() @ b.dense.double())
    assert relative_rms(merged[:, 32:112], exact) < OUTPUT_TOLERANCE[dtype]
    assert merged[:, :32].isnan().all()
    assert merged[:, 112:].isnan().all()


def test_expand_rounds_a_16_bit_sum_once() -> None:
    """Adding a delta of half a rounding step 64 times over must not lose it: the sum over rank is made in float32."""
    b = paged(torch.full((64, 32), 2.0**-9, dtype=torch.bfloat16))
    out = torch.ones(1, 32, dtype=torch.bfloat16)
    lora_expand_add(torch.ones(1, 64), b.pool_layer, b.page_table, b.start, out, 1.0, b.chunk_elems)
    assert torch.equal(out, torch.full_like(out, 1.125))


def test_misaligned_start_is_refused() -> None:
    matrix = paged(random(4, 32))
    with pytest.raises(ValueError, match="multiples of chunk_elems"):
        read_rows(matrix.pool_layer, matrix.page_table, 8, 4, 32, 32)


def test_matrix_behind_the_table_is_refused() -> None:
    matrix = paged(random(40, 32))
    with pytest.raises(ValueError, match="the table has"):
        read_rows(matrix.pool_layer, matrix.page_table, matrix.start, 400, 32, 32)
    with pytest.raises(ValueError, match="the table has"):
        land_rows(random(400, 32), matrix.pool_layer, matrix.page_table, 0, 32)

"""The torch references of the paged LoRA kernels and of landing, against dense float64 arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from segue.gpu_kernels.landing import land_rows
from segue.gpu_kernels.paged_lora import PagedModule, add_paged_lora, read_rows, row_stride

PAGE_TOKENS = 16
HEAD_DIM = 16
CHUNK_ELEMS = 32
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


@dataclass(frozen=True)
class PagedPoint:
    """A point's modules in the pages of some adapters, all at the same elements."""

    pool_layer: Tensor
    page_tables: Tensor
    modules: list[PagedModule]
    weights: list[list[tuple[Tensor, Tensor]]]  # [segment][module]: A [rank, in], B [out, rank]

    def add(self, x: Tensor, out: Tensor, rows: slice | Tensor) -> None:
        add_paged_lora(
            x,
            out,
            rows=rows,
            pool_layer=self.pool_layer,
            page_tables=self.page_tables,
            modules=self.modules,
            chunk_elems=CHUNK_ELEMS,
        )

    def delta(self, segment: int, x: Tensor, width: int) -> Tensor:
        """The segment's delta [rows, width] in float64; zero in columns of no module."""
        delta = torch.zeros(len(x), width, dtype=torch.float64)
        for module, (a, b) in zip(self.modules, self.weights[segment], strict=True):
            columns = slice(module.column, module.column + module.width)
            delta[:, columns] = module.scale * (x.double() @ a.double().T @ b.double().T)
        return delta


def paged_point(
    sizes: Sequence[tuple[int, int, int, float]],
    *,
    segments: int = 1,
    in_features: int = 96,
    kv_heads: int = 2,
    dtype: torch.dtype = torch.float32,
) -> PagedPoint:
    """``sizes`` has each module's rank, first column, width and scale. All else in the pool is NaN."""
    modules: list[PagedModule] = []
    end = 64
    for rank, column, width, scale in sizes:
        b_start = end + rank * row_stride(in_features, CHUNK_ELEMS)
        modules.append(PagedModule(rank=rank, a_start=end, b_start=b_start, column=column, width=width, scale=scale))
        end = b_start + rank * row_stride(width, CHUNK_ELEMS)
    page_elems = 2 * PAGE_TOKENS * kv_heads * HEAD_DIM
    pages = math.ceil(end / page_elems)
    pool_layer = torch.full((segments * pages + 3, page_elems), torch.nan, dtype=dtype)
    scattered = torch.randperm(len(pool_layer), generator=torch.Generator().manual_seed(pages))
    page_tables = scattered[: segments * pages].view(segments, pages)
    weights: list[list[tuple[Tensor, Tensor]]] = []
    for segment, page_table in enumerate(page_tables):
        weights.append([])
        for number, module in enumerate(modules):
            a = random(module.rank, in_features, dtype=dtype, seed=100 * segment + 2 * number)
            b = random(module.width, module.rank, dtype=dtype, seed=100 * segment + 2 * number + 1)
            land_rows(a, pool_layer, page_table, module.a_start, CHUNK_ELEMS)
            land_rows(b, pool_layer, page_table, module.b_start, CHUNK_ELEMS, transpose=True)
            weights[-1].append((a, b))
    return PagedPoint(pool_layer, page_tables, modules, weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kv_heads", [1, 3])
@pytest.mark.parametrize("rank", [1, 24, 256])
@pytest.mark.parametrize("tokens", [1, 63, 129])
def test_one_module_adds_into_its_columns(tokens: int, rank: int, kv_heads: int, dtype: torch.dtype) -> None:
    point = paged_point([(rank, 32, 80, 0.625)], kv_heads=kv_heads, dtype=dtype)
    x, base = random(tokens, 96, dtype=dtype, seed=2), random(tokens, 176, dtype=dtype, seed=3)
    out = base.clone()
    point.add(x, out, slice(None))
    exact = base.double() + point.delta(0, x, 176)
    assert relative_rms(out[:, 32:112], exact[:, 32:112]) < OUTPUT_TOLERANCE[dtype]
    assert torch.equal(out[:, :32], base[:, :32])
    assert torch.equal(out[:, 112:], base[:, 112:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows_each", [1, 5])
@pytest.mark.parametrize("scattered", [False, True])
def test_segments_of_one_layout_add_their_own_deltas(scattered: bool, rows_each: int, dtype: torch.dtype) -> None:
    """Three modules of different ranks for three adapters; other rows keep their bits."""
    point = paged_point([(8, 0, 64, 0.5), (3, 64, 16, 2.0), (24, 112, 48, 1.0)], segments=3, dtype=dtype)
    tokens = 3 * rows_each + 4
    x, base = random(tokens, 96, dtype=dtype, seed=2), random(tokens, 160, dtype=dtype, seed=3)
    rows = torch.randperm(tokens, generator=torch.Generator().manual_seed(0)) if scattered else torch.arange(tokens)
    rows, others = rows[2:-2], torch.cat([rows[:2], rows[-2:]])
    out = base.clone()
    point.add(x, out, rows if scattered else slice(2, tokens - 2))
    for segment in range(3):
        own = rows[segment * rows_each : (segment + 1) * rows_each]
        exact = base[own].double() + point.delta(segment, x[own], 160)
        assert relative_rms(out[own], exact) < OUTPUT_TOLERANCE[dtype]
    assert torch.equal(out[others], base[others])
    assert torch.equal(out[:, 80:112], base[:, 80:112])


def test_a_16_bit_sum_is_rounded_once() -> None:
    """Adding a delta of half a rounding step 64 times over must not lose it: the sum over rank is made in float32."""
    point = paged_point([(64, 0, 32, 1.0)], dtype=torch.bfloat16)
    (module,) = point.modules
    a, b = torch.zeros(64, 96), torch.full((64, 32), 2.0**-9)
    a[:, 0] = 1
    for dense, start in ((a, module.a_start), (b, module.b_start)):
        land_rows(dense.bfloat16(), point.pool_layer, point.page_tables[0], start, CHUNK_ELEMS)
    out = torch.ones(1, 32, dtype=torch.bfloat16)
    point.add(torch.ones(1, 96, dtype=torch.bfloat16), out, slice(None))
    assert torch.equal(out, torch.full_like(out, 1.125))


@pytest.mark.parametrize(("shift", "message"), [(8, "multiples of chunk_elems"), (1 << 14, "the table has")])
def test_module_that_lies_elsewhere_is_refused(shift: int, message: str) -> None:
    point = paged_point([(4, 0, 32, 1.0)])
    (module,) = point.modules
    shifted = replace(module, a_start=module.a_start + shift, b_start=module.b_start + shift)
    with pytest.raises(ValueError, match=message):
        replace(point, modules=[shifted]).add(torch.ones(1, 96), torch.ones(1, 32), slice(None))


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

"""The landing kernel against the torch reference, bit for bit: interpreted without a GPU, compiled with one."""

from __future__ import annotations

import pytest
import torch

from segue.gpu_kernels.land_layers import land_layers
from segue.gpu_kernels.landing import LANDING_WORDS, land_matrices
from segue.gpu_kernels.paged_lora import row_stride

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# What is staged begins here in the host copy, and what it holds belongs to two layers.
FIRST_ELEM = 1000
LAYERS = 2
GEOMETRIES = {  # kv_heads: (page_elems, chunk_elems, (in, out) of each module)
    1: (512, 8, ((72, 72), (72, 24), (40, 72))),
    3: (1536, 32, ((96, 96), (96, 32), (80, 96))),
    8: (4096, 1024, ((1280, 1024), (1024, 256), (96, 1280))),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kv_heads", [1, 3, 8])
@pytest.mark.parametrize("ranks", [(1, 8, 16), (24, 0, 64), (100, 33, 7)])
def test_a_layer_lands_as_its_matrices_do(ranks: tuple[int, ...], kv_heads: int, dtype: torch.dtype) -> None:
    page_elems, chunk_elems, widths = GEOMETRIES[kv_heads]
    staging = torch.randn(200_000).repeat(6).to(dtype)
    starts = []
    end = 0
    source = FIRST_ELEM + 5
    for layer, (rank, (columns, out)) in enumerate(zip(ranks, widths, strict=True)):
        b_start = end + rank * row_stride(columns, chunk_elems)
        chunks = end // chunk_elems, b_start // chunk_elems
        starts.append((source, source + rank * columns, rank, columns, out, *chunks, layer % LAYERS))
        source += rank * (columns + out) + 3
        end = b_start + rank * row_stride(out, chunk_elems)
    pages = -(-end // page_elems)
    page_table = torch.randperm(pages + 3, generator=torch.Generator().manual_seed(0))[:pages]
    expected = torch.full((LAYERS, pages + 3, page_elems), torch.nan, dtype=dtype)
    table = torch.tensor(starts)
    land_matrices(staging, FIRST_ELEM, table, expected, page_table, chunk_elems)

    pool = torch.full_like(expected, torch.nan).to(DEVICE)
    land_layers(staging.to(DEVICE), FIRST_ELEM, table.to(DEVICE), pool, page_table.to(DEVICE), chunk_elems)
    torch.testing.assert_close(pool.cpu(), expected, rtol=0, atol=0, equal_nan=True)


def test_a_layer_without_modules() -> None:
    pool = torch.full((LAYERS, 2, 512), torch.nan, device=DEVICE)
    table = torch.zeros(0, LANDING_WORDS, dtype=torch.int64, device=DEVICE)
    land_layers(torch.zeros(4, device=DEVICE), 0, table, pool, torch.zeros(1, dtype=torch.int64, device=DEVICE), 8)
    assert pool.isnan().all()


def test_wrong_arguments_are_refused() -> None:
    staging, pool = torch.zeros(8, device=DEVICE), torch.zeros(LAYERS, 2, 512, device=DEVICE)
    pages = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    table = torch.zeros(1, LANDING_WORDS, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="pool's dtype"):
        land_layers(staging.half(), 0, table, pool, pages, 8)
    with pytest.raises(ValueError, match="table: must be"):
        land_layers(staging, 0, table[:, :6].contiguous(), pool, pages, 8)
    with pytest.raises(ValueError, match="a multiple of chunk_elems"):
        land_layers(staging, 0, table, pool, pages, 48)

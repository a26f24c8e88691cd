from __future__ import annotations

import pytest
import torch

from segue.engine.lora.manifest import AdapterManifest, ModuleWeights, Projection, TensorSpan
from segue.engine.memory.adapter_layout import AdapterLayout, choose_chunk_elems
from segue.gpu_kernels.landing import land_rows
from segue.gpu_kernels.paged_lora import read_rows, row_stride


def weights(
    projection: Projection, rank: int, in_features: int, out_features: int, scale: float = 2.0
) -> ModuleWeights:
    a = TensorSpan(file_offset=0, rows=rank, columns=in_features, dtype="F32")
    b = TensorSpan(file_offset=0, rows=out_features, columns=rank, dtype="F32")
    return ModuleWeights(projection=projection, rank=rank, scale=scale, a=a, b=b)


def manifest(*layers: tuple[ModuleWeights, ...]) -> AdapterManifest:
    return AdapterManifest(version_id=1, version="v", name="n", identity=(0, 0, 0, 0, 0), layers=layers)


@pytest.mark.parametrize(
    ("page_elems", "widths", "chunk"),
    [
        (32768, [4096, 1024, 14336], 1024),
        (2 * 16 * 3 * 64, [576, 192, 1536], 64),
        (512, [64, 32, 96], 32),
        (512, [30, 42], 8),
        (24, [1024], 8),
    ],
)
def test_the_chunk_is_the_largest_common_power_of_two(page_elems: int, widths: list[int], chunk: int) -> None:
    assert choose_chunk_elems(page_elems, widths) == chunk


@pytest.mark.parametrize("page_elems", [0, -8, 12])
def test_a_page_that_is_no_whole_number_of_chunks_is_refused(page_elems: int) -> None:
    with pytest.raises(ValueError, match="page_elems"):
        choose_chunk_elems(page_elems, [64])
    with pytest.raises(ValueError, match="page_elems"):
        AdapterLayout.plan(manifest(), page_elems=page_elems, chunk_elems=8)


def test_matrices_follow_each_other_in_whole_chunks() -> None:
    layer = (weights(Projection.Q, 3, 40, 24), weights(Projection.V, 2, 40, 9, scale=0.5))
    layout = AdapterLayout.plan(manifest(layer, (), layer[:1]), page_elems=64, chunk_elems=16)
    q, v = layout.layers[0]
    assert (q.a_start, q.b_start) == (0, 3 * 48)
    assert (v.a_start, v.b_start) == (3 * 48 + 3 * 32, 3 * 48 + 3 * 32 + 2 * 48)
    assert (v.projection, v.rank, v.scale, v.in_features, v.out_features) == (Projection.V, 2, 0.5, 40, 9)
    assert layout.layers[1] == ()
    assert layout.layers[2] == (q,)
    assert layout.pages == -(-(v.b_start + 2 * 16) // 64)


def test_pages_follow_the_rank() -> None:
    def pages(rank: int) -> int:
        shapes = [
            (Projection.Q, 4096, 4096),
            (Projection.K, 4096, 1024),
            (Projection.V, 4096, 1024),
            (Projection.O, 4096, 4096),
        ]
        layer = tuple(weights(projection, rank, *features) for projection, *features in shapes)
        return AdapterLayout.plan(manifest(layer), page_elems=32768, chunk_elems=1024).pages

    assert (pages(64), pages(8)) == (52, 7)


def test_what_is_landed_by_the_layout_is_read_back() -> None:
    shapes = [(Projection.Q, 3, 40, 24), (Projection.O, 5, 24, 40), (Projection.DOWN, 1, 17, 40)]
    layout = AdapterLayout.plan(manifest(tuple(weights(*shape) for shape in shapes)), page_elems=96, chunk_elems=8)
    pool_layer = torch.full((layout.pages + 2, 96), torch.nan)
    page_table = torch.randperm(layout.pages + 2)[: layout.pages]
    matrices = {}
    for module in layout.layers[0]:
        a, b = torch.randn(module.rank, module.in_features), torch.randn(module.out_features, module.rank)
        matrices[module.projection] = (a, b)
        land_rows(a, pool_layer, page_table, module.a_start, 8)
        land_rows(b, pool_layer, page_table, module.b_start, 8, transpose=True)
    for module in layout.layers[0]:
        a, b = matrices[module.projection]
        found_a = read_rows(pool_layer, page_table, module.a_start, module.rank, module.in_features, 8)
        found_b = read_rows(pool_layer, page_table, module.b_start, module.rank, module.out_features, 8)
        assert torch.equal(found_a, a)
        assert torch.equal(found_b, b.T)
        assert module.b_start - module.a_start == module.rank * row_stride(module.in_features, 8)

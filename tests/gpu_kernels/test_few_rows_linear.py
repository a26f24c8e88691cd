"""Products of few rows against float64: interpreted without a GPU, compiled with one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from segue.gpu_kernels.few_rows_linear import LinearTiles, choose_tiles, few_rows_linear, few_rows_linear_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter cuts off what does not fit a dtype, where devices round.
TOLERANCES = {torch.bfloat16: 4e-3, torch.float16: 5e-4}
TILES = LinearTiles(columns=64, step=128, stages=3, warps=4)


def operands(rows: int, out_features: int, in_features: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Rows within longer ones that are NaN around them, weights and a bias."""
    generator = torch.Generator().manual_seed(rows)
    wide = torch.full((rows, in_features + 16), torch.nan, dtype=dtype, device=DEVICE)
    x = wide[:, 8 : 8 + in_features]
    x.copy_(torch.randn(rows, in_features, generator=generator))
    weight = torch.randn(out_features, in_features, generator=generator).to(dtype).to(DEVICE)
    return x, weight, torch.randn(out_features, generator=generator).to(dtype).to(DEVICE)


def relative_rms(value: Tensor, expected: Tensor) -> float:
    return float((value.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt())


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 16, 17, 32])
def test_like_the_reference(rows: int, with_bias: bool, dtype: torch.dtype) -> None:
    x, weight, bias = operands(rows, 192, 384, dtype)
    used = bias if with_bias else None
    wide = torch.full((rows + 1, 200), torch.nan, dtype=dtype, device=DEVICE)
    few_rows_linear(x, weight, used, TILES, out=wide[:rows, :192])
    expected = few_rows_linear_reference(x.double(), weight.double(), None if used is None else used.double())
    assert relative_rms(wide[:rows, :192], expected) < TOLERANCES[dtype]
    assert wide[rows].isnan().all()
    assert wide[:rows, 192:].isnan().all()


@pytest.mark.parametrize("rows", [1, 4, 16, 32])
@pytest.mark.parametrize("features", [(4096, 512), (6144, 256), (28672, 256)], ids=str)
def test_with_the_chosen_tiles(features: tuple[int, int], rows: int) -> None:
    tiles = choose_tiles(rows, *features)
    if features[0] > 16384 and rows > 4:
        assert tiles is None
        return
    assert tiles is not None
    x, weight, _ = operands(rows, *features, torch.bfloat16)
    out = few_rows_linear(x, weight, None, tiles)
    assert relative_rms(out, few_rows_linear_reference(x.double(), weight.double())) < TOLERANCES[torch.bfloat16]


@pytest.mark.parametrize(
    ("rows", "features"), [(33, (4096, 4096)), (0, (4096, 4096)), (1, (100, 4096)), (1, (64, 100))]
)
def test_a_library_serves_the_rest(rows: int, features: tuple[int, int]) -> None:
    assert choose_tiles(rows, *features) is None


REFUSED: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor | None]], str]] = {
    "too many rows": (lambda x, w, b: (torch.cat([x] * 33), w, b), "1 to 32"),
    "another dtype": (lambda x, w, b: (x, w.float(), b), "one dtype"),
    "a dtype of 32 bits": (lambda x, w, b: (x.float(), w.float(), b.float()), "one dtype"),
    "columns that do not divide": (lambda x, w, b: (x, w[:100], b[:100]), "multiple"),
    "a weight in columns": (lambda x, w, b: (x, w.t().contiguous().t(), b), "contiguous"),
    "a short bias": (lambda x, w, b: (x, w, b[:-1]), "bias"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    spoil, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        few_rows_linear(*spoil(*operands(1, 128, 128, torch.bfloat16)), TILES)

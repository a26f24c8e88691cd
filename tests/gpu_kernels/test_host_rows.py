"""The kernels that carry rows, bit for bit against their references: interpreted without a GPU, compiled with one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from segue.gpu_kernels.host_rows import add_rows, add_rows_reference, pack_rows, pack_rows_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
COLUMNS = {
    "one": (24, 24, [(0, 0, 24)]),
    "one in the middle": (65, 200, [(0, 72, 65)]),
    "q and v": (1296, 1552, [(0, 0, 1040), (1040, 1296, 256)]),
    "q, k and v, wider than a block": (2100, 2109, [(0, 0, 1025), (1025, 1030, 75), (1100, 1109, 1000)]),
}


def host_memory(*shape: int, dtype: torch.dtype) -> Tensor:
    """Memory of the host that the kernel can reach, full of NaN."""
    return torch.full(shape, torch.nan, dtype=dtype, pin_memory=DEVICE == "cuda")


def strided(rows: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A matrix within a wider one that is NaN around it, and the wider one."""
    whole = torch.full((rows + 2, width + 21), torch.nan, dtype=dtype, device=DEVICE)
    inner = whole[1:-1, 5 : 5 + width]
    inner.copy_(torch.randn(rows, width))
    return inner, whole


def assert_equal(out: Tensor, expected: Tensor) -> None:
    """Equal bits, but for bfloat16 in the interpreter, which cuts off what does not fit where devices round."""
    one_place = 2**-7 if out.dtype is torch.bfloat16 and DEVICE == "cpu" else 0.0
    torch.testing.assert_close(out, expected, rtol=one_place, atol=0.0)


def finish() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 24, 1023, 2048])
@pytest.mark.parametrize("count", [1, 63, 129])
def test_rows_are_packed(count: int, width: int, dtype: torch.dtype) -> None:
    x, _ = strided(140, width, dtype)
    rows = torch.randperm(140, generator=torch.Generator().manual_seed(count))[:count].to(DEVICE)
    for places in (None, rows):
        packed = host_memory(count, width, dtype=dtype)
        pack_rows(x, places, packed)
        finish()
        expected = torch.full((count, width), torch.nan, dtype=dtype, device=DEVICE)
        pack_rows_reference(x, places, expected)
        assert not expected.isnan().any()
        assert torch.equal(packed, expected.cpu())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("count", [1, 63, 129])
def test_deltas_are_added(count: int, columns: str, dtype: torch.dtype) -> None:
    delta_width, width, ranges = COLUMNS[columns]
    rows = torch.randperm(140, generator=torch.Generator().manual_seed(count))[:count].to(DEVICE)
    for places in (None, rows):
        deltas = host_memory(count, delta_width, dtype=dtype)
        deltas.copy_(torch.randn(count, delta_width))
        out, whole = strided(140, width, dtype)
        expected = out.clone()
        add_rows_reference(deltas.to(DEVICE), places, expected, ranges)
        add_rows(deltas, places, out, ranges)
        finish()
        assert_equal(out, expected)
        assert int(whole.isnan().sum()) == whole.numel() - out.numel(), "it wrote beyond the output"


def test_what_is_not_finite_stays_so() -> None:
    deltas = host_memory(1, 3, dtype=torch.bfloat16)
    deltas.copy_(torch.tensor([[torch.inf, torch.nan, -torch.inf]]))
    out = torch.ones(1, 3, dtype=torch.bfloat16, device=DEVICE)
    add_rows(deltas, None, out, [(0, 0, 3)])
    expected = torch.tensor([[torch.inf, torch.nan, -torch.inf]], dtype=torch.bfloat16)
    torch.testing.assert_close(out.cpu(), expected, equal_nan=True)


def test_wrong_arguments_are_refused() -> None:
    x = torch.zeros(4, 16, device=DEVICE)
    with pytest.raises(ValueError, match="one dtype"):
        pack_rows(x, None, torch.zeros(2, 16, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="packed: has 8 columns"):
        pack_rows(x, None, torch.zeros(2, 8))
    with pytest.raises(ValueError, match="rows: there are 4"):
        pack_rows(x, None, torch.zeros(5, 16))
    with pytest.raises(ValueError, match="rows: must be int64"):
        pack_rows(x, torch.zeros(2, dtype=torch.int32, device=DEVICE), torch.zeros(2, 16))
    with pytest.raises(ValueError, match="consecutive"):
        pack_rows(x.t(), None, torch.zeros(2, 4))
    with pytest.raises(ValueError, match="1 to 3 ranges"):
        add_rows(torch.zeros(2, 16), None, x, [])
    with pytest.raises(ValueError, match="exceed"):
        add_rows(torch.zeros(2, 16), None, x, [(0, 8, 16)])

"""Rotation and the store of keys and values against their reference: interpreted without a GPU, compiled with one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from segue.gpu_kernels.rope_kv import rotate_and_store, rotate_and_store_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}
# heads, kv_heads, head_dim
SHAPES = [(1, 1, 16), (9, 3, 64), (32, 8, 128), (12, 12, 2)]
PAGE_TOKENS = 4
CONTEXT = 300


class Case:
    """Random rows within a wider matrix, as a merged product leaves them, and pages that are NaN."""

    def __init__(self, rows: int, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        heads, kv_heads, head_dim = shape
        generator = torch.Generator().manual_seed(rows)
        merged = torch.randn(rows, heads + 2 * kv_heads, head_dim, generator=generator).to(dtype).to(DEVICE)
        self.q, self.k, self.v = torch.split(merged, [heads, kv_heads, kv_heads], dim=1)
        self.positions = torch.randint(CONTEXT, (rows,), generator=generator).int().to(DEVICE)
        pages = -(-rows // PAGE_TOKENS) + 2
        self.slots = torch.randperm(pages * PAGE_TOKENS, generator=generator)[:rows].int().to(DEVICE)
        self.table = torch.randn(CONTEXT, head_dim, generator=generator).to(DEVICE)
        self.kv = torch.full((pages, 2, PAGE_TOKENS, kv_heads, head_dim), torch.nan, dtype=dtype, device=DEVICE)

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v, self.positions, self.slots, self.table, self.kv


def relative_rms(value: Tensor, expected: Tensor) -> float:
    wide = expected.double()
    return float((value.double() - wide).square().mean().sqrt() / wide.square().mean().sqrt())


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 63, 129])
def test_like_the_reference(rows: int, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    case, expected = Case(rows, shape, dtype), Case(rows, shape, dtype)
    rotate_and_store(*case.arguments)
    rotate_and_store_reference(*expected.arguments)
    assert relative_rms(case.q, expected.q) < TOLERANCES[dtype]
    written = ~expected.kv.isnan()
    assert int(written.sum()) == 2 * rows * shape[1] * shape[2]
    assert torch.equal(~case.kv.isnan(), written), "other slots were written, or none"
    assert relative_rms(case.kv[:, 0][written[:, 0]], expected.kv[:, 0][written[:, 0]]) < TOLERANCES[dtype]
    assert torch.equal(case.kv[:, 1][written[:, 1]], expected.kv[:, 1][written[:, 1]])
    # Between the rows' own heads nothing changed.
    assert torch.equal(case.k, expected.k)
    assert torch.equal(case.v, expected.v)


def test_no_rows() -> None:
    case = Case(0, (4, 2, 8), torch.float32)
    rotate_and_store(*case.arguments)
    assert case.kv.isnan().all()


REFUSED: dict[str, tuple[Callable[[Case], None], str]] = {
    "positions of another dtype": (lambda case: setattr(case, "positions", case.positions.long()), "positions"),
    "too few slots": (lambda case: setattr(case, "slots", case.slots[:-1]), "slots"),
    "a table of another width": (lambda case: setattr(case, "table", case.table[:, :-2]), "table"),
    "pages of another dtype": (lambda case: setattr(case, "kv", case.kv.double()), "one dtype"),
    "values of other heads": (lambda case: setattr(case, "v", case.v[:, :1]), "rows of heads"),
    "heads apart": (lambda case: setattr(case, "q", case.q[:, ::2]), "consecutive"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    spoil, message = REFUSED[name]
    case = Case(5, (4, 2, 8), torch.float32)
    spoil(case)
    with pytest.raises(ValueError, match=message):
        rotate_and_store(*case.arguments)

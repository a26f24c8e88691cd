"""The cases of ``segue bench cpu``, their random operands and the check against float64."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from segue.bench.driver import BenchmarkError
from segue.cpu_lora.elements import ElementType
from segue.cpu_lora.kernels import reference_delta

# In and out features of an 8B model's points: o, and q, k and v merged.
POINTS: Mapping[str, tuple[int, int]] = MappingProxyType({"o": (4096, 4096), "qkv": (4096, 6144)})
_SETS_BYTES = 100e6
# Of bfloat16 the sums in between and the deltas are rounded.
_TOLERANCE = {ElementType.FLOAT32: 1e-5, ElementType.BFLOAT16: 1e-2}


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuCase:
    """``tokens`` rows through one adapter of a rank, rows and weights of one element type."""

    tokens: int
    rank: int
    point: str
    element: ElementType
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.tokens} tokens, rank {self.rank}, {self.dtype}"

    @property
    def in_features(self) -> int:
        return POINTS[self.point][0]

    @property
    def out_features(self) -> int:
        return POINTS[self.point][1]

    @property
    def weight_bytes(self) -> int:
        return self.rank * (self.in_features + self.out_features) * self.element.item_bytes

    @property
    def call_bytes(self) -> int:
        """What a call reads and writes at least."""
        return self.weight_bytes + self.tokens * (self.in_features + self.out_features) * self.element.item_bytes


class WeightSets:
    """Equal sets of A and B one behind the other in ``store``, uint8 [size_bytes(case)]."""

    def __init__(self, case: CpuCase, store: npt.NDArray[np.uint8], a: npt.NDArray[Any], b: npt.NDArray[Any]) -> None:
        self.count = self.size_bytes(case) // case.weight_bytes
        self._set_bytes, self._a_bytes = case.weight_bytes, a.nbytes
        one = np.concatenate([a.view(np.uint8).reshape(-1), b.view(np.uint8).reshape(-1)])
        store[: self.size_bytes(case)].reshape(self.count, -1)[:] = one

    @staticmethod
    def size_bytes(case: CpuCase) -> int:
        """Bytes of all sets, at least two."""
        return max(2, int(_SETS_BYTES / case.weight_bytes)) * case.weight_bytes

    def offsets(self, turn: int) -> tuple[int, int]:
        """Byte offsets of A and B of the set whose turn it is."""
        start = turn % self.count * self._set_bytes
        return start, start + self._a_bytes


def matrices(case: CpuCase) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
    """Random x [tokens, in], A [rank, in] and B [out, rank]: float32, or bits of bfloat16."""
    generator = torch.Generator().manual_seed(case.tokens * 4096 + case.rank)
    shapes = ((case.tokens, case.in_features), (case.rank, case.in_features), (case.out_features, case.rank))
    x, a, b = (torch.randn(shape, generator=generator) for shape in shapes)
    if case.element is ElementType.FLOAT32:
        return x.numpy(), a.numpy(), b.numpy()
    x, a, b = (matrix.bfloat16().view(torch.uint16) for matrix in (x, a, b))
    return x.numpy(), a.numpy(), b.numpy()


def relative_error(
    case: CpuCase, deltas: npt.NDArray[Any], x: npt.NDArray[Any], a: npt.NDArray[Any], b: npt.NDArray[Any]
) -> float:
    """The largest error of ``deltas`` (their bytes) over the largest exact delta, scale 1.

    Raises BenchmarkError for one beyond rounding.
    """
    exact = reference_delta(_values(case, x), _values(case, a), _values(case, b), 1.0)
    found = _values(case, deltas.view(x.dtype).reshape(exact.shape))
    error = float(np.abs(found - exact).max() / np.abs(exact).max())
    # Not "error > ...": NaN must not pass.
    if not error <= _TOLERANCE[case.element]:
        raise BenchmarkError(f"{case.name}, {case.point}: the kernel is wrong by {error:.2g} of the largest delta")
    return error


def _values(case: CpuCase, matrix: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    if case.element is ElementType.FLOAT32:
        return matrix.astype(np.float32, copy=False)
    return (matrix.astype(np.uint32) << 16).view(np.float32)

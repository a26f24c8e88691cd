"""The LoRA kernel against its float64 reference."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from segue.cpu_lora.kernels import ROW_TILE, Scratch, delta_of, lora_delta, reference_delta
from segue.cpu_lora.layout import MAX_RANK
from segue.cpu_lora.native import host_cpu_features

RANKS = (1, 2, 3, 7, 8, 16, 24, 31, 64, 128, 256)
TOKENS = (1, 2, 3, 5, 63, 129)


@pytest.fixture(scope="module")
def scratch() -> Scratch:
    return Scratch.allocate()


def relative_rms(value: npt.NDArray[Any], reference: npt.NDArray[Any]) -> float:
    return float(np.sqrt(((value - reference) ** 2).sum() / (reference**2).sum()))


def random_arrays(
    rows: int, in_features: int, out_features: int, rank: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    rng = np.random.default_rng((rows, in_features, out_features, rank))
    return (
        rng.standard_normal((rows, in_features), dtype=np.float32),
        rng.standard_normal((rank, in_features), dtype=np.float32),
        rng.standard_normal((out_features, rank), dtype=np.float32),
    )


def to_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Bits of finite or infinite float32 values rounded to nearest even."""
    bits = values.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bfloat16(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_float32_agrees_with_reference(rank: int, tokens: int, scratch: Scratch) -> None:
    for in_features, out_features in ((64, 96), (320, 64), (1100, 300)):
        x, a, b = random_arrays(tokens, in_features, out_features, rank)
        assert relative_rms(delta_of(x, a, b, 0.25, scratch), reference_delta(x, a, b, 0.25)) < 1e-5


@pytest.mark.parametrize("features", [(1, 1), (3, 5), (17, 15), (33, 257), (1025, 31), (2049, 513)])
@pytest.mark.parametrize("tokens", [1, 4, 7, 9, 17, 65])
def test_odd_widths(features: tuple[int, int], tokens: int, scratch: Scratch) -> None:
    for rank in (1, 5, 16, 33):
        x, a, b = random_arrays(tokens, *features, rank)
        assert relative_rms(delta_of(x, a, b, -2.0, scratch), reference_delta(x, a, b, -2.0)) < 1e-5


def test_largest_rank(scratch: Scratch) -> None:
    x, a, b = random_arrays(70, 96, 300, MAX_RANK)
    assert relative_rms(delta_of(x, a, b, 1.0, scratch), reference_delta(x, a, b, 1.0)) < 1e-5


@pytest.mark.parametrize("rank", [1, 7, 8, 24, 64])
@pytest.mark.parametrize("tokens", [1, 5, 16, 63])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_formats_are_exact_where_the_numbers_are(rank: int, tokens: int, dtype: str, scratch: Scratch) -> None:
    """Small integers: every product and sum is exact in float32, so only the last rounding remains."""
    rng = np.random.default_rng((rank, tokens))
    x, a, b = (rng.integers(-3, 4, shape).astype(np.float32) for shape in ((tokens, 77), (rank, 77), (131, rank)))
    exact = reference_delta(x, a, b, 0.5).astype(np.float32)
    if dtype == "bfloat16":
        y = delta_of(to_bfloat16(x), to_bfloat16(a), to_bfloat16(b), 0.5, scratch)
        np.testing.assert_array_equal(y, to_bfloat16(exact))
        mixed = delta_of(x, to_bfloat16(a), to_bfloat16(b), 0.5, scratch)
    else:
        half = np.float16
        y = delta_of(x.astype(half), a.astype(half), b.astype(half), 0.5, scratch)
        np.testing.assert_array_equal(y, exact.astype(half))
        mixed = delta_of(x, a.astype(half), b.astype(half), 0.5, scratch)
    np.testing.assert_array_equal(mixed, exact)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_16_bit_weight_widens_exactly(dtype: str, scratch: Scratch) -> None:
    bits = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16).reshape(-1, 1)
    one = np.array([[1]], np.float32)
    if dtype == "bfloat16":
        y = delta_of(one, to_bfloat16(one), bits, 1.0, scratch)
        expected = from_bfloat16(bits)
    else:
        y = delta_of(one, one.astype(np.float16), bits.view(np.float16), 1.0, scratch)
        expected = bits.view(np.float16).astype(np.float32)
    np.testing.assert_array_equal(y.reshape(-1), expected.reshape(-1))  # NaN where NaN is expected


def test_deltas_round_to_nearest_even(scratch: Scratch) -> None:
    rng = np.random.default_rng(3)
    bits = rng.integers(0, 1 << 32, 100_000, dtype=np.uint64).astype(np.uint32)
    ties = (bits[:20_000] & np.uint32(0xFFFF0000)) | np.uint32(0x8000)
    values = np.concatenate([bits, ties, np.array([0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000], np.uint32)]).view(np.float32)
    values = values[~np.isnan(values)].reshape(-1, 1)
    one = np.array([[1]], np.float32)
    y = delta_of(to_bfloat16(one), one, values, 1.0, scratch)
    np.testing.assert_array_equal(y.reshape(-1), to_bfloat16(values.reshape(-1)))
    with np.errstate(over="ignore"):
        halves = values.reshape(-1).astype(np.float16)
    np.testing.assert_array_equal(delta_of(one.astype(np.float16), one, values, 1.0, scratch).reshape(-1), halves)


@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_nan_and_infinity_stay(tokens: int, dtype: str, scratch: Scratch) -> None:
    x, a, b = (abs(array) + 1 for array in random_arrays(tokens, 50, 40, 8))
    x[1, 7] = np.nan
    x[2, 9] = np.inf
    if dtype == "bfloat16":
        bits = to_bfloat16(np.where(np.isnan(x), 0, x).astype(np.float32))
        bits[1, 7] = 0x7F81  # a signalling NaN: rounding it must not give infinity
        y: npt.NDArray[Any] = from_bfloat16(delta_of(bits, to_bfloat16(a), to_bfloat16(b), 0.01, scratch))
    elif dtype == "float16":
        y = delta_of(x.astype(np.float16), a.astype(np.float16), b.astype(np.float16), 0.01, scratch)
    else:
        y = delta_of(x, a, b, 0.01, scratch)
    assert np.isnan(y[1]).all()
    assert np.isposinf(y[2]).all()
    assert np.isfinite(np.delete(y, [1, 2], axis=0)).all()


def test_rank_zero_writes_zeros_whatever_the_rows_hold(scratch: Scratch) -> None:
    x = np.full((5, 12), np.nan, np.float32)
    for rows in (x, to_bfloat16(np.ones_like(x)), x.astype(np.float16)):
        y = delta_of(rows, np.zeros((0, 12), rows.dtype), np.zeros((9, 0), rows.dtype), 1.0, scratch)
        np.testing.assert_array_equal(y, np.zeros((5, 9), rows.dtype))


@pytest.mark.parametrize("tokens", [1, 3, 8, 16, 21, ROW_TILE])
@pytest.mark.parametrize("item", [4, 2])
def test_nothing_outside_the_block_is_written(tokens: int, item: int, scratch: Scratch) -> None:
    in_features, out_features, rank, width = 20, 37, 5, 64
    memory = np.full(1 << 16, 0xFF, np.uint8)
    x_at, a_at, b_at, y_at = 0, 1 << 13, 1 << 14, 1 << 15
    memory[:y_at] = 0
    before = memory.copy()
    lora_delta(
        memory.view(np.float32), memory.view(np.uint16), 0 if item == 4 else 1, x_at, y_at + 11 * item, width, tokens,
        in_features, out_features, 0, rank, a_at, b_at, 1.0, scratch,
    )  # fmt: skip
    changed = np.flatnonzero(memory != before) - y_at
    rows, columns = np.divmod(changed // item, width)
    assert (changed >= 0).all()
    assert set(rows) == set(range(tokens))
    assert set(columns) == set(range(11, 11 + out_features))


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_bfloat16_agrees_with_reference(rank: int, tokens: int, scratch: Scratch) -> None:
    """The deltas' rounding alone is 1.7e-3; rounding the sums in between as well makes it 2.4e-3."""
    for in_features, out_features in ((64, 96), (321, 65), (1100, 300)):
        x, a, b = (to_bfloat16(array) for array in random_arrays(tokens, in_features, out_features, rank))
        exact = reference_delta(from_bfloat16(x), from_bfloat16(a), from_bfloat16(b), 0.25)
        y = from_bfloat16(delta_of(x, a, b, 0.25, scratch))
        assert relative_rms(y, exact) < (3e-3 if rank > 1 else 4e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("tokens", [1, 2, 4, 5])
def test_float32_rows_keep_float32_accuracy_with_16_bit_weights(tokens: int, dtype: str, scratch: Scratch) -> None:
    for rank in (1, 7, 16, 33):
        x, a, b = random_arrays(tokens, 1100, 300, rank)
        if dtype == "bfloat16":
            y = delta_of(x, to_bfloat16(a), to_bfloat16(b), 0.25, scratch)
            a, b = from_bfloat16(to_bfloat16(a)), from_bfloat16(to_bfloat16(b))
        else:
            y = delta_of(x, a.astype(np.float16), b.astype(np.float16), 0.25, scratch)
            a, b = (array.astype(np.float16).astype(np.float32) for array in (a, b))
        assert relative_rms(y, reference_delta(x, a, b, 0.25)) < 1e-5


@pytest.mark.parametrize("rank", [1, 5, 31, 64])
@pytest.mark.parametrize("tokens", [1, 2, 3, 9, 20])
def test_nothing_outside_bfloat16_operands_is_used(tokens: int, rank: int, scratch: Scratch) -> None:
    """NaN stands before and behind rows, A and B: the element behind an odd row must not count."""
    in_features, out_features = 33, 21
    x, a, b = (to_bfloat16(array) for array in random_arrays(tokens, in_features, out_features, rank))
    memory = np.full(1 << 15, 0x7FC0, np.uint16)
    offsets, at = [], 11
    for array in (x, a, b):
        memory[at : at + array.size] = array.reshape(-1)
        offsets.append(2 * at)
        at += array.size + 13
    y_at = 1 << 14
    lora_delta(
        memory.view(np.float32), memory, 1, offsets[0], 2 * y_at, out_features, tokens, in_features, out_features, 1,
        rank, offsets[1], offsets[2], 1.0, scratch,
    )  # fmt: skip
    y = from_bfloat16(memory[y_at : y_at + tokens * out_features]).reshape(tokens, out_features)
    exact = reference_delta(from_bfloat16(x), from_bfloat16(a), from_bfloat16(b), 1.0)
    assert relative_rms(y, exact) < 1e-2


_WITHOUT_PAIRS = """
import sys, numpy as np
from segue.cpu_lora.kernels import delta_of
from segue.cpu_lora.vectors import HAS_BFLOAT16_PRODUCTS
assert not HAS_BFLOAT16_PRODUCTS
arrays = np.load(sys.argv[1])
np.save(sys.argv[2], delta_of(arrays["x"], arrays["a"], arrays["b"], 0.5))
"""


@pytest.mark.slow
def test_a_cpu_without_bfloat16_products_computes_the_same(tmp_path: Path, scratch: Scratch) -> None:
    """numba is told of a CPU without them, and keeps what it compiles apart from this machine's own code."""
    x, a, b = (to_bfloat16(array) for array in random_arrays(21, 129, 75, 13))
    np.savez(tmp_path / "arrays.npz", x=x, a=a, b=b)
    features = [f.replace("+avx512bf16", "-avx512bf16") for f in host_cpu_features().split(",")]
    environment = os.environ | {
        "NUMBA_CPU_FEATURES": ",".join(features),
        "NUMBA_CACHE_DIR": str(tmp_path / "cache"),
    }
    command = [sys.executable, "-c", _WITHOUT_PAIRS, str(tmp_path / "arrays.npz"), str(tmp_path / "y.npy")]
    subprocess.run(command, env=environment, check=True)
    y = from_bfloat16(np.load(tmp_path / "y.npy"))
    assert relative_rms(y, from_bfloat16(delta_of(x, a, b, 0.5, scratch))) < 1e-3

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from segue.engine.lora import file_runs
from segue.engine.lora.file_runs import Target

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIXTEEN_BITS = np.arange(1 << 16, dtype=np.uint16)
# Both signs of: zero, the smallest, the largest finite, infinity, NaN with the lowest and with all bits.
WORDS = np.array([0, 1, 0x7F7F_FFFF, 0x7F80_0000, 0x7F80_0001, 0x7FFF_FFFF], dtype=np.uint32)


def some_bits(dtype: torch.dtype) -> npt.NDArray[np.uint8]:
    if dtype is torch.float32:
        return np.concatenate([WORDS, WORDS | np.uint32(0x8000_0000)]).view(np.uint8)
    return SIXTEEN_BITS.view(np.uint8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_pattern_is_found_finite_exactly_when_torch_says_so(dtype: torch.dtype) -> None:
    octets = some_bits(dtype).copy()
    target, size = Target(octets, dtype), dtype.itemsize
    finite = torch.isfinite(torch.from_numpy(octets).view(dtype)).tolist()
    found = [target.not_finite(start, size) is None for start in range(0, len(octets), size)]
    assert found == finite
    assert True in finite
    assert False in finite


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 63, 129, 4099])
def test_one_value_that_is_not_finite_is_found_wherever_it_is(dtype: torch.dtype, count: int) -> None:
    start = 3
    for place in {0, count // 2, count - 1}:
        values = torch.ones(start + count + 6, dtype=dtype)
        values[[start - 1, start + count]] = torch.nan
        target = Target(values.view(torch.uint8).numpy(), dtype)
        begin, size = start * dtype.itemsize, count * dtype.itemsize
        assert target.not_finite(begin, size) is None
        values[start + place] = -torch.inf
        assert target.not_finite(begin, size) == begin + place * dtype.itemsize


@pytest.fixture
def descriptor(tmp_path: Path) -> int:
    values = torch.randn(5000).to(torch.bfloat16)
    (tmp_path / "file").write_bytes(values.view(torch.uint8).numpy().tobytes())
    return os.open(tmp_path / "file", os.O_RDONLY)


def runs_of(*runs: tuple[int, int, int]) -> npt.NDArray[np.int64]:
    return np.array(runs, dtype=np.int64).reshape(-1)


def test_runs_are_read_to_their_places_and_nowhere_else(descriptor: int) -> None:
    octets = np.full(20_000, 0xAB, dtype=np.uint8)
    runs = runs_of((100, 2000, 400), (6, 0, 2), (9000, 4000, 1000))
    assert Target(octets, torch.bfloat16).read(descriptor, runs, 64) == 1402
    wanted = np.full(20_000, 0xAB, dtype=np.uint8)
    content = np.frombuffer(os.pread(descriptor, 10_000, 0), dtype=np.uint8)
    wanted[2064:2464], wanted[64:66], wanted[4064:5064] = content[100:500], content[6:8], content[9000:]
    np.testing.assert_array_equal(octets, wanted)
    os.close(descriptor)


def test_reading_ends_with_what_is_complete_and_finite(descriptor: int) -> None:
    target = Target(np.zeros(20_000, dtype=np.uint8), torch.bfloat16)
    assert target.read(descriptor, runs_of((0, 0, 1000), (9900, 1000, 101)), 0) == 1000, "the file ends within the run"
    assert target.read(descriptor, runs_of((10_000, 0, 10)), 0) == 0
    assert target.read(descriptor, runs_of(), 0) == 0
    assert target.read(-1, runs_of((0, 0, 10)), 0) == 0, "the system refuses"
    os.close(descriptor)


def test_what_is_not_finite_ends_the_reading_unless_nobody_asks(tmp_path: Path) -> None:
    piece = file_runs.PIECE_BYTES
    values = torch.ones(2 * piece, dtype=torch.float16)
    values[piece // 2 + 7] = torch.inf
    (tmp_path / "file").write_bytes(values.numpy().tobytes())
    descriptor = os.open(tmp_path / "file", os.O_RDONLY)
    octets, runs = np.zeros(values.nbytes, dtype=np.uint8), runs_of((0, 0, values.nbytes))
    assert Target(octets, torch.float16).read(descriptor, runs, 0) == piece
    assert Target(octets, None).read(descriptor, runs, 0) == values.nbytes
    os.close(descriptor)

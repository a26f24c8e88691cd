from __future__ import annotations

import random

import pytest

from segue.engine.lora.host_memory import HostExtents


def test_extents_are_aligned_and_come_from_the_first_gap() -> None:
    extents = HostExtents(1000)
    assert extents.capacity_bytes == 960
    assert [extents.allocate(size) for size in (1, 64, 65)] == [0, 64, 128]
    assert extents.free_bytes == 960 - 256
    extents.free(64)
    assert extents.allocate(128) == 256
    assert extents.allocate(64) == 64
    extents.check()


def test_a_full_store_gives_nothing_and_keeps_what_it_has() -> None:
    extents = HostExtents(128)
    assert extents.allocate(129) is None
    assert extents.allocate(128) == 0
    assert extents.allocate(1) is None
    assert extents.free_bytes == 0
    extents.check()


def test_neighbouring_gaps_become_one() -> None:
    extents = HostExtents(64 * 4)
    for _ in range(4):
        extents.allocate(64)
    for offset in (64, 192, 0, 128):
        extents.free(offset)
        extents.check()
    assert extents.allocate(256) == 0


def test_mistakes_are_errors() -> None:
    extents = HostExtents(128)
    extents.allocate(64)
    extents.free(0)
    for offset in (0, 64, 1):
        with pytest.raises(ValueError, match="no extent"):
            extents.free(offset)
    with pytest.raises(ValueError, match="size_bytes"):
        extents.allocate(0)
    with pytest.raises(ValueError, match="capacity_bytes"):
        HostExtents(63)


def test_fits_without_sees_through_what_would_be_given_back() -> None:
    extents = HostExtents(64 * 5)
    for _ in range(5):
        extents.allocate(64)
    extents.free(128)
    assert not extents.fits_without(128, [])
    assert extents.fits_without(128, [64])
    assert not extents.fits_without(128, [0, 256])
    assert extents.fits_without(64 * 5, [0, 64, 192, 256])
    assert extents.fits_without(192, [64, 192, 192])


def test_random_use_never_overlaps_and_gives_everything_back() -> None:
    generator = random.Random(5)
    extents = HostExtents(64 * 200)
    held: list[int] = []
    for _ in range(2000):
        if held and generator.random() < 0.5:
            extents.free(held.pop(generator.randrange(len(held))))
        else:
            size = generator.randrange(1, 64 * 30)
            fitted = extents.fits_without(size, [])
            offset = extents.allocate(size)
            assert fitted == (offset is not None)
            if offset is not None:
                held.append(offset)
        extents.check()
        assert sorted(held) == sorted(extents.taken)
    for offset in held:
        extents.free(offset)
    extents.check()
    assert extents.allocate(64 * 200) == 0

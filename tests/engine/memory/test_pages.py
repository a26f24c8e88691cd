"""The page allocator, driven at random against a model of sets."""

from __future__ import annotations

import random

import pytest

from segue.engine.memory.pages import OutOfPagesError, PageAllocator


def test_random_use_never_hands_a_page_out_twice() -> None:
    draw = random.Random(0)
    allocator = PageAllocator(37)
    held: list[tuple[int, ...]] = []
    for _ in range(2000):
        if held and draw.random() < 0.5:
            allocator.free(held.pop(draw.randrange(len(held))))
        else:
            count = draw.randrange(9)
            if count > allocator.free_pages:
                with pytest.raises(OutOfPagesError):
                    allocator.allocate(count)
            else:
                held.append(allocator.allocate(count))
        taken = [page for pages in held for page in pages]
        assert len(set(taken)) == len(taken)
        assert set(taken) <= set(range(37))
        assert allocator.free_pages == 37 - len(taken)
        allocator.check()


def test_allocation_is_all_or_nothing() -> None:
    allocator = PageAllocator(4)
    allocator.allocate(1)
    with pytest.raises(OutOfPagesError, match="4 pages asked for, 3 of 4 are free"):
        allocator.allocate(4)
    assert len(allocator.allocate(3)) == 3
    allocator.check()


@pytest.mark.parametrize(
    ("pages", "problem"), [((0,), "named twice"), ((1,), "free already"), ((4,), "does not exist"), ((-1,), "exist")]
)
def test_wrong_free_is_refused_and_changes_nothing(pages: tuple[int, ...], problem: str) -> None:
    allocator = PageAllocator(4)
    assert allocator.allocate(1) == (0,)
    with pytest.raises(ValueError, match=problem):
        allocator.free((0, *pages))
    assert allocator.free_pages == 3
    allocator.check()


@pytest.mark.parametrize("page", [-1, 4])
def test_an_unknown_page_is_neither_free_nor_taken(page: int) -> None:
    with pytest.raises(IndexError, match=f"page {page} does not exist"):
        PageAllocator(4).is_free(page)


def test_check_sees_a_page_that_is_both_free_and_taken() -> None:
    allocator = PageAllocator(2)
    (page,) = allocator.allocate(1)
    allocator._free.append(page)
    with pytest.raises(AssertionError):
        allocator.check()

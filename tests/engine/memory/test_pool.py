"""The page pool: its views, owners and poison."""

from __future__ import annotations

import pytest
import torch

from segue.engine.memory.pages import OutOfPagesError
from segue.engine.memory.pool import PagePool


def make_pool(*, poison_freed: bool = True) -> PagePool:
    return PagePool(
        layers=2, pages=5, page_tokens=4, kv_heads=3, head_dim=8, dtype=torch.float32, poison_freed=poison_freed
    )


def test_kv_and_layer_are_views_of_the_same_page() -> None:
    pool = make_pool()
    assert pool.page_elems == 2 * 4 * 3 * 8
    pool.kv(1)[2, 1, 3, 2, 7] = 42.0
    assert pool.layer(1)[2, -1] == 42.0
    assert pool.data[1, 2, -1] == 42.0
    assert pool.layer(0)[2].isnan().all()


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (4, 1), (5, 2)])
def test_token_pages_rounds_up(tokens: int, pages: int) -> None:
    assert make_pool().token_pages(tokens) == pages


def test_freed_pages_are_poisoned_in_every_layer_and_others_are_not() -> None:
    pool = make_pool()
    pool.data.zero_()
    kept, freed = pool.allocate(1, "kept"), pool.allocate(2, "freed")
    pool.free(freed)
    assert pool.data[:, list(freed)].isnan().all()
    assert (pool.data[:, list(kept)] == 0).all()
    pool.check()


def test_pages_keep_their_values_without_poison() -> None:
    pool = make_pool(poison_freed=False)
    pool.data.fill_(3.0)
    pool.free(pool.allocate(2, "a"))
    assert (pool.data == 3.0).all()


def test_owners_follow_their_pages() -> None:
    pool = make_pool()
    first, second = pool.allocate(2, "first"), pool.allocate(1, "second")
    assert pool.owned() == {first[0]: "first", first[1]: "first", second[0]: "second"}
    with pytest.raises(OutOfPagesError):
        pool.allocate(3, "third")
    pool.free(first)
    assert pool.owned() == {second[0]: "second"}
    with pytest.raises(ValueError, match="free already"):
        pool.free(first)
    pool.check()


def test_check_sees_a_taken_page_without_owner() -> None:
    pool = make_pool()
    (page,) = pool.allocate(1, "a")
    del pool._owners[page]
    with pytest.raises(AssertionError, match=f"page {page}"):
        pool.check()

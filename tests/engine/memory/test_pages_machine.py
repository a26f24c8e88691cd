"""The page allocator and the page pool against models of sets, in every order of right and wrong calls."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, precondition, rule

from segue.engine.memory.pages import OutOfPagesError, PageAllocator
from segue.engine.memory.pool import PagePool

PAGES = 9
LAYERS = 2
OWNERS = ("kv", "adapter 1", "adapter 2")


class AllocatorMachine(RuleBasedStateMachine):
    """``taken`` is the model: the pages handed out and not given back."""

    grants = Bundle("grants")

    def __init__(self) -> None:
        super().__init__()
        self.allocator = PageAllocator(PAGES)
        self.taken: set[int] = set()

    @rule(target=grants, count=st.integers(0, PAGES + 2))
    def allocate(self, count: int) -> object:
        if count > PAGES - len(self.taken):
            with pytest.raises(OutOfPagesError):
                self.allocator.allocate(count)
            return multiple()
        pages = self.allocator.allocate(count)
        assert len(set(pages)) == len(pages) == count
        assert self.taken.isdisjoint(pages), "a page is handed out twice"
        assert set(pages) <= set(range(PAGES))
        self.taken.update(pages)
        return pages

    @rule(count=st.integers(max_value=-1))
    def allocate_less_than_nothing(self, count: int) -> None:
        with pytest.raises(ValueError, match="must not be negative"):
            self.allocator.allocate(count)

    @rule(pages=consumes(grants))
    def free(self, pages: tuple[int, ...]) -> None:
        self.allocator.free(pages)
        self.taken.difference_update(pages)

    @rule(target=grants, pages=consumes(grants), cut=st.integers(0, PAGES))
    def free_a_part(self, pages: tuple[int, ...], cut: int) -> tuple[int, ...]:
        self.allocator.free(iter(pages[:cut]))
        self.taken.difference_update(pages[:cut])
        return pages[cut:]

    @rule(pages=st.lists(st.integers(-2, PAGES + 1), max_size=4))
    def free_what_may_be_wrong(self, pages: list[int]) -> None:
        """Anything but distinct taken pages is refused, and what is right in it stays taken."""
        if len(set(pages)) == len(pages) and self.taken.issuperset(pages):
            return
        with pytest.raises(ValueError, match=r"is free already|does not exist|is named twice"):
            self.allocator.free(pages)

    @invariant()
    def agrees_with_the_model(self) -> None:
        self.allocator.check()
        assert self.allocator.free_pages + len(self.taken) == PAGES
        assert {page for page in range(PAGES) if not self.allocator.is_free(page)} == self.taken


class PoolMachine(RuleBasedStateMachine):
    """``owners`` and ``values`` are the model: who has each taken page, and what was written to it."""

    grants = Bundle("grants")

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(
            layers=LAYERS,
            pages=PAGES,
            page_tokens=2,
            kv_heads=1,
            head_dim=2,
            dtype=torch.float32,
            poison_freed=True,
        )
        self.owners: dict[int, str] = {}
        self.values: dict[int, float] = {}
        self.writes = 0

    @rule(target=grants, count=st.integers(0, PAGES + 1), owner=st.sampled_from(OWNERS))
    def allocate(self, count: int, owner: str) -> object:
        if count > PAGES - len(self.owners):
            with pytest.raises(OutOfPagesError):
                self.pool.allocate(count, owner)
            return multiple()
        pages = self.pool.allocate(count, owner)
        assert len(set(pages)) == count
        assert self.owners.keys().isdisjoint(pages), "a page is handed out twice"
        assert all(self.pool.data[:, page].isnan().all() for page in pages), "a fresh page is not poisoned"
        self.owners.update(dict.fromkeys(pages, owner))
        return pages

    @rule(pages=grants)
    def write(self, pages: tuple[int, ...]) -> None:
        for page in set(pages) & self.owners.keys():
            self.writes += 1
            self.pool.data[:, page] = self.writes
            self.values[page] = self.writes

    @rule(pages=consumes(grants))
    def free(self, pages: tuple[int, ...]) -> None:
        self.pool.free(iter(pages))
        for page in pages:
            del self.owners[page]
            self.values.pop(page, None)

    @precondition(lambda self: self.owners)
    @rule(pages=grants, wrong=st.integers(-1, PAGES))
    def free_with_a_wrong_page(self, pages: tuple[int, ...], wrong: int) -> None:
        """A page that is unknown, free or named twice spoils the whole call: owners and contents stay."""
        if wrong in self.owners and wrong not in pages:
            return
        with pytest.raises(ValueError, match=r"is free already|does not exist|is named twice"):
            self.pool.free((*pages, wrong))

    @invariant()
    def agrees_with_the_model(self) -> None:
        self.pool.check()
        assert self.pool.free_pages + len(self.owners) == PAGES
        assert self.pool.owned() == self.owners
        for page in range(PAGES):
            content = self.pool.data[:, page]
            if page in self.values:
                assert (content == self.values[page]).all(), f"page {page} has lost what was written to it"
            else:
                assert content.isnan().all(), f"page {page} is not poisoned"


AllocatorMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestAllocator = AllocatorMachine.TestCase
TestPool = PoolMachine.TestCase

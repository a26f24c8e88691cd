"""The prefix cache against a model: a set of prefixes, who holds them, and the order in which they became idle."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from segue.engine.memory.prefix_cache import CachedPage, PrefixCache

PAGE_TOKENS = 2
VERSIONS = (None, 1, 2)
# Few tokens, so that prefixes meet.
TOKENS = st.lists(st.integers(0, 1), max_size=5 * PAGE_TOKENS)

Prefix = tuple[int | None, tuple[int, ...]]


class Cache(RuleBasedStateMachine):
    """Holders take what matches and insert the rest, as requests do."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = PrefixCache(PAGE_TOKENS)
        self.now = 0.0
        self.next_page = 0
        self.pages: dict[Prefix, int] = {}
        self.holders: list[tuple[int | None, list[CachedPage], list[Prefix]]] = []
        self.idle: list[Prefix] = []

    @rule(version_id=st.sampled_from(VERSIONS), tokens=TOKENS, computed=st.integers(0, 5))
    def hold(self, version_id: int | None, tokens: list[int], computed: int) -> None:
        """A request matches, and computes up to ``computed`` pages more."""
        prefixes = [
            (version_id, tuple(tokens[: stop * PAGE_TOKENS])) for stop in range(1, len(tokens) // PAGE_TOKENS + 1)
        ]
        path = self.cache.match(version_id, tokens, len(prefixes))
        known = list(itertools.takewhile(self.pages.__contains__, prefixes))
        assert [node.page for node in path] == [self.pages[prefix] for prefix in known]
        self.cache.acquire(path, self.now)
        for index in range(len(path), min(len(prefixes), len(path) + computed)):
            parent = path[-1] if path else None
            node = self.cache.insert(version_id, parent, self.cache.page_key(tokens, index), self.next_page, self.now)
            assert node.page == self.next_page
            self.pages[prefixes[index]] = self.next_page
            self.next_page += 1
            path.append(node)
        held = prefixes[: len(path)]
        self.idle = [prefix for prefix in self.idle if prefix not in held]
        self.holders.append((version_id, path, held))
        self.now += 1.0

    @precondition(lambda self: self.holders)
    @rule(place=st.integers(0, 100))
    def insert_what_is_there(self, place: int) -> None:
        """Two requests computed the same page: the second keeps its own page, which is needless."""
        version_id, path, _ = self.holders[place % len(self.holders)]
        if path:
            parent = path[-2] if len(path) > 1 else None
            node = self.cache.insert(version_id, parent, path[-1].tokens, 10_000_000, self.now)
            assert node is path[-1]
            node.users -= 1

    @precondition(lambda self: self.holders)
    @rule(place=st.integers(0, 100))
    def release(self, place: int) -> None:
        _, path, held = self.holders.pop(place % len(self.holders))
        self.cache.release(path, self.now)
        in_use = {prefix for _, _, others in self.holders for prefix in others}
        self.idle += [prefix for prefix in reversed(held) if prefix not in in_use]
        self.now += 1.0

    @rule(count=st.integers(0, 4))
    def reclaim(self, count: int) -> None:
        if count > len(self.idle):
            with pytest.raises(ValueError, match="idle"):
                self.cache.reclaim(count)
            return
        gone, self.idle = self.idle[:count], self.idle[count:]
        assert self.cache.reclaim(count) == [self.pages.pop(prefix) for prefix in gone]

    @rule(version_id=st.sampled_from((1, 2)))
    def drop_version(self, version_id: int) -> None:
        if any(holder == version_id and path for holder, path, _ in self.holders):
            with pytest.raises(ValueError, match="held"):
                self.cache.drop_version(version_id)
            return
        gone = {prefix: page for prefix, page in self.pages.items() if prefix[0] == version_id}
        assert sorted(self.cache.drop_version(version_id)) == sorted(gone.values())
        self.pages = {prefix: page for prefix, page in self.pages.items() if prefix not in gone}
        self.idle = [prefix for prefix in self.idle if prefix not in gone]

    @invariant()
    def is_as_the_model_says(self) -> None:
        self.cache.check()
        assert self.cache.pages == len(self.pages)
        assert [node.page for node in self.cache.idle()] == [self.pages[prefix] for prefix in self.idle]


TestCache = Cache.TestCase
TestCache.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def test_a_page_that_is_not_full_is_refused() -> None:
    with pytest.raises(ValueError, match="not full"):
        PrefixCache(4).insert(None, None, (1, 2, 3), 0, 0.0)


def test_releasing_twice_is_refused() -> None:
    cache = PrefixCache(1)
    node = cache.insert(None, None, (1,), 0, 0.0)
    cache.release([node], 0.0)
    with pytest.raises(ValueError, match="nobody"):
        cache.release([node], 0.0)


def test_uses_count_and_decay() -> None:
    cache = PrefixCache(1)
    node = cache.insert(None, None, (1,), 0, 0.0)
    cache.acquire([node], 0.0)
    assert node.recent_uses == pytest.approx(2.0)
    cache.acquire([node], 60.0)
    assert node.recent_uses == pytest.approx(2.0)

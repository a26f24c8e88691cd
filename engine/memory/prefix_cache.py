"""Pages of KV by the tokens that they hold: which prefix of a prompt need not be computed again. Pure integers.

A tree for each adapter version: a node is one full page, the path to it the tokens before it. After vLLM's prefix cache
(Kwon et al., 2023, arXiv:2309.06180) with an exact tree, as in SGLang's RadixAttention (Zheng et al., 2023,
arXiv:2312.07104), in place of hashes: two prefixes never meet by chance, and versions share nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from segue.scheduler.eviction import decayed


@dataclass(slots=True, kw_only=True, eq=False)
class CachedPage:
    """A page with the KV of ``tokens``, which follow those of ``parent``'s path.

    ``users`` counts the requests that hold it. ``recent_uses`` decays from ``last_used_seconds`` on.
    """

    page: int
    version_id: int | None
    tokens: tuple[int, ...]
    parent: CachedPage | None
    users: int = 0
    recent_uses: float = 0.0
    last_used_seconds: float = 0.0
    children: dict[tuple[int, ...], CachedPage] = field(default_factory=dict)


class PrefixCache:
    """The tree and who uses it. Pages come from its callers and go back to them; it owns them in between.

    A request always holds a whole path from the root. So a page becomes idle no earlier than those below it, and the
    order in which pages became idle is one in which they can be given up: none has a child when its turn comes.
    """

    def __init__(self, page_tokens: int) -> None:
        self.page_tokens = page_tokens
        self._roots: dict[int | None, dict[tuple[int, ...], CachedPage]] = {}
        self._idle: OrderedDict[CachedPage, None] = OrderedDict()
        self._pages = 0

    @property
    def pages(self) -> int:
        """All pages that the cache owns."""
        return self._pages

    @property
    def idle_pages(self) -> int:
        """Pages that no request holds."""
        return len(self._idle)

    def match(self, version_id: int | None, token_ids: Sequence[int], max_pages: int) -> list[CachedPage]:
        """The path of up to ``max_pages`` pages that hold the first of these tokens."""
        path: list[CachedPage] = []
        children = self._roots.get(version_id, {})
        for index in range(min(max_pages, len(token_ids) // self.page_tokens)):
            found = children.get(self.page_key(token_ids, index))
            if found is None:
                break
            path.append(found)
            children = found.children
        return path

    def page_key(self, token_ids: Sequence[int], index: int) -> tuple[int, ...]:
        """The tokens of page ``index``."""
        return tuple(token_ids[index * self.page_tokens : (index + 1) * self.page_tokens])

    def acquire(self, path: Sequence[CachedPage], now: float) -> None:
        """A request holds these pages, from the root on."""
        for node in path:
            if node.users == 0:
                del self._idle[node]
            node.users += 1
            node.recent_uses = decayed(node.recent_uses, now - node.last_used_seconds) + 1.0
            node.last_used_seconds = now

    def release(self, path: Sequence[CachedPage], now: float) -> None:
        """A request lets go of its path. Raises ValueError for a page that is held by nobody."""
        for node in reversed(path):
            if node.users == 0:
                raise ValueError(f"page {node.page} is held by nobody")
            node.users -= 1
            node.recent_uses = decayed(node.recent_uses, now - node.last_used_seconds)
            node.last_used_seconds = now
            if node.users == 0:
                self._idle[node] = None

    def insert(
        self, version_id: int | None, parent: CachedPage | None, tokens: tuple[int, ...], page: int, now: float
    ) -> CachedPage:
        """The node for ``tokens`` after ``parent``'s path, held by the caller, who must hold ``parent``.

        The cache owns ``page`` from now on if the node is new; else ``page`` is still the caller's, and needless.
        Raises ValueError for a page that is not full.
        """
        if len(tokens) != self.page_tokens:
            raise ValueError(f"a page of {len(tokens)} tokens is not full")
        siblings = self._roots.setdefault(version_id, {}) if parent is None else parent.children
        node = siblings.get(tokens)
        if node is None:
            node = siblings[tokens] = CachedPage(page=page, version_id=version_id, tokens=tokens, parent=parent)
            self._pages += 1
            self._idle[node] = None
        self.acquire([node], now)
        return node

    def idle(self) -> Iterator[CachedPage]:
        """Idle pages in the order in which ``reclaim`` gives them up: idle the longest first."""
        return iter(self._idle)

    def reclaim(self, count: int) -> list[int]:
        """Give up the ``count`` pages that have been idle the longest. Raises ValueError if fewer are idle."""
        if count > len(self._idle):
            raise ValueError(f"{count} pages to give up, {len(self._idle)} are idle")
        return [self._forget_oldest() for _ in range(count)]

    def drop_version(self, version_id: int) -> list[int]:
        """Forget a version that no request uses; its pages. Raises ValueError while one of them is held."""
        nodes = list(_walk(self._roots.get(version_id, {})))
        held = [node.page for node in nodes if node.users]
        if held:
            raise ValueError(f"pages {held} of version {version_id} are held")
        for node in nodes:
            del self._idle[node]
        self._roots.pop(version_id, None)
        self._pages -= len(nodes)
        return [node.page for node in nodes]

    def check(self) -> None:
        """Raise AssertionError unless tree, users and order agree."""
        nodes: list[CachedPage] = []
        for version_id, top in self._roots.items():
            assert top, f"version {version_id} has an empty tree"
            for node in _walk(top):
                assert node.version_id == version_id, f"page {node.page} is in the tree of version {version_id}"
                nodes.append(node)
        assert len(nodes) == self._pages, f"{len(nodes)} pages in the trees, {self._pages} counted"
        assert len({node.page for node in nodes}) == len(nodes), "a page is in the tree twice"
        for node in nodes:
            assert len(node.tokens) == self.page_tokens, f"page {node.page} is not full"
            below = max((child.users for child in node.children.values()), default=0)
            assert node.users >= below, f"page {node.page} has fewer users than a page below it"
            assert (node in self._idle) == (node.users == 0), f"page {node.page}: {node.users} users"
        place = {node: index for index, node in enumerate(self._idle)}
        assert set(place) <= set(nodes), "an idle page is in no tree"
        for node, index in place.items():
            assert node.parent is None or place.get(node.parent, len(place)) > index, f"page {node.page} goes too late"

    def _forget_oldest(self) -> int:
        node, _ = self._idle.popitem(last=False)
        return self._remove(node)

    def _remove(self, node: CachedPage) -> int:
        siblings = self._roots[node.version_id] if node.parent is None else node.parent.children
        del siblings[node.tokens]
        if node.parent is None and not siblings:
            del self._roots[node.version_id]
        self._pages -= 1
        return node.page


def _walk(top: dict[tuple[int, ...], CachedPage]) -> Iterator[CachedPage]:
    pending = list(top.values())
    while pending:
        node = pending.pop()
        yield node
        pending.extend(node.children.values())

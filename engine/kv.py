"""The pages of each request's KV: a prefix that it shares with others, and pages of its own behind it."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import islice

from segue.engine.memory.pool import PagePool
from segue.engine.memory.prefix_cache import CachedPage, PrefixCache
from segue.engine.rate import RateMeter
from segue.engine.request import Request
from segue.engine.requests import RequestTable
from segue.scheduler.eviction import EvictionCandidate
from segue.scheduler.plan import PrefixMatch

_CACHE = "prefix cache"


class KvPages:
    """Gives requests their pages. Satisfies segue.scheduler.plan.PrefixPages.

    Full pages enter the prefix cache as soon as the pass that filled them is committed, which is after the adapter's
    weights were verified. A request that waits has a claim on every full page of its tokens that is not in the cache,
    so that others with the same prefix can see that it will be computed. Without ``prefix_cache`` nothing is shared.
    """

    def __init__(
        self,
        pool: PagePool,
        requests: RequestTable,
        *,
        prefill_rate: RateMeter,
        clock: Callable[[], float],
        prefix_cache: bool,
    ) -> None:
        """``prefill_rate``, in tokens per second, tells what a page is worth."""
        self._pool = pool
        self._requests = requests
        self._prefill_rate = prefill_rate
        self._clock = clock
        self._shares = prefix_cache
        self._cache = PrefixCache(pool.page_tokens)
        # Request numbers, ascending, by the hash of a prefix. A collision makes a request wait in vain, no more.
        self._claims: dict[int, list[int]] = {}

    # -- what the scheduler sees -------------------------------------------------------------------------------------

    @property
    def idle_pages(self) -> int:
        """Cached pages that no request uses."""
        return self._cache.idle_pages

    def idle_candidates(self, count: int) -> Sequence[EvictionCandidate]:
        """The first ``count`` idle pages in the order in which they are given up."""
        now = self._clock()
        seconds = self._prefill_rate.seconds_for(self._pool.page_tokens)
        return [
            EvictionCandidate(
                version_id=-1 - index,
                pages=1,
                bring_back_seconds=seconds,
                recent_uses=node.recent_uses,
                idle_seconds=now - node.last_used_seconds,
            )
            for index, node in enumerate(islice(self._cache.idle(), count))
        ]

    def match(self, number: int) -> PrefixMatch:
        """What is there of a queued request's prefix, or will be. At least one token is left to compute."""
        request = self._requests.get(number)
        if request is None:
            raise KeyError(f"request {number} has ended")
        path = self._cache.match(request.version_id, request.token_ids, self._sharable_pages(request))
        pending = 0
        for key in request.page_keys[len(path) :]:
            if self._claims[key][0] == number:
                break
            pending += 1
        idle = frozenset(node.page for node in path if node.users == 0)
        return PrefixMatch(pages=len(path), idle=idle, pending_pages=pending)

    # -- carrying plans out ------------------------------------------------------------------------------------------

    @property
    def cached_pages(self) -> int:
        """All pages that the prefix cache owns."""
        return self._cache.pages

    def announce(self, request: Request) -> None:
        """A request waits in the queue: its tokens will be computed."""
        if not self._shares:
            return
        request.page_keys = self._prefix_hashes(request)
        for key in request.page_keys:
            bisect.insort(self._claims.setdefault(key, []), request.number)

    def hold(self, request: Request, cached_pages: int) -> None:
        """Begin an admission: keep the first pages of the request's prefix from being given up."""
        path = self._cache.match(request.version_id, request.token_ids, cached_pages)
        if len(path) != cached_pages:
            raise ValueError(f"request {request.number} was to share {cached_pages} pages, there are {len(path)}")
        self._cache.acquire(path, self._clock())
        request.path = path
        request.pages = [node.page for node in path]
        request.computed_tokens = cached_pages * self._pool.page_tokens
        self._withdraw(request, cached_pages)

    def allocate(self, request: Request, pages: int) -> None:
        """Give the request more pages of its own."""
        request.pages.extend(self._pool.allocate(pages, f"request {request.number}"))

    def commit(self, request: Request) -> None:
        """The KV of ``request.computed_tokens`` is right: share the pages that are full now."""
        if not self._shares:
            return
        now = self._clock()
        for index in range(len(request.path), request.computed_tokens // self._pool.page_tokens):
            parent = request.path[-1] if request.path else None
            page = request.pages[index]
            node = self._cache.insert(
                request.version_id, parent, self._cache.page_key(request.token_ids, index), page, now
            )
            if node.page == page:
                self._pool.hand_over(page, _CACHE)
            else:
                self._pool.free((page,))
                request.pages[index] = node.page
            request.path.append(node)
        self._withdraw(request, len(request.path))

    def release(self, request: Request) -> None:
        """Take all pages of a request that ends or is preempted; nothing in flight may refer to them."""
        self._withdraw(request, len(request.page_keys))
        self._pool.free(request.own_pages)
        self._cache.release(request.path, self._clock())
        request.path = []
        request.pages = []
        request.computed_tokens = 0
        request.page_keys = []
        request.claimed_from = 0

    def reclaim(self, count: int) -> None:
        """Give up idle pages, those that have been idle the longest."""
        self._pool.free(self._cache.reclaim(count))

    def drop_version(self, version_id: int) -> None:
        """Forget all KV of an adapter version that no request uses."""
        self._pool.free(self._cache.drop_version(version_id))

    def sole_pages(self, request: Request) -> int:
        """How many of the request's shared pages no other request uses."""
        return sum(node.users == 1 for node in request.path)

    def check(self, requests: Iterable[Request]) -> None:
        """Raise AssertionError unless pages, the cache's users and claims agree with the requests."""
        self._cache.check()
        users: Counter[CachedPage] = Counter()
        owners: dict[int, int] = {}
        claims: dict[int, list[int]] = {}
        for request in requests:
            assert request.pages[: len(request.path)] == [node.page for node in request.path], f"{request.number}: path"
            for page in request.own_pages:
                assert page not in owners, f"page {page} belongs to requests {owners[page]} and {request.number}"
                owners[page] = request.number
            users.update(request.path)
            for key in request.page_keys[request.claimed_from :]:
                claims.setdefault(key, []).append(request.number)
        for node, count in users.items():
            assert node.users == count, f"page {node.page}: {count} users, {node.users} are counted"
        in_use = self._cache.pages - self._cache.idle_pages
        assert len(users) == in_use, f"{len(users)} shared pages are in use, {in_use} are counted"
        assert {key: sorted(numbers) for key, numbers in claims.items()} == self._claims, "claims"

    def _sharable_pages(self, request: Request) -> int:
        return (len(request.token_ids) - 1) // self._pool.page_tokens if self._shares else 0

    def _prefix_hashes(self, request: Request) -> list[int]:
        key = hash(request.version_id)
        keys = []
        for index in range(self._sharable_pages(request)):
            key = hash((key, self._cache.page_key(request.token_ids, index)))
            keys.append(key)
        return keys

    def _withdraw(self, request: Request, stop: int) -> None:
        """Drop the request's claims on its first ``stop`` pages."""
        for key in request.page_keys[request.claimed_from : stop]:
            numbers = self._claims[key]
            numbers.remove(request.number)
            if not numbers:
                del self._claims[key]
        request.claimed_from = min(stop, len(request.page_keys))

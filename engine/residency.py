"""The scheduler's view of the adapters, and the pages that its decisions give them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from segue.engine.lora.store import AdapterStore
from segue.engine.memory.pool import PagePool
from segue.engine.request import RequestState
from segue.engine.requests import RequestTable
from segue.scheduler.eviction import EvictionCandidate
from segue.types import Tier


class Residency:
    """Satisfies segue.scheduler.plan.AdapterResidency. Versions in ``pinned`` are never to be evicted."""

    def __init__(self, store: AdapterStore, pool: PagePool, requests: RequestTable) -> None:
        self._store = store
        self._pool = pool
        self._requests = requests
        self.pinned: set[int] = set()

    @property
    def free_pages(self) -> int:
        """Pages that hold nothing."""
        return self._pool.free_pages

    def pages_to_reserve(self, version_id: int) -> int:
        """Pages that the adapter still needs."""
        return 0 if self._store.has_pages(version_id) else self._store.device_pages(version_id)

    def is_warm(self, version_id: int) -> bool:
        """Whether all layers are on the device and the read that brought them was verified."""
        return self._store.is_landed(version_id) and self._store.is_verified(version_id)

    def is_in_host(self, version_id: int) -> bool:
        """Whether nothing is left to read from disk, and what was read was verified."""
        return self._store.tier(version_id) is not Tier.DISK and self._store.is_verified(version_id)

    def keep_in_host(self) -> None:
        """Have adapters without pages that admitted requests use read again, where others needed their host bytes."""
        for request in self._requests.admitted:
            version_id = request.version_id
            if version_id is None or request.state is not RequestState.ADMITTED or self._store.has_pages(version_id):
                continue
            self._store.start_load(version_id)

    def evictable(self) -> Sequence[EvictionCandidate]:
        """Adapters whose pages can be had at once. A request that only waits does not keep its adapter's pages."""
        keep = self._requests.versions_in_use() | self.pinned
        return [
            replace(candidate, users=0) for candidate in self._store.evictable() if candidate.version_id not in keep
        ]

    def tier(self, version_id: int) -> Tier:
        """Where the adapter's weights are now."""
        return self._store.tier(version_id)

    def start_copy(self, version_id: int, pages: int) -> None:
        """Give the adapter its pages and begin to fill them; the store owns the pages from now on."""
        self._store.start_copy(version_id, self._pool.allocate(pages, f"adapter {version_id}"))

"""The adapter versions of an engine: which are known, pinned or leaving, and which have failed and why."""

from __future__ import annotations

from collections.abc import Callable

from segue.engine.lora.manifest import AdapterManifest
from segue.engine.lora.store import AdapterStore
from segue.engine.messages import VersionState
from segue.engine.requests import RequestTable
from segue.engine.residency import Residency
from segue.errors import AdapterNotFoundError, AdapterRejectedError, SegueError
from segue.scheduler.placement import AdapterCost

# A prompt's page and the page that admission keeps for its first token.
SMALLEST_REQUEST_PAGES = 2


class AdapterVersions:
    """``item_bytes`` are those of a weight on the device. ``forget_kv`` is called with a version that nothing will use
    again."""

    def __init__(
        self,
        store: AdapterStore,
        residency: Residency,
        requests: RequestTable,
        *,
        pool_pages: int,
        item_bytes: int,
        forget_kv: Callable[[int], None],
    ) -> None:
        self._store = store
        self._residency = residency
        self._requests = requests
        self._pool_pages = pool_pages
        self._item_bytes = item_bytes
        self._costs: dict[int, AdapterCost] = {}
        self._forget_kv = forget_kv
        self._known: dict[int, AdapterManifest] = {}
        self._failures: dict[int, SegueError] = {}
        self._evicting: set[int] = set()
        self._leaving: set[int] = set()

    @property
    def pinned_pages(self) -> int:
        """Pages of the pool that pinned adapters have, or are to have, for good."""
        return sum(self._store.device_pages(version_id) for version_id in self._residency.pinned)

    def refusal(self, version_id: int) -> SegueError | None:
        """Why a request cannot use the version; None if it can."""
        if version_id in self._failures:
            return self._failures[version_id]
        if version_id not in self._known:
            return AdapterNotFoundError("this adapter version is no longer known")
        return None

    def cost(self, version_id: int | None) -> AdapterCost | None:
        """What a known version's adapter costs; None for the base model."""
        return None if version_id is None else self._costs[version_id]

    def pages_needed(self, version_id: int | None, kv_pages: int) -> int:
        """Pages that must be there beside the pinned ones for a request with this adapter and so much KV."""
        if version_id is None or version_id in self._residency.pinned:
            return kv_pages
        return kv_pages + self._store.device_pages(version_id)

    def open(self, manifest: AdapterManifest, descriptor: int, *, pinned: bool, largest_need_pages: int) -> None:
        """Know a version by its open weights file, which the store owns from now on.

        A pinned one is brought to the device at once; what it takes must leave ``largest_need_pages`` for others.
        Raises AdapterRejectedError for a version that could never be served.
        """
        version_id = manifest.version_id
        self._store.register(manifest, descriptor)
        pages = self._store.device_pages(version_id)
        if pinned:
            self._residency.pinned -= {other for other, held in self._known.items() if held.name == manifest.name}
        room = self._pool_pages - self.pinned_pages
        needed = pages + max(SMALLEST_REQUEST_PAGES, largest_need_pages if pinned else 0)
        if needed > room:
            self._store.close_version(version_id)
            raise AdapterRejectedError(
                f"the adapter takes {pages} pages and {needed - pages} must be left for requests; the pool has "
                f"{self._pool_pages}, of which {self._pool_pages - room} belong to pinned adapters"
            )
        self._known[version_id] = manifest
        elements = sum(module.a.elements + module.b.elements for layer in manifest.layers for module in layer)
        self._costs[version_id] = AdapterCost(version_id, manifest.max_rank, elements * self._item_bytes)
        if pinned:
            self._residency.pinned.add(version_id)
            self.preload(version_id)

    def close(self, version_id: int) -> None:
        """Forget a version when its last user ends."""
        self._failures.pop(version_id, None)
        self._drop(version_id)
        self._store.close_version(version_id)
        self._leaving.add(version_id)
        self.settle()

    def fail(self, version_id: int, error: SegueError) -> None:
        """The version cannot be served: requests for it are refused with ``error``."""
        self._failures[version_id] = error
        self._drop(version_id)
        self._leaving.add(version_id)

    def evict(self, version_id: int) -> None:
        """Drop a version's weights from device and host as soon as no admitted request uses them."""
        if version_id in self._known:
            self._evicting.add(version_id)
        self.settle()

    def preload(self, version_id: int) -> None:
        """Bring a version to the host, and to the device when there are free pages for it."""
        if version_id not in self._known:
            return
        self._store.start_load(version_id)
        pages = self._residency.pages_to_reserve(version_id)
        if 0 < pages <= self._residency.free_pages:
            self._residency.start_copy(version_id, pages)

    def settle(self) -> None:
        """Carry out what had to wait until requests ended."""
        for version_id in self._evicting - self._requests.versions_in_use():
            self._evicting.discard(version_id)
            self._store.evict_device(version_id)
            self._store.evict_host(version_id)
        for version_id in list(self._leaving):
            if self._store.users(version_id) == 0:
                self._leaving.discard(version_id)
                self._forget_kv(version_id)

    def states(self) -> list[VersionState]:
        """Where each known version is, and how many requests name it."""
        return [
            VersionState(version_id, self._store.tier(version_id), self._store.users(version_id))
            for version_id in sorted(self._known)
        ]

    def _drop(self, version_id: int) -> None:
        self._known.pop(version_id, None)
        self._costs.pop(version_id, None)
        self._evicting.discard(version_id)
        self._residency.pinned.discard(version_id)

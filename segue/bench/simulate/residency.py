"""What the scheduler sees of a simulated replica's memory: adapters by their pages, and no prefixes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from segue.bench.simulate.config import ReplicaConfig
from segue.scheduler.eviction import EvictionCandidate, decayed
from segue.scheduler.placement import AdapterCost
from segue.scheduler.plan import PrefixMatch

_NO_MATCH = PrefixMatch()


class NoPrefixes:
    """No request begins like another one."""

    @property
    def idle_pages(self) -> int:
        return 0

    def idle_candidates(self, _count: int) -> Sequence[EvictionCandidate]:
        return ()

    def match(self, _number: int) -> PrefixMatch:
        return _NO_MATCH


@dataclass(slots=True)
class _Resident:
    pages: int
    bring_back_seconds: float
    users: int = 0
    warm: bool = False
    uses: float = 0.0
    used_at: float = 0.0


class SimulatedResidency:
    """The adapters on one replica. All others are in host memory, from where a link copies one after the other."""

    def __init__(self, config: ReplicaConfig) -> None:
        self._config = config
        self._resident: dict[int, _Resident] = {}
        self._costs: dict[int, AdapterCost] = {}
        self._link_free_at = 0.0
        self.now = 0.0
        self.landing = 0
        """Copies under way."""
        self.idle_pages = 0
        """Pages of adapters that no admitted request uses."""

    def pages_to_reserve(self, version_id: int) -> int:
        return 0 if version_id in self._resident else self.pages_of(self._costs[version_id])

    def is_warm(self, version_id: int) -> bool:
        resident = self._resident.get(version_id)
        return resident is not None and resident.warm

    def evictable(self) -> Sequence[EvictionCandidate]:
        return [
            EvictionCandidate(
                version_id=version_id,
                pages=item.pages,
                bring_back_seconds=item.bring_back_seconds,
                recent_uses=item.uses,
                idle_seconds=self.now - item.used_at,
            )
            for version_id, item in self._resident.items()
            if item.users == 0 and item.warm
        ]

    def is_in_host(self, version_id: int) -> bool:
        """Every adapter is: disks are not simulated."""
        return version_id in self._costs

    def is_resident(self, version_id: int) -> bool:
        """Whether the adapter has its pages."""
        return version_id in self._resident

    def pages_of(self, adapter: AdapterCost) -> int:
        """Pages that the adapter takes."""
        return self._config.adapter_pages(adapter.weight_bytes)

    def announce(self, adapter: AdapterCost) -> None:
        """Make an adapter's cost known before a request for it is planned."""
        self._costs[adapter.version_id] = adapter

    def load(self, version_id: int) -> float:
        """Give the adapter its pages and book its copy. Returns the time at which it lands."""
        adapter = self._costs[version_id]
        copy_seconds = self._config.profile.copy_seconds(adapter.weight_bytes)
        self._link_free_at = max(self._link_free_at, self.now) + copy_seconds
        self._resident[version_id] = _Resident(self.pages_of(adapter), copy_seconds)
        self.idle_pages += self._resident[version_id].pages
        self.landing += 1
        return self._link_free_at

    def land(self, version_id: int) -> None:
        """All of the adapter is on the device."""
        self._resident[version_id].warm = True
        self.landing -= 1

    def evict(self, version_id: int) -> int:
        """Take the adapter's pages, so many."""
        item = self._resident.pop(version_id)
        self.idle_pages -= item.pages
        return item.pages

    def acquire(self, version_id: int) -> None:
        """A request that uses the adapter was admitted."""
        item = self._resident[version_id]
        if item.users == 0:
            self.idle_pages -= item.pages
        item.users += 1
        item.uses = decayed(item.uses, self.now - item.used_at) + 1
        item.used_at = self.now

    def release(self, version_id: int) -> None:
        """A request that uses the adapter gave its pages back."""
        item = self._resident[version_id]
        item.users -= 1
        if item.users == 0:
            self.idle_pages += item.pages

    def check(self, used_pages: int) -> None:
        """Raises AssertionError where counts disagree; ``used_pages`` are those of KV and free ones."""
        assert all(item.users >= 0 for item in self._resident.values())
        held = sum(item.pages for item in self._resident.values())
        assert self.idle_pages == sum(item.pages for item in self._resident.values() if item.users == 0)
        assert held + used_pages == self._config.pages, (held, used_pages)

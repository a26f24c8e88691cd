"""The load of a step as sums over requests, kept up to date instead of being added up for every decision."""

from __future__ import annotations

from segue.scheduler.cost_model import StepLoad
from segue.scheduler.placement import AdapterCost


def context_tokens(start: int, count: int) -> int:
    """Tokens of KV that the rows ``start`` to ``start + count`` of a request read: each those up to itself."""
    return count * start + count * (count + 1) // 2


class Tally:
    """A step's load, to which requests' rows are added and from which they are taken."""

    def __init__(self) -> None:
        self._tokens = 0
        self._context_tokens = 0
        self._rank_tokens = 0
        self._adapter_bytes = 0
        self._ranks: dict[int, int] = {}
        self._users: dict[int, int] = {}
        self._load: StepLoad | None = None

    def uses(self, version_id: int) -> bool:
        """Whether rows of this adapter are among these."""
        return version_id in self._users

    def grow(self, tokens: int, context: int, rank: int = 0) -> None:
        """Add rows (or take them, where negative) of requests that are in here, whose adapters have this rank."""
        self._tokens += tokens
        self._context_tokens += context
        self._rank_tokens += tokens * rank
        self._load = None

    def add(self, adapter: AdapterCost | None, tokens: int, context: int) -> None:
        """Add a request with its rows."""
        self.grow(tokens, context, 0 if adapter is None else adapter.rank)
        if adapter is None:
            return
        self._ranks[adapter.rank] = self._ranks.get(adapter.rank, 0) + 1
        users = self._users.get(adapter.version_id, 0)
        self._users[adapter.version_id] = users + 1
        self._adapter_bytes += 0 if users else adapter.weight_bytes

    def remove(self, adapter: AdapterCost | None, tokens: int, context: int) -> None:
        """Take a request with the rows that it has left."""
        self.grow(-tokens, -context, 0 if adapter is None else adapter.rank)
        if adapter is None:
            return
        self._ranks[adapter.rank] -= 1
        if not self._ranks[adapter.rank]:
            del self._ranks[adapter.rank]
        self._users[adapter.version_id] -= 1
        if not self._users[adapter.version_id]:
            del self._users[adapter.version_id]
            self._adapter_bytes -= adapter.weight_bytes

    @property
    def load(self) -> StepLoad:
        """The load of all rows in here."""
        if self._load is None:
            self._load = StepLoad(
                tokens=self._tokens,
                context_tokens=self._context_tokens,
                adapters=len(self._users),
                adapter_bytes=self._adapter_bytes,
                max_rank=max(self._ranks, default=0),
                rank_tokens=self._rank_tokens,
            )
        return self._load

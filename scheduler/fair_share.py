"""What each tenant has been served, so that none is starved by another's flood.

The virtual token counter of Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024, arXiv:2401.00588,
algorithm 2: a tenant's counter grows with the tokens that it is served, and whoever has the least goes first. A tenant
that comes back to the queue is lifted to those that wait there, so that no claim is saved up while it was away. Here it
is lifted to a credit below them: what it asks for now goes before a backlog that has been served all the time.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

# Weights of the paper's evaluation: a token of an answer costs about two of a prompt.
PROMPT_TOKEN_WEIGHT, ANSWER_TOKEN_WEIGHT = 1, 2
# A few requests of usual length.
DEFAULT_CREDIT_TOKENS = 4096
MOST_ABSENT_TENANTS = 4096
_MORE_THAN_EQUAL = 1.25
# Tenants that send alike have three times as many requests as the others now and then, and hardly ever four times.
_FLOOD_TIMES = 4


class TenantShares:
    """A counter of weighted tokens for each tenant. Counters never fall while a tenant has requests."""

    def __init__(self, credit_tokens: int = DEFAULT_CREDIT_TOKENS) -> None:
        """``credit_tokens``: by how much counters may differ between tenants that are taken to be served alike."""
        self.credit_tokens = credit_tokens
        self._counters: dict[str, int] = {}
        self._waiting: dict[str, int] = {}
        self._running: dict[str, int] = {}
        self._left_at = 0

    @property
    def counters(self) -> Mapping[str, int]:
        """Weighted tokens of each tenant, as far as they are remembered."""
        return MappingProxyType(self._counters)

    @property
    def waiting(self) -> Mapping[str, int]:
        """Requests that wait, of each tenant that has any."""
        return MappingProxyType(self._waiting)

    @property
    def running(self) -> Mapping[str, int]:
        """Admitted requests, of each tenant that has any."""
        return MappingProxyType(self._running)

    @property
    def tenants(self) -> int:
        """How many tenants have requests."""
        return len(self._waiting.keys() | self._running.keys())

    def wait(self, tenant: str) -> None:
        """A request of the tenant waits."""
        if tenant not in self._waiting:
            # Where nobody waits, the one that left last was served last of all.
            level = min((self._counters[other] for other in self._waiting), default=self._left_at)
            self._counters[tenant] = max(self._counters.get(tenant, 0), level - self.credit_tokens)
        self._waiting[tenant] = self._waiting.get(tenant, 0) + 1

    def stop_waiting(self, tenant: str) -> None:
        """A request of the tenant was admitted, or ended while it waited."""
        _take_one(self._waiting, tenant)
        if tenant not in self._waiting:
            self._left_at = self._counters[tenant]
        self._forget()

    def run(self, tenant: str) -> None:
        """A request of the tenant was admitted."""
        self._running[tenant] = self._running.get(tenant, 0) + 1

    def stop_running(self, tenant: str) -> None:
        """An admitted request of the tenant ended or was preempted."""
        _take_one(self._running, tenant)
        self._forget()

    def charge(self, tenant: str, *, prompt_tokens: int = 0, answer_tokens: int = 0) -> None:
        """The tenant, which has requests, was served so many tokens."""
        self._counters[tenant] += PROMPT_TOKEN_WEIGHT * prompt_tokens + ANSWER_TOKEN_WEIGHT * answer_tokens

    def surplus(self) -> frozenset[str]:
        """Tenants with more than an equal part of all requests, that were served more than another that has some.

        More is half the credit for the service, and for the part a quarter of it: chance alone makes some difference.
        """
        present = {*self._waiting, *self._running}
        if len(present) < 2:
            return frozenset()
        level = min(map(self._counters.__getitem__, present)) + self.credit_tokens // 2
        everybody = sum(self._waiting.values()) + sum(self._running.values())
        part = _MORE_THAN_EQUAL * everybody / len(present)
        served = [tenant for tenant in present if self._counters[tenant] >= level]
        return frozenset(
            tenant for tenant in served if self._waiting.get(tenant, 0) + self._running.get(tenant, 0) > part
        )

    def floods(self) -> frozenset[str]:
        """Tenants with more than four times the requests that others have on average, whatever they were served."""
        others = self.tenants - 1
        if others < 1:
            return frozenset()
        everybody = sum(self._waiting.values()) + sum(self._running.values())
        # own > times * (everybody - own) / others
        least = _FLOOD_TIMES * everybody / (others + _FLOOD_TIMES)
        if max(self._waiting.values(), default=0) + max(self._running.values(), default=0) <= least:
            return frozenset()
        present = self._waiting.keys() | self._running.keys()
        return frozenset(item for item in present if self._waiting.get(item, 0) + self._running.get(item, 0) > least)

    def may_wait(self, tenant: str, most_waiting: int, most_of_tenant: int) -> bool:
        """Whether one more request of the tenant may wait.

        A tenant has room for ``most_of_tenant``. Beyond ``most_waiting`` of all together, and up to twice that, only
        those may add to the queue that have less than an equal part of it: so one tenant keeps no other out.
        """
        own = self._waiting.get(tenant, 0)
        if own >= most_of_tenant:
            return False
        tenants = len(self._waiting) + (tenant not in self._waiting)
        everybody = sum(self._waiting.values())
        return everybody < most_waiting or (everybody < 2 * most_waiting and own * tenants < most_waiting)

    def check(self) -> None:
        """Raise AssertionError where counts are wrong."""
        assert all(count > 0 for count in (*self._waiting.values(), *self._running.values())), "a count is not positive"
        present = self._waiting.keys() | self._running.keys()
        assert present <= self._counters.keys(), "a tenant with requests has no counter"

    def _forget(self) -> None:
        """Of tenants without requests, forget those that would be lifted above what they had."""
        if len(self._counters) <= MOST_ABSENT_TENANTS:
            return
        present = self._waiting.keys() | self._running.keys()
        absent = sorted(self._counters.keys() - present, key=lambda tenant: (self._counters[tenant], tenant))
        for tenant in absent[: len(absent) // 2]:
            del self._counters[tenant]


def _take_one(counts: dict[str, int], tenant: str) -> None:
    if counts[tenant] == 1:
        del counts[tenant]
    else:
        counts[tenant] -= 1

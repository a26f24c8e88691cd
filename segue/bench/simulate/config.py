"""What a simulation is told."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from statistics import NormalDist

from segue.config import require, require_positive
from segue.scheduler.cost_model import CostProfile
from segue.scheduler.plan import SchedulerLimits
from segue.scheduler.policy import PolicyName


class Arrivals(StrEnum):
    """How requests follow each other: evenly, at random, or in bursts (gamma-distributed gaps)."""

    CONSTANT = "constant"
    POISSON = "poisson"
    GAMMA = "gamma"


class Popularity(StrEnum):
    """How often adapters are used: alike, by Zipf's law, or as the functions of Azure's trace."""

    UNIFORM = "uniform"
    ZIPF = "zipf"
    AZURE = "azure"


class Placement(StrEnum):
    """The policies that are compared."""

    RANK_AWARE = "rank-aware"
    MOST_IDLE = "most-idle"
    FIRST_FIT = "first-fit"
    RANDOM = "random"


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """What a request must meet to count as served in time, in seconds; infinite: anything will do.

    ``ttft_seconds`` to the first token; ``tpot_seconds`` from the first to the last, for each token after the first;
    ``time_per_token_seconds`` from the arrival to the last, for each token, as CaraServe counts.
    """

    ttft_seconds: float = math.inf
    tpot_seconds: float = math.inf
    time_per_token_seconds: float = math.inf

    def __post_init__(self) -> None:
        require_positive(self, "ttft_seconds", "tpot_seconds", "time_per_token_seconds")

    @property
    def step_seconds(self) -> float:
        """The longest step that all targets of tokens allow."""
        return min(self.tpot_seconds, self.time_per_token_seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadConfig:
    """The requests. ``burstiness`` is the coefficient of variation of the gaps of gamma arrivals.

    ``adapters`` have the ``ranks`` in turn, in the order of their popularity, and ``rank_bytes`` bytes of weights for
    each rank. ``base_share`` of the requests use none. Lengths are log-normal with these means, and with
    ``prompt_sigma`` and ``output_sigma`` as the standard deviation of their logarithms: 0 for one length.
    """

    requests: int = 20_000
    arrivals: str = Arrivals.POISSON.value
    burstiness: float = 1.0
    popularity: str = Popularity.ZIPF.value
    exponent: float = 1.0
    adapters: int = 256
    ranks: tuple[int, ...] = (8, 16, 32, 64)
    rank_bytes: int = 1_703_936
    base_share: float = 0.0
    prompt_mean: float = 128.0
    prompt_sigma: float = 0.0
    output_mean: float = 64.0
    output_sigma: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for field, kinds in (("arrivals", Arrivals), ("popularity", Popularity)):
            known = ", ".join(kinds)
            value = getattr(self, field)
            require(value in tuple(kinds), field, f"must be one of {known}, is {value!r}")
        require_positive(self, "requests", "burstiness", "adapters", "rank_bytes", "prompt_mean", "output_mean")
        require(bool(self.ranks) and min(self.ranks) >= 1, "ranks", "must name at least one, all from 1 on")
        require(self.exponent >= 0, "exponent", f"must not be negative, is {self.exponent}")
        require(0 <= self.base_share <= 1, "base_share", f"must be from 0 to 1, is {self.base_share}")
        for field in ("prompt_sigma", "output_sigma"):
            value = getattr(self, field)
            require(value >= 0, field, f"must not be negative, is {value}")

    @property
    def short_output_tokens(self) -> float:
        """The length below which one answer in a hundred stays; a router would know it from past answers."""
        normal = NormalDist(-(self.output_sigma**2) / 2, self.output_sigma) if self.output_sigma else None
        return self.output_mean * (math.exp(normal.inv_cdf(0.01)) if normal else 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaConfig:
    """One replica: what its steps cost, a step's bounds, and ``pages`` of ``page_bytes`` bytes for KV and adapters.
    ``cpu_cores`` help with cold prefills, and ``policy`` says who goes first."""

    profile: CostProfile
    limits: SchedulerLimits
    pages: int
    page_bytes: int
    cpu_cores: int = 0
    policy: str = PolicyName.FCFS.value

    def __post_init__(self) -> None:
        policies = tuple(PolicyName)
        require(self.policy in policies, "policy", f"must be one of {', '.join(policies)}, is {self.policy!r}")
        require_positive(self, "pages", "page_bytes")
        require(self.cpu_cores >= 0, "cpu_cores", f"must not be negative, is {self.cpu_cores}")
        for field in ("page_tokens", "max_running", "budget_tokens", "chunk_tokens"):
            require(getattr(self.limits, field) > 0, field, "must be greater than 0")

    def adapter_pages(self, weight_bytes: int) -> int:
        """Pages of an adapter's weights."""
        return -(-weight_bytes // self.page_bytes)


MOST_REPLICAS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationConfig:
    """A cluster of ``replicas`` alike and what is asked of it. Each placement serves the same requests.

    ``requests_per_second`` is the rate of the whole cluster. Requests before ``warmup_share`` and from
    ``cooldown_share`` of them on are served and not measured: the cluster is filling up and draining then.
    """

    replica: ReplicaConfig
    workload: WorkloadConfig
    targets: Targets
    replicas: int = 1
    requests_per_second: float = 1.0
    placements: tuple[str, ...] = tuple(Placement)
    warmup_share: float = 0.3
    cooldown_share: float = 0.9

    def __post_init__(self) -> None:
        require(1 <= self.replicas <= MOST_REPLICAS, "replicas", f"must be 1 to {MOST_REPLICAS}, is {self.replicas}")
        require(
            0 < self.requests_per_second < math.inf, "requests_per_second",
            f"must be positive and finite, is {self.requests_per_second}",
        )  # fmt: skip
        require(bool(self.placements), "placements", "must name at least one")
        for name in self.placements:
            require(name in tuple(Placement), "placements", f"must be among {', '.join(Placement)}, is {name!r}")
        require(len(set(self.placements)) == len(self.placements), "placements", "must not name one twice")
        require(
            0 <= self.warmup_share < self.cooldown_share <= 1, "warmup_share",
            f"must be below cooldown_share, both from 0 to 1, is {self.warmup_share}",
        )  # fmt: skip
        largest = self.replica.adapter_pages(max(self.workload.ranks) * self.workload.rank_bytes)
        require(largest < self.replica.pages, "pages", f"the largest adapter alone takes {largest}")

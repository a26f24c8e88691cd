"""Which replica serves a request: CaraServe's choice by what it costs everybody there, and the baselines beside it.

Pure: a policy sees the state and the cost profile of each replica, and the same states give the same choice. The
choice follows Algorithm 1 of Li et al., "Toppings: CPU-Assisted, Rank-Aware Adapter Serving for LLM Inference", USENIX
ATC 2025 (as CaraServe, arXiv:2401.11240). It differs in four points: the new request's own time per token counts as
well, as does bringing its adapter; what prompts take from those that decode, and a short answer's own wait, count
against the targets; and replicas that miss a target, all infinitely dear there, have an order.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from segue.config import require
from segue.scheduler.cost_model import CostProfile, StepLoad


@dataclass(frozen=True, slots=True)
class AdapterCost:
    """What an adapter's version costs: its largest rank and the bytes of its weights."""

    version_id: int
    rank: int
    weight_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementRequest:
    """A request to place. ``time_per_token_seconds`` is its target, infinite without one."""

    number: int
    prompt_tokens: int
    adapter: AdapterCost | None = None
    time_per_token_seconds: float = math.inf

    def rows(self, tokens: int, context_tokens: int) -> StepLoad:
        """So many rows of this request."""
        if self.adapter is None:
            return StepLoad(tokens=tokens, context_tokens=context_tokens)
        return StepLoad(
            tokens=tokens,
            context_tokens=context_tokens,
            adapters=1,
            adapter_bytes=self.adapter.weight_bytes,
            max_rank=self.adapter.rank,
            rank_tokens=tokens * self.adapter.rank,
        )


class ReplicaState(Protocol):
    """What a policy must see of a replica. Requests there are those that run and those that wait."""

    @property
    def profile(self) -> CostProfile:
        """What steps cost there."""
        ...

    @property
    def requests(self) -> int:
        """Requests there."""
        ...

    @property
    def decodes(self) -> StepLoad:
        """The step in which all requests there decode."""
        ...

    @property
    def prompts(self) -> StepLoad:
        """The rows of prompts there that have not been computed."""
        ...

    @property
    def prompt_share(self) -> float:
        """The part of its recent busy time in which the requests that decode waited for prompts: from 0 to below 1."""
        ...

    @property
    def time_per_token_seconds(self) -> float:
        """The tightest target of a request there, infinite without any."""
        ...

    def uses_adapter(self, version_id: int) -> bool:
        """Whether a request there uses the adapter."""
        ...

    def is_resident(self, version_id: int) -> bool:
        """Whether the adapter's weights are on the device or on their way."""
        ...

    def has_room(self, request: PlacementRequest) -> bool:
        """Whether the request could run at once."""
        ...


class PlacementPolicy(Protocol):
    """Chooses a replica by its place in a sequence that is not empty."""

    def choose(self, request: PlacementRequest, replicas: Sequence[ReplicaState]) -> int: ...


@dataclass(frozen=True, slots=True, order=True)
class PlacementCost:
    """What placing a request on a replica costs; the least in the order of the fields is chosen.

    ``excess_seconds``: by how much the predicted time per token would miss the tightest target there, 0 where it meets
    all. ``added_seconds``: the growth of the time per token, summed over all requests there, with that of the new one.
    """

    without_room: bool
    excess_seconds: float
    added_seconds: float
    requests: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RankAware:
    """Where the request costs all requests there least, and misses no target if that is possible.

    What a prompt and a copy cost once is spread over ``mean_output_tokens``, which an answer is expected to have. Where
    a target counts the time per token from the arrival on, ``short_output_tokens`` is the length of an answer that few
    fall below: spread over so many tokens, the new request's wait must fit into its target as well. Infinite where
    targets are of decodes alone, as in Algorithm 1.
    """

    mean_output_tokens: float
    short_output_tokens: float = math.inf

    def __post_init__(self) -> None:
        require(self.mean_output_tokens > 0, "mean_output_tokens", f"must be positive, is {self.mean_output_tokens}")
        require(self.short_output_tokens > 0, "short_output_tokens", f"must be positive, is {self.short_output_tokens}")

    def cost(self, request: PlacementRequest, replica: ReplicaState) -> PlacementCost:
        """What placing the request there would cost."""
        profile, adapter = replica.profile, request.adapter
        shared = adapter is not None and replica.uses_adapter(adapter.version_id)
        # Its answer will be read as well; how long that becomes is not known.
        decode = request.rows(1, request.prompt_tokens)
        prompt = request.rows(request.prompt_tokens, request.prompt_tokens * (request.prompt_tokens + 1) // 2)
        step_seconds = profile.decode_seconds(replica.decodes.joined(decode, shared_adapter=shared))
        added_decode = step_seconds - profile.decode_seconds(replica.decodes)
        prefill_seconds = profile.prefill_seconds(replica.prompts.joined(prompt, shared_adapter=shared))
        added_prefill = prefill_seconds - profile.prefill_seconds(replica.prompts)
        cold = adapter is not None and not replica.is_resident(adapter.version_id)
        copy_seconds = profile.copy_seconds(adapter.weight_bytes) if adapter is not None and cold else 0.0
        # It waits for all prompts there, not for its own alone.
        wait_seconds = prefill_seconds + copy_seconds
        decode_seconds = step_seconds / (1 - replica.prompt_share)
        own_seconds = decode_seconds + wait_seconds / self.short_output_tokens
        return PlacementCost(
            without_room=not replica.has_room(request),
            excess_seconds=max(
                0.0, own_seconds - request.time_per_token_seconds, decode_seconds - replica.time_per_token_seconds
            ),
            added_seconds=replica.requests * (added_decode + added_prefill / self.mean_output_tokens)
            + step_seconds
            + wait_seconds / self.mean_output_tokens,
            requests=replica.requests,
        )

    def choose(self, request: PlacementRequest, replicas: Sequence[ReplicaState]) -> int:
        """The place of the replica with the least cost, the first of equals."""
        return min(range(len(replicas)), key=lambda place: self.cost(request, replicas[place]))


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomReplica:
    """Any replica, drawn from the seed and the request's number alone."""

    seed: int

    def choose(self, request: PlacementRequest, replicas: Sequence[ReplicaState]) -> int:
        """The place of a replica, all equally likely."""
        return random.Random(f"{self.seed}:{request.number}").randrange(len(replicas))


@dataclass(frozen=True, slots=True)
class FirstFit:
    """The replica with the largest working set that has room for the request, else the one with the smallest.

    Chen et al., "Punica: Multi-Tenant LoRA Serving", 2023, arXiv:2310.18547, section 5.1.
    """

    def choose(self, request: PlacementRequest, replicas: Sequence[ReplicaState]) -> int:
        """The place of the fullest replica with room, the first of equals."""
        with_room = [place for place, replica in enumerate(replicas) if replica.has_room(request)]
        if not with_room:
            return MostIdle().choose(request, replicas)
        return max(with_room, key=lambda place: (replicas[place].requests, -place))


@dataclass(frozen=True, slots=True)
class MostIdle:
    """The replica with the fewest requests."""

    def choose(self, _request: PlacementRequest, replicas: Sequence[ReplicaState]) -> int:
        """The place of the replica with the fewest requests, the first of equals."""
        return min(range(len(replicas)), key=lambda place: (replicas[place].requests, place))

"""The requests of a run, drawn from a seed. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from segue.bench.slo.arrivals import Phases, arrival_seconds
from segue.bench.slo.config import SloClass, WorkloadConfig
from segue.bench.slo.lengths import draw_lengths
from segue.bench.slo.popularity import draw_places, order_by_popularity, shares
from segue.bench.slo.trace import NO_TRACE, Trace
from segue.config import ConfigError

_SEED_BITS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """An adapter of the server. ``decile`` says how popular it is: 1 for the most popular tenth of the adapters."""

    name: str
    rank: int
    decile: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRequest:
    """A request that is to start ``at_seconds`` after the run began. ``adapter`` is None for the base model.

    The prompt's tokens are drawn from ``prompt_seed``, or block by block from ``blocks``, where prompts are alike.
    ``is_cut`` says that prompt or answer is shorter than drawn, to fit the server's context.
    """

    number: int
    at_seconds: float
    measured: bool
    adapter: Adapter | None
    prompt_tokens: int
    output_tokens: int
    slo: SloClass
    tenant: str | None
    prompt_seed: int
    blocks: tuple[int, ...] = ()
    is_cut: bool = False


def rank_adapters(config: WorkloadConfig, ranks: Sequence[tuple[str, int]]) -> Sequence[Adapter]:
    """The adapters of the run, the most popular first, out of the server's (name, rank).

    Raises ConfigError if there are not as many as wanted, or none for requests that need one.
    """
    draw = np.random.default_rng(config.seed)
    order = order_by_popularity([rank for _, rank in ranks], config.popularity.rank_correlation, draw)
    if config.adapters is not None and config.adapters > len(ranks):
        raise ConfigError(f"adapters: the server has {len(ranks)}, not {config.adapters}")
    chosen = [ranks[place] for place in order[: config.adapters]]
    if not chosen and config.popularity.base_share < 1:
        raise ConfigError("adapters: the server has none; --base-share 1 asks the base model alone")
    return [
        Adapter(name=name, rank=rank, decile=1 + 10 * place // len(chosen)) for place, (name, rank) in enumerate(chosen)
    ]


def plan_requests(
    config: WorkloadConfig,
    adapters: Sequence[Adapter],
    requests_per_second: float,
    phases: Phases,
    *,
    round_number: int = 0,
    context_tokens: int | None = None,
    trace: Trace = NO_TRACE,
) -> Sequence[PlannedRequest]:
    """The requests of a run in the order of arrival; the same arguments give the same ones.

    Arrivals, adapters, lengths and the rest are drawn from streams of their own, so that changing one leaves the
    others. No two runs of other rates or rounds have the same prompts. Lengths are cut to fit ``context_tokens``.
    """
    generator = np.random.default_rng([config.seed, round_number, int(1000 * requests_per_second)])
    arrivals, places, prompts, outputs, classes, tenants, seeds = generator.spawn(7)
    times = arrival_seconds(config.arrivals, requests_per_second, phases, arrivals, trace.seconds)
    count = len(times)
    chosen: Sequence[int | None] = [None] * count
    if adapters:
        weights = shares(config.popularity.kind, config.popularity.parameter, len(adapters), trace.function_counts)
        chosen = draw_places(config.popularity, weights, count, places)
    prompt_tokens = draw_lengths(config.prompt, count, prompts, trace.prompt_tokens)
    output_tokens = draw_lengths(config.output, count, outputs, trace.output_tokens)
    drawn_tokens = prompt_tokens + output_tokens
    if context_tokens is not None:
        output_tokens = np.minimum(output_tokens, context_tokens - 1)
        prompt_tokens = np.minimum(prompt_tokens, context_tokens - output_tokens)
    class_places = _choose([each.share for each in config.classes], count, classes)
    names = list(config.tenants)
    tenant_places = _choose(list(config.tenants.values()), count, tenants) if names else None
    prompt_seeds = seeds.integers(1 << _SEED_BITS, size=count)
    planned = []
    for number in range(count):
        place = chosen[number]
        planned.append(
            PlannedRequest(
                number=number,
                at_seconds=float(times[number]),
                measured=phases.measures(float(times[number])),
                adapter=None if place is None else adapters[place],
                prompt_tokens=int(prompt_tokens[number]),
                output_tokens=int(output_tokens[number]),
                slo=config.classes[class_places[number]],
                tenant=None if tenant_places is None else names[tenant_places[number]],
                prompt_seed=int(prompt_seeds[number]),
                blocks=trace.blocks_of(number),
                is_cut=bool(prompt_tokens[number] + output_tokens[number] < drawn_tokens[number]),
            )
        )
    return planned


def _choose(weights: Sequence[float], count: int, draw: np.random.Generator) -> list[int]:
    likely = np.asarray(weights) / sum(weights)
    return [int(place) for place in draw.choice(len(weights), size=count, p=likely)]

"""What ``segue bench engine`` can measure, case by case, and the presets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from segue.bench.random_checkpoints import Targets
from segue.config import ConfigError, require


class Measure(StrEnum):
    """What is timed: the matrix products of a decode step alone, the step, and a request's way to its first token."""

    GEMMS = "gemm_ms"
    DECODE_STEP = "decode_step_ms"
    FIRST_TOKEN = "ttft_ms"


class When(StrEnum):
    """Where a base case stands in a round that has cases with adapters: before them, or measured again behind them."""

    BEFORE = "before"
    AFTER = "after"


@dataclass(frozen=True, slots=True)
class Mix:
    """The adapters of a batch, 0 for the base model. Request i uses adapter i modulo ``adapters``; adapter j has rank
    ``ranks[j % len(ranks)]`` and weights for ``targets``."""

    adapters: int = 0
    ranks: tuple[int, ...] = ()
    targets: Targets | None = None

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """A name for each adapter. Mixes share the n-th adapter of a rank."""
        names = []
        for index in range(self.adapters):
            rank = self.ranks[index % len(self.ranks)]
            names.append(f"{self.targets}-rank-{rank}-{index // len(self.ranks)}")
        return tuple(names)

    @property
    def distinct_ranks(self) -> tuple[int, ...]:
        """The ranks in use, in order."""
        return tuple(sorted(set(self.ranks[: self.adapters])))


BASE = Mix()
# Of a batch's prompts, over the case's: with a mean of 1, from as many as these on.
_GOLDEN = (5**0.5 - 1) / 2
_SPREAD = (1.0, 0.5, 1.5, 0.75, 1.25)


@dataclass(frozen=True, slots=True)
class Case:
    """One row of the report. ``prompt`` is in tokens, None where there are no requests.

    ``spread``, as it is in serving and the same each time: the prompts of a batch that decodes are half to one and a
    half times as long, and requests beyond one for each adapter use some adapters more than others.
    """

    measure: Measure
    batch: int
    mix: Mix = BASE
    prompt: int | None = None
    when: When | None = None
    spread: bool = False

    def prompt_of(self, index: int) -> int | None:
        """Tokens of the prompt of request ``index``."""
        if self.prompt is None or not self.spread:
            return self.prompt
        return max(1, round(self.prompt * _SPREAD[index % len(_SPREAD)]))

    def adapter_of(self, index: int) -> str | None:
        """The name of the adapter of request ``index``; None for the base model."""
        names = self.mix.adapter_names
        if not names:
            return None
        more = index - len(names)
        if not self.spread or more < 0:
            return names[index % len(names)]
        # Multiples of the golden ratio fill [0, 1) evenly; squared, they are mostly small.
        return names[int(len(names) * (more * _GOLDEN % 1) ** 2)]

    @property
    def longest_prompt(self) -> int:
        """Tokens; 1 without a prompt."""
        return max((self.prompt_of(index) or 1 for index in range(min(self.batch, len(_SPREAD)))), default=1)


def cross_cases(
    *,
    batches: Sequence[int],
    mixes: Sequence[str],
    ranks: Sequence[int],
    targets: Sequence[str],
    prompt: int,
    first_token_prompts: Sequence[int],
) -> tuple[Case, ...]:
    """Every batch with every mix that it has requests for, and first tokens alone.

    A mix is ``base``; ``one``, one adapter of the largest rank for all; ``distinct``, an adapter of the largest rank
    for each request; ``ranks``, an adapter for each request, of the ranks in turn; or a number of adapters of the ranks
    in turn. Raises ConfigError, which names what is wrong.
    """
    for name, values, least in (("batch", batches, 1), ("ranks", ranks, 1), ("ttft_prompts", first_token_prompts, 1)):
        require(bool(values) or name == "ttft_prompts", name, "must name at least one number")
        require(min(values, default=least) >= least, name, f"must be at least {least}, is {min(values, default=0)}")
    require(prompt >= 1, "prompt", f"must be at least 1, is {prompt}")
    require(bool(mixes), "mix", "must name at least one")
    for target in targets:
        require(target in tuple(Targets), "targets", f"must be one of {', '.join(Targets)}, is {target!r}")
    found = {batch: list(dict.fromkeys(_mixes(batch, mixes, ranks, targets))) for batch in dict.fromkeys(batches)}
    require(any(found.values()), "mix", "no batch has a request for each adapter")
    decodes = [(batch, mix) for batch, members in found.items() for mix in members]
    single = list(dict.fromkeys(mix if mix == BASE else Mix(1, (max(ranks),), mix.targets) for _, mix in decodes))
    single.sort(key=lambda mix: mix.adapters)
    return make_round(
        [(batch, mix, prompt) for batch, mix in decodes], [(mix, n) for mix in single for n in first_token_prompts]
    )


def make_round(decodes: Sequence[tuple[int, Mix, int]], first_tokens: Sequence[tuple[Mix, int]]) -> tuple[Case, ...]:
    """Matrix products, decode steps of (batch, mix, prompt), those of the base model again, then first tokens."""
    mixed = any(mix != BASE for _, mix, _ in decodes)
    cases = [Case(Measure.GEMMS, batch) for batch in dict.fromkeys(batch for batch, _, _ in decodes)]
    for batch, mix, prompt in decodes:
        when = When.BEFORE if mixed and mix == BASE else None
        cases.append(Case(Measure.DECODE_STEP, batch, mix, prompt, when))
    if mixed:
        again = [decode for decode in decodes if decode[1] == BASE]
        cases += [Case(Measure.DECODE_STEP, batch, mix, prompt, When.AFTER) for batch, mix, prompt in again]
    cases += [Case(Measure.FIRST_TOKEN, 1, mix, prompt) for mix, prompt in first_tokens]
    return tuple(cases)


def decode_cases(cases: Iterable[Case]) -> tuple[Case, ...]:
    """One of each mix and batch that decodes."""
    return tuple(case for case in cases if case.measure is Measure.DECODE_STEP and case.when is not When.AFTER)


def _mixes(batch: int, mixes: Sequence[str], ranks: Sequence[int], targets: Sequence[str]) -> Iterator[Mix]:
    turn, widest = tuple(ranks), (max(ranks),)
    for name in mixes:
        for target in targets:
            match name:
                case "base":
                    yield BASE
                case "one":
                    yield Mix(1, widest, Targets(target))
                case "distinct":
                    yield Mix(batch, widest, Targets(target))
                case "ranks":
                    yield Mix(batch, turn[:batch], Targets(target))
                case _:
                    count = _count(name)
                    if count <= batch:
                        yield Mix(count, turn[:count], Targets(target)) if count else BASE


def _count(name: str) -> int:
    if not name.isdecimal():
        raise ConfigError(f"mix: must be base, one, distinct, ranks or a number of adapters, is {name!r}")
    return int(name)


_TURN = (8, 16, 32, 64)


def _table_of_8b() -> tuple[Case, ...]:
    decodes = [(batch, BASE, 128) for batch in (1, 32, 128)]
    first_tokens = [(BASE, prompt) for prompt in (16, 128, 512)]
    for targets in Targets:
        one = Mix(1, (64,), targets)
        decodes += [
            (32, Mix(32, (64,), targets), 128),
            (32, Mix(32, (8,), targets), 128),
            (128, Mix(128, _TURN, targets), 128),
            (128, one, 128),
        ]
        first_tokens += [(one, prompt) for prompt in (16, 128, 512)]
    return make_round(decodes, first_tokens)


PRESETS: Mapping[str, tuple[Case, ...]] = MappingProxyType({"table-8b": _table_of_8b()})
"""``table-8b``: base model at batches of 1, 32 and 128; 32 adapters of rank 64, of rank 8; 128 of ranks 8 to 64; one of
rank 64 for all; first tokens of 16, 128 and 512. Adapters on q, k, v and o, then on all seven projections.

What bounds the time, at the sizes of an 8B model: weights of 0.8 GB are made and written, once for each rank; 27 GB are
read and copied to the device, as each of the 256 adapters has its own pages; a round has 14 cases of decode, of 43
steps and at most 16384 tokens of prompts each, and 45 first tokens. The first round records CUDA graphs, and is given
up with an error when the limit of the run is over; no later round begins then. Loading the model (random, on the
device) and compiling what is not in the caches is not bounded by the limit."""

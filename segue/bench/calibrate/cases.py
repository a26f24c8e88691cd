"""Which steps a calibration times, and which of them it judges the fit by instead of fitting them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from segue.bench.calibrate.config import CalibrateConfig
from segue.bench.cases import BASE, Case, Measure, Mix
from segue.bench.random_checkpoints import Targets

_RIDING_TOKENS = (16, 64, 256)


@dataclass(frozen=True, slots=True)
class CalibrationCase:
    """``case`` decodes or is a prompt alone. ``riding``: tokens of a prompt that joins the requests that decode.

    ``held_out``: the fit does not see it and is judged by it.
    """

    case: Case
    held_out: bool
    riding: int | None = None


def calibration_cases(config: CalibrateConfig) -> tuple[CalibrationCase, ...]:
    """All of them, each once, in an order in which every beginning has some of each kind, fitted and held out."""
    kinds = [_adapter_mixes(config), _other_batches(config), _prompts(config), _riding(config)]
    placed = []
    for number, kind in enumerate(kinds):
        cases = list(dict.fromkeys(kind))
        placed += [((place + 0.5) / len(cases), number, case) for place, case in enumerate(cases)]
    return tuple(case for _, _, case in sorted(placed, key=lambda item: item[:2]))


def fixed_batches(config: CalibrateConfig) -> tuple[int, ...]:
    """The batches at which, with the first context, only the adapters vary."""
    return tuple(dict.fromkeys((config.batches[-2], config.batches[-1])))


def _mix(config: CalibrateConfig, count: int, *ranks: int) -> Mix:
    """``count`` adapters of these ranks in turn, as far as there are so many."""
    count = min(count, config.most_adapters * len(ranks))
    return Mix(count, ranks[:count], Targets(config.targets)) if count >= 1 else BASE


def _adapter_mixes(config: CalibrateConfig) -> Iterator[CalibrationCase]:
    """Mixes of adapters of all kinds at two batches; every other one is held out."""
    ranks, low, high = config.ranks, config.ranks[0], config.ranks[-1]
    middle = ranks[len(ranks) // 2]
    for batch in fixed_batches(config):
        fitted = (
            BASE,
            _mix(config, batch, high),
            _mix(config, 1, high),
            _mix(config, batch, low),
            _mix(config, batch // 2, *ranks),
            _mix(config, batch // 4, high),
            _mix(config, batch // 4, low),
            _mix(config, 1, low),
        )
        held_out = (
            _mix(config, batch, *ranks),
            _mix(config, batch // 2, middle),
            _mix(config, batch // 2, low, high),
            _mix(config, 3 * batch // 4, *reversed(ranks)),
            _mix(config, batch, middle),
            _mix(config, batch // 8, high),
            _mix(config, batch // 4, *ranks),
            _mix(config, 2, middle),
        )
        for left, right in zip(fitted, held_out, strict=True):
            yield _decode(batch, left, config.contexts[0], held_out=False)
            if right not in fitted:
                yield _decode(batch, right, config.contexts[0], held_out=True)


def _other_batches(config: CalibrateConfig) -> Iterator[CalibrationCase]:
    """The base model and ranks in turn, at all other batches and contexts. Batches get no larger as contexts do."""
    most_tokens = config.batches[-1] * config.contexts[0]
    place = 0
    for context in config.contexts:
        for batch in config.batches:
            is_fixed = batch in fixed_batches(config) and context == config.contexts[0]
            if is_fixed or batch * context > most_tokens:
                continue
            # An adapter for each request, or some for several.
            adapters = batch if place % 4 < 2 else (batch + 1) // 2
            for mix in (BASE, _mix(config, adapters, *config.ranks)):
                yield _decode(batch, mix, context, held_out=place % 3 == 1)
                place += 1


def _decode(batch: int, mix: Mix, context: int, *, held_out: bool) -> CalibrationCase:
    # As in serving, no two requests are of one length.
    return CalibrationCase(Case(Measure.DECODE_STEP, batch, mix, context, spread=True), held_out)


def _prompts(config: CalibrateConfig) -> Iterator[CalibrationCase]:
    """Prompts alone, without an adapter and with one; of their lengths the second of each three is held out."""
    mixes = (BASE, *(_mix(config, 1, rank) for rank in (config.ranks[0], config.ranks[-1])))
    for place, tokens in enumerate(config.prompts):
        for mix in mixes:
            yield CalibrationCase(Case(Measure.FIRST_TOKEN, 1, mix, tokens), held_out=place % 3 == 1)


def _riding(config: CalibrateConfig) -> Iterator[CalibrationCase]:
    """Prompts that ride with requests that decode. No term is fitted to these."""
    lengths: Sequence[int] = [tokens for tokens in _RIDING_TOKENS if tokens <= config.prompts[-1]]
    for batch in (config.batches[len(config.batches) // 2], config.batches[-1]):
        for mix in (BASE, _mix(config, batch, *config.ranks)):
            for tokens in lengths:
                case = Case(Measure.DECODE_STEP, batch, mix, config.contexts[0], spread=True)
                yield CalibrationCase(case, held_out=True, riding=tokens)

"""Filters against the transformers library, and drawn tokens against the probabilities they are drawn with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from segue.engine.draw import filtered_weights, race
from segue.engine.philox import Place
from segue.engine.sampling_params import SamplingParams
from tests.engine.chi_square import chi_square

# Multiples of 1/8: equal logits are common, and unequal ones stay apart when they are divided by a temperature.
logits_lists = st.lists(
    st.integers(-80, 80).map(lambda n: n / 8) | st.just(-math.inf), min_size=1, max_size=600
).filter(lambda logits: max(logits) > -math.inf)
temperatures = st.sampled_from([0.25, 0.5, 1.0, 1.5, 4.0])
top_ps = st.sampled_from([1.0, 1e-6, 0.1, 0.37, 0.5, 0.9, 0.99, 0.999])
top_ks = st.sampled_from([0, 1, 2, 5, 40, 599, 10_000])
min_ps = st.sampled_from([0.0, 0.01, 0.05, 0.3, 1.0])


def params(**fields: Any) -> SamplingParams:
    return SamplingParams(**{"seed": 0, "temperature": 1.0, **fields})


def weights_of(logits: Tensor, rows: Sequence[SamplingParams]) -> Tensor:
    return filtered_weights(logits.clone(), logits.amax(-1), rows)


def theirs(logits: Tensor, row: SamplingParams) -> Tensor:
    """The scores [1, vocab] that transformers would draw from, its warpers in our order and all before top_p."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(row.temperature)])
    if row.min_p:
        warpers.append(MinPLogitsWarper(row.min_p))
    if row.top_k:
        warpers.append(TopKLogitsWarper(row.top_k))
    scores: Tensor = warpers(torch.LongTensor([[]]), torch.FloatTensor(logits))
    return scores


def assume_no_edge_within_rounding(logits: Tensor, before_top_p: Tensor, row: SamplingParams) -> None:
    """Their float32 sums and ours may disagree on a token only where it lies within rounding of a threshold."""
    ratios = ((logits - logits.max()) / row.temperature).double().exp()
    assume(row.min_p == 1 or bool(((ratios - row.min_p).abs() > 1e-6).all()))
    mass = before_top_p.double().softmax(-1).sort(descending=True).values.cumsum(-1)
    assume(row.top_p == 1 or bool(((mass - row.top_p).abs() > 1e-5).all()))


@given(logits=logits_lists, temperature=temperatures, top_p=top_ps, top_k=top_ks, min_p=min_ps)
@settings(max_examples=300, deadline=None)
def test_filters_are_those_of_transformers(
    logits: list[float], temperature: float, top_p: float, top_k: int, min_p: float
) -> None:
    row = params(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p)
    given_logits = torch.tensor([logits])
    expected = theirs(given_logits, row)
    assume_no_edge_within_rounding(given_logits, expected, row)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(torch.zeros(1, 0, dtype=torch.int64), expected)
    weights = weights_of(given_logits, [row])
    ours = weights / weights.sum()
    # Sorted: which of several equal tokens top_p keeps is chance there and the lowest ids here.
    torch.testing.assert_close(ours.sort().values, expected.softmax(-1).sort().values, rtol=1e-5, atol=1e-7)
    kept = ours > 0
    assert logits[int(ours.argmax())] == max(logits)
    for value in {logits[index] for index in kept[0].nonzero().squeeze(-1).tolist()}:
        among_equals = kept[0][given_logits[0] == value].int()
        assert bool((among_equals.diff() <= 0).all()), "a token was kept before an equal one with a lower id"


@pytest.mark.parametrize("spread", [0.0, 0.3, 1.0, 3.0, 8.0])
@pytest.mark.parametrize("top_p", [1e-9, 0.2, 0.9, 0.9999, 1 - 1e-12])
def test_the_nucleus_of_a_large_vocabulary_is_the_smallest_that_reaches_top_p(spread: float, top_p: float) -> None:
    logits = torch.randn(3, 50_000, generator=torch.Generator().manual_seed(7)) * spread
    weights = weights_of(logits, [params(top_p=top_p)] * 3)
    for row in range(3):
        probabilities = logits[row].double().softmax(-1)
        kept = probabilities[weights[row] > 0]
        assert float(kept.sum()) >= top_p - 1e-6
        assert float(kept.sum() - kept.min()) < top_p + 1e-6
        assert len(kept) == 50_000 or kept.min() >= probabilities[weights[row] == 0].max() * (1 - 1e-6)


def test_a_rows_filter_is_the_same_beside_other_rows() -> None:
    logits = torch.randn(6, 9_000, generator=torch.Generator().manual_seed(3)) * torch.tensor([[0.5], [8.0]]).repeat(
        3, 1
    )
    rows = [
        params(),
        params(top_p=0.9),
        params(top_k=20),
        params(min_p=0.2),
        params(top_p=0.5, top_k=900),
        params(top_p=0.7),
    ]
    together = weights_of(logits, rows)
    for index, row in enumerate(rows):
        assert torch.equal(together[index], weights_of(logits[index : index + 1], [row])[0])


def test_min_p_of_one_keeps_the_most_likely_alone() -> None:
    assert weights_of(torch.tensor([[1.0, 3.0, 3.0, 2.999]]), [params(min_p=1.0)]).tolist() == [[0, 1, 1, 0]]


def test_extreme_temperatures() -> None:
    logits = torch.tensor([[1e4, -1e4, 9999.0, -math.inf]])
    assert weights_of(logits, [params(temperature=1e-5)]).tolist() == [[1, 0, 0, 0]]
    for temperature in (1e30, 1e300):
        assert weights_of(logits, [params(temperature=temperature)]).tolist() == [[1, 1, 1, 0]]


PLACES: dict[str, Callable[[int], Place]] = {
    "positions": lambda index: Place(20_260, 0, index),
    "samples": lambda index: Place(20_260, index, 17),
    "seeds": lambda index: Place(index * 0x9E3779B97F4A7C15 % 2**64, 0, 17),
    "small seeds": lambda index: Place(index, 0, 0),
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize(("vocab", "top_p"), [(5, 1.0), (256, 1.0), (700, 1.0), (700, 0.8)])
def test_tokens_come_as_often_as_their_probability_says(
    place: Callable[[int], Place], vocab: int, top_p: float
) -> None:
    logits = torch.randn(1, vocab, generator=torch.Generator().manual_seed(vocab)) * 1.5
    weights = weights_of(logits, [params(top_p=top_p)])
    draws = 30_000
    tokens = torch.cat(
        [race(weights.expand(1000, -1), [place(start + row) for row in range(1000)]) for start in range(0, draws, 1000)]
    )
    assert abs(chi_square(tokens, (weights[0].double() / weights[0].double().sum()))) < 5


def test_successive_tokens_are_independent() -> None:
    weights = torch.tensor([[0.1, 0.2, 0.3, 0.15, 0.25]])
    tokens = race(weights.expand(40_000, -1), [Place(3, 0, position) for position in range(40_000)])
    pairs = tokens[0::2] * 5 + tokens[1::2]
    probabilities = weights[0].double() / weights[0].double().sum()
    assert abs(chi_square(pairs, torch.outer(probabilities, probabilities).flatten())) < 5


def test_a_draw_hardly_depends_on_rounding() -> None:
    """Two distributions that differ by d give other tokens with probability at most 6d: the bound of the races."""
    generator = torch.Generator().manual_seed(11)
    logits = torch.randn(1, 3_000, generator=generator) * 2
    changed = logits + 0.02 * torch.randn(1, 3_000, generator=generator)
    distance = float((logits.softmax(-1) - changed.softmax(-1)).abs().sum() / 2)
    places = [Place(9, 0, position) for position in range(20_000)]
    differ = 0
    for start in range(0, len(places), 1000):
        part = places[start : start + 1000]
        ours, others = (race(item.softmax(-1).expand(1000, -1), part) for item in (logits, changed))
        differ += int((ours != others).sum())
    assert 0 < differ / len(places) < 6 * distance


def test_tokens_of_no_weight_are_never_drawn() -> None:
    weights = torch.zeros(200, 1_000)
    only = torch.arange(200) * 5
    weights[torch.arange(200), only] = 1e-30
    assert torch.equal(race(weights, [Place(seed, 0, 0) for seed in range(200)]), only)


@pytest.mark.gpu
def test_the_device_draws_the_same_tokens() -> None:
    logits = torch.randn(64, 32_000, generator=torch.Generator().manual_seed(5)) * 3
    rows = [params(top_p=0.9), params(top_k=40), params(min_p=0.05), params(temperature=0.7)] * 16
    places = [Place(seed, 0, seed) for seed in range(64)]
    on_device = race(weights_of(logits.cuda(), rows), places)
    assert torch.equal(on_device.cpu(), race(weights_of(logits, rows), places))

"""Choosing tokens: what changes the logits, in which order, and that a request's tokens are its own."""

from __future__ import annotations

import math
import random
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from segue.engine.sampling import SamplingRow, UnusableLogitsError, sample
from segue.engine.sampling_params import SamplingParams
from segue.engine.token_counts import TokenCounts
from tests.engine.chi_square import chi_square

VOCAB = 1_000


def row(position: int = 0, counts: TokenCounts | None = None, **fields: Any) -> SamplingRow:
    return SamplingRow(params=SamplingParams(**{"seed": 1, **fields}), position=position, counts=counts)


def random_logits(rows: int, vocab: int = VOCAB, seed: int = 0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 2


def tokens(logits: Tensor, rows: list[SamplingRow]) -> list[int]:
    return [item.token_id for item in sample(logits, rows)]


def order_of_choice(logits: Tensor, changed: SamplingRow) -> list[int]:
    """The tokens in the order of a row's changed logits: one greedy choice after another, without those before."""
    order = []
    given_logits = logits.clone()
    for _ in range(len(logits)):
        token_id = tokens(given_logits[None], [changed])[0]
        order.append(token_id)
        given_logits[token_id] = -math.inf
    return order


def test_greedy_takes_the_lowest_of_the_most_likely() -> None:
    logits = random_logits(8)
    logits[3, [17, 400, 999]] = 50.0
    before = logits.clone()
    chosen = tokens(logits, [row()] * 8)
    assert chosen == before.argmax(-1).tolist()
    assert chosen[3] == 17
    assert torch.equal(logits, before)


def mixed_rows(count: int) -> list[SamplingRow]:
    source = random.Random(4)
    rows = []
    for index in range(count):
        counts = TokenCounts([index, 5, 6], [7, 7, 8])
        fields: dict[str, Any] = {
            "seed": source.getrandbits(64),
            "sample": source.randrange(4),
            "temperature": source.choice([0.0, 0.3, 1.0, 2.0]),
            "top_p": source.choice([1.0, 0.9, 0.4]),
            "top_k": source.choice([0, 3, 100]),
            "min_p": source.choice([0.0, 0.1]),
            "presence_penalty": source.choice([0.0, 0.5]),
            "repetition_penalty": source.choice([1.0, 1.3]),
            "logit_bias": source.choice([{}, {9: 5.0, 10: -5.0}]),
            "logprobs": source.choice([None, 0, 3]),
        }
        rows.append(row(source.randrange(500), counts, **fields))
    return rows


@pytest.mark.parametrize("vocab", [VOCAB, 200_000])
def test_a_request_gets_the_same_token_alone_and_in_a_crowd(vocab: int) -> None:
    logits, rows = random_logits(12, vocab), mixed_rows(12)
    alone = [sample(logits[index : index + 1], [item])[0] for index, item in enumerate(rows)]
    assert len({item.token_id for item in alone}) > 6
    for seed in range(3):
        order = random.Random(seed).sample(range(12), 12)
        crowd = sample(logits[order], [rows[index] for index in order])
        assert [item.token_id for item in crowd] == [alone[index].token_id for index in order]


def test_greedy_rows_are_those_of_a_greedy_batch() -> None:
    logits, rows = random_logits(12), mixed_rows(12)
    greedy = [0, 4, 7, 11]
    for index in greedy:
        rows[index] = row()
    chosen = tokens(logits, rows)
    assert [chosen[index] for index in greedy] == tokens(logits[greedy], [row()] * 4)


def test_counts_made_anew_after_preemption_give_the_same_token() -> None:
    logits = random_logits(1)
    grown = TokenCounts([1, 2, 3])
    generated = [4, 4, 900, 5, 4]
    for token_id in generated:
        grown.add(token_id)
    fields: dict[str, Any] = {"temperature": 1.0, "frequency_penalty": 0.7, "repetition_penalty": 1.2}
    for position in range(20):
        kept = tokens(logits, [row(position, grown, **fields)])
        assert kept == tokens(logits, [row(position, TokenCounts([1, 2, 3], generated), **fields)])


def test_seed_sample_and_position_each_change_the_tokens() -> None:
    logits = random_logits(1).expand(64, -1)
    base = tokens(logits, [row(position, temperature=1.0) for position in range(64)])
    assert base == tokens(logits, [row(position, temperature=1.0) for position in range(64)])
    for other in (
        [row(position, temperature=1.0, seed=2) for position in range(64)],
        [row(position, temperature=1.0, sample=1) for position in range(64)],
        [row(position + 64, temperature=1.0) for position in range(64)],
    ):
        assert sum(a == b for a, b in zip(base, tokens(logits, other), strict=True)) < 16


@pytest.mark.parametrize("penalty", [0.4, 1.1, 1.7, 5.0])
def test_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    logits = random_logits(1, 60)[0]
    prompt, generated = [3, 3, 9, 40, 41, 12], [9, 55, 55, 2, 17]
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([prompt + generated]), logits[None])[0]
    penalised = row(counts=TokenCounts(prompt, generated), repetition_penalty=penalty)
    assert order_of_choice(logits, penalised) == expected.sort(descending=True, stable=True).indices.tolist()
    assert expected.argsort().tolist() != logits.argsort().tolist()


DRAWS = 20_000
PROCESSED: dict[str, tuple[dict[str, Any], list[Any]]] = {
    "temperature": ({"temperature": 0.7}, [TemperatureLogitsWarper(0.7)]),
    "top_k": ({"temperature": 1.3, "top_k": 30}, [TemperatureLogitsWarper(1.3), TopKLogitsWarper(30)]),
    "top_p": ({"temperature": 1.0, "top_p": 0.8}, [TopPLogitsWarper(0.8)]),
    "min_p": ({"temperature": 1.5, "min_p": 0.05}, [TemperatureLogitsWarper(1.5), MinPLogitsWarper(0.05)]),
    "all of them": (
        {"temperature": 0.9, "top_k": 200, "top_p": 0.9, "repetition_penalty": 1.4},
        [
            RepetitionPenaltyLogitsProcessor(1.4),
            TemperatureLogitsWarper(0.9),
            TopKLogitsWarper(200),
            TopPLogitsWarper(0.9),
        ],
    ),
}


@pytest.mark.parametrize(("fields", "processors"), PROCESSED.values(), ids=PROCESSED)
def test_draws_follow_the_probabilities_of_transformers(fields: dict[str, Any], processors: list[Any]) -> None:
    logits = random_logits(1, vocab=500, seed=12)
    prompt = [3, 77, 77, 250, 499]
    ids: Any = torch.tensor([prompt])
    processed = LogitsProcessorList(processors)(ids, logits.clone())
    counts = TokenCounts(prompt)
    drawn: list[int] = []
    for start in range(0, DRAWS, 1_000):
        rows = [row(position=9, counts=counts, sample=start + index, **fields) for index in range(1_000)]
        drawn += tokens(logits.expand(1_000, -1), rows)
    assert abs(chi_square(torch.tensor(drawn), processed[0].double().softmax(-1))) < 5


def test_presence_and_frequency_penalties_count_the_answer_alone() -> None:
    logits = torch.zeros(6)
    # 0 is in the prompt, 1 and 2 came once and twice, 3 in prompt and answer.
    counts = TokenCounts([0, 3], [1, 2, 2, 3])
    presence = order_of_choice(logits, row(counts=counts, presence_penalty=1.0))
    assert presence == [0, 4, 5, 1, 2, 3]
    frequency = order_of_choice(logits, row(counts=counts, frequency_penalty=1.0))
    assert frequency == [0, 4, 5, 1, 3, 2]
    negative = order_of_choice(logits, row(counts=counts, frequency_penalty=-1.0))
    assert negative == [2, 1, 3, 0, 4, 5]


def test_changes_come_in_their_order() -> None:
    """The bias of 3 is penalised by 2 and then 0.4 comes off: 1.1. Penalised before the bias it would be 2.6."""
    fields: dict[str, Any] = {
        "logit_bias": {0: 3.0},
        "repetition_penalty": 2.0,
        "frequency_penalty": 0.1,
        "presence_penalty": 0.2,
    }
    biased = row(counts=TokenCounts([1], [0, 0]), **fields)
    assert tokens(torch.tensor([[0.0, -9.0, 1.11]]), [biased]) == [2]
    assert tokens(torch.tensor([[0.0, -9.0, 1.09]]), [biased]) == [0]


def test_stop_tokens_are_banned_before_min_tokens_whatever_their_bias() -> None:
    logits = torch.tensor([[9.0, 5.0, 1.0]])
    fields: dict[str, Any] = {"min_tokens": 3, "stop_token_ids": (0, 1), "logit_bias": {1: 100.0}}
    assert [tokens(logits, [row(position, **fields)])[0] for position in range(5)] == [2, 2, 2, 1, 1]
    drawn = {tokens(logits, [row(2, temperature=50.0, seed=seed, **fields)])[0] for seed in range(50)}
    assert drawn == {2}


def test_logprobs_are_the_models() -> None:
    logits = random_logits(3)
    best = int(logits[1].argmax())
    rows = [
        row(),
        row(logprobs=4, temperature=5.0, logit_bias={best: -100.0}, min_tokens=1, stop_token_ids=(3,)),
        row(logprobs=0),
    ]
    expected = logits.double().log_softmax(-1)
    plain, biased, chosen_only = sample(logits, rows)
    assert plain.logprob is None
    assert biased.logprob is not None
    assert biased.token_id != best
    assert biased.logprob.token_id == biased.token_id
    assert biased.logprob.logprob == pytest.approx(float(expected[1, biased.token_id]), abs=1e-5)
    top = expected[1].topk(4)
    assert list(biased.logprob.top) == top.indices.tolist()
    assert list(biased.logprob.top.values()) == pytest.approx(top.values.tolist(), abs=1e-5)
    assert chosen_only.logprob is not None
    assert chosen_only.logprob.top == {}
    assert sample(logits[:, :3], [row(logprobs=20)] * 3)[0].logprob is not None


choices = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 1e-5, 0.7, 1e30, 1e300]),
        "top_p": st.sampled_from([1.0, 1e-300, 0.5]),
        "top_k": st.sampled_from([0, 1, 10**9]),
        "min_p": st.sampled_from([0.0, 0.5, 1.0]),
        "seed": st.integers(0, 2**64 - 1),
        "sample": st.integers(0, 2**32 - 1),
    }
)


@given(
    logits=st.lists(
        st.floats(width=32, allow_nan=False).filter(lambda logit: logit < math.inf) | st.just(1.0),
        min_size=1,
        max_size=300,
    ),
    fields=choices,
    position=st.integers(0, 2**32 - 1),
)
@settings(max_examples=200, deadline=None)
def test_any_logits_give_a_token_or_a_clear_error(logits: list[float], fields: dict[str, Any], position: int) -> None:
    batch = torch.tensor([logits])
    if max(logits) == -math.inf:
        with pytest.raises(UnusableLogitsError, match="row 0: every token is banned"):
            sample(batch, [row(position, **fields)])
        return
    (token_id,) = tokens(batch, [row(position, **fields)])
    assert logits[token_id] > -math.inf
    if fields["top_k"] == 1 or fields["min_p"] == 1 or fields["temperature"] == 0 or fields["top_p"] == 1e-300:
        hottest = max(1.0, fields["temperature"])
        assert (max(logits) - logits[token_id]) / hottest <= 1e-6
    if fields["temperature"] == 0:
        assert token_id == logits.index(max(logits))


@given(left=st.integers(0, 299), fields=choices)
@settings(max_examples=50, deadline=None)
def test_the_only_token_left_is_taken(left: int, fields: dict[str, Any]) -> None:
    logits = torch.full((1, 300), -math.inf)
    logits[0, left] = -7.0
    assert tokens(logits, [row(**fields)]) == [left]
    banned = tuple(token_id for token_id in range(300) if token_id != left)
    assert tokens(random_logits(1, 300), [row(min_tokens=1, stop_token_ids=banned, **fields)]) == [left]


def test_unusable_rows_are_all_named() -> None:
    logits = random_logits(5, 200_000)
    logits[1, 70_000] = math.nan
    logits[4, 3] = math.inf
    with pytest.raises(UnusableLogitsError, match="row 1: a logit is nan; row 4: a logit is inf") as caught:
        sample(logits, [row(temperature=1.0)] * 5)
    assert set(caught.value.problems) == {1, 4}


def test_rows_without_a_token_left_are_all_named() -> None:
    vocab = 200_000
    everything = row(min_tokens=1, stop_token_ids=tuple(range(vocab)), temperature=1.0)
    rows = [row(), everything, row(temperature=1.0), row(temperature=1.0), everything]
    with pytest.raises(UnusableLogitsError) as caught:
        sample(random_logits(5, vocab), rows)
    assert caught.value.problems == {1: "every token is banned", 4: "every token is banned"}


def test_wrong_calls_are_refused() -> None:
    with pytest.raises(ValueError, match=r"not float32 \[2, vocab\]"):
        sample(random_logits(3), [row()] * 2)
    with pytest.raises(ValueError, match="bfloat16"):
        sample(random_logits(1).bfloat16(), [row()])
    with pytest.raises(ValueError, match="counts"):
        sample(random_logits(1), [row(presence_penalty=1.0)])
    assert sample(random_logits(0), []) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", -1),
        ("seed", 2**64),
        ("sample", 2**32),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("top_k", -1),
        ("min_p", 1.5),
        ("presence_penalty", math.inf),
        ("frequency_penalty", math.nan),
        ("repetition_penalty", 0.0),
    ],
)
def test_parameters_out_of_range_are_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{field} must be"):
        SamplingParams(**{"seed": 0, field: value})  # type: ignore[arg-type]


def test_parameters_travel_as_messages() -> None:
    params = SamplingParams(
        seed=2**64 - 1, temperature=0.5, logit_bias={128_000: -1.5}, stop_token_ids=(1, 2), logprobs=0
    )
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params


def test_what_the_hot_path_may_skip() -> None:
    plain = SamplingParams(seed=0)
    assert plain.is_greedy
    assert not plain.is_filtered
    assert not plain.changes_logits(0)
    stopping = SamplingParams(seed=0, min_tokens=2, stop_token_ids=(1,))
    assert [stopping.changes_logits(position) for position in range(3)] == [True, True, False]
    assert SamplingParams(seed=0, temperature=1e-6).is_greedy
    assert not SamplingParams(seed=0, temperature=1e-5).is_greedy

"""The sampling kernels against torch: in Triton's interpreter without a GPU, compiled with one."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from segue.engine.cuda.sampler import KernelSampler, pack_rows
from segue.engine.draw import filtered_weights
from segue.engine.philox import Place, uniforms
from segue.engine.sampler import TorchSampler
from segue.engine.sampling import SampledToken, SamplingRow
from segue.engine.sampling_params import SamplingParams
from segue.engine.token_counts import TokenCounts
from segue.gpu_kernels.sample_tokens import sample_tokens
from tests.engine.chi_square import chi_square

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GROUP = 256


@pytest.fixture(autouse=True)
def numbers_of_a_device() -> Iterator[None]:
    """The interpreter computes with numpy, which warns of NaN and of numbers too large, as a device does not."""
    with np.errstate(all="ignore"):
        yield


def row(position: int = 0, counts: TokenCounts | None = None, **fields: Any) -> SamplingRow:
    return SamplingRow(params=SamplingParams(**{"seed": 1, **fields}), position=position, counts=counts)


def random_logits(rows: int, vocab: int, seed: int = 0) -> Tensor:
    spreads = torch.tensor([0.5, 2.0, 6.0])[torch.arange(rows) % 3]
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spreads[:, None]


def mixed_rows(count: int, vocab: int, seed: int = 4) -> list[SamplingRow]:
    """Every parameter, on and off, independently of the others."""
    source = random.Random(seed)
    rows = []
    for _ in range(count):
        seen = [source.randrange(vocab) for _ in range(12)]
        biased = {source.randrange(vocab): source.choice([5.0, -5.0, 0.25]) for _ in range(3)}
        fields: dict[str, Any] = {
            "seed": source.getrandbits(64),
            "sample": source.randrange(1 << 32),
            "temperature": source.choice([0.0, 0.3, 1.0, 2.0]),
            "top_p": source.choice([1.0, 1.0, 0.9, 0.4]),
            "top_k": source.choice([0, 0, 3, 100]),
            "min_p": source.choice([0.0, 0.1]),
            "presence_penalty": source.choice([0.0, 0.0, 0.5]),
            "frequency_penalty": source.choice([0.0, 0.0, 0.3]),
            "repetition_penalty": source.choice([1.0, 1.0, 1.3]),
            "logit_bias": source.choice([{}, {}, biased]),
            "stop_token_ids": (source.randrange(vocab),) if vocab > 1 else (),
            "min_tokens": source.choice([0, 1 << 31]),
            "logprobs": source.choice([None, 0, 3]),
        }
        rows.append(row(source.randrange(1 << 32), TokenCounts(seen[:8], seen[6:]), **fields))
    return rows


def by_kernel(logits: Tensor, rows: Sequence[SamplingRow]) -> list[SampledToken | None]:
    before = logits.clone()
    pending = KernelSampler().launch(logits.to(DEVICE), rows)
    tokens = pending.read()
    assert pending.token_ids.tolist() == [0 if token is None else token.token_id for token in tokens]
    assert torch.equal(logits, before) or bool(before.isnan().any())
    return tokens


def by_torch(logits: Tensor, rows: Sequence[SamplingRow]) -> list[SampledToken | None]:
    return TorchSampler().launch(logits, rows).read()


def nudged(item: SamplingRow, factor: float) -> SamplingRow:
    params = item.params
    fields = {name: getattr(params, name) for name in params.__struct_fields__}
    fields["top_p"] = min(1.0, params.top_p * factor) if params.top_p < 1 else 1.0
    fields["min_p"] = min(1.0, params.min_p * factor)
    return SamplingRow(params=SamplingParams(**fields), position=item.position, counts=item.counts)


def is_clear(logits: Tensor, item: SamplingRow, expected: SampledToken) -> bool:
    """Whether the row's token stays when filters, logits or the race move by 1e-5."""
    for factor in (1 - 1e-5, 1 + 1e-5):
        if by_torch(logits, [nudged(item, factor)]) != [expected]:
            return False
    generator = torch.Generator().manual_seed(9)
    for _ in range(3):
        moved = logits + 1e-5 * torch.randn(logits.shape, generator=generator)
        (token,) = by_torch(moved, [item])
        if token is None or token.token_id != expected.token_id:
            return False
    return True


def check_against_torch(logits: Tensor, rows: Sequence[SamplingRow]) -> None:
    expected, tokens = by_torch(logits, rows), by_kernel(logits, rows)
    unclear = 0
    for index, (theirs, ours) in enumerate(zip(expected, tokens, strict=True)):
        if theirs is None or ours is None:
            assert theirs is ours, f"row {index}"
            continue
        if ours.token_id != theirs.token_id:
            assert not is_clear(logits[index : index + 1], rows[index], theirs), f"row {index} {rows[index]}"
            unclear += 1
            continue
        assert (ours.logprob is None) == (theirs.logprob is None)
        if ours.logprob is not None and theirs.logprob is not None:
            assert ours.logprob.logprob == pytest.approx(theirs.logprob.logprob, abs=1e-5)
            assert list(ours.logprob.top.values()) == pytest.approx(list(theirs.logprob.top.values()), abs=1e-5)
    assert unclear <= len(rows) // 50


@pytest.mark.parametrize(("batch", "vocab"), [(17, 1), (17, 63), (3, 129), (17, 1000), (17, 4097), (1, 9000)])
def test_mixed_rows_get_the_tokens_of_torch(batch: int, vocab: int) -> None:
    check_against_torch(random_logits(batch, vocab), mixed_rows(batch, vocab, seed=vocab))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"top_k": 2},
        {"top_k": 300},
        {"top_p": 0.6},
        {"top_p": 0.999},
        {"min_p": 0.3},
        {"top_k": 40, "top_p": 0.7, "min_p": 0.01},
    ],
    ids=str,
)
def test_each_filter_alone(fields: dict[str, Any]) -> None:
    rows = [row(index, seed=index, temperature=1.2, **fields) for index in range(6)]
    check_against_torch(random_logits(6, 700, seed=3), rows)


def test_a_row_is_the_same_to_the_bit_alone_and_in_a_crowd() -> None:
    vocab = 4200
    logits, rows = random_logits(12, vocab).to(DEVICE), mixed_rows(12, vocab, seed=2)

    def results(indices: list[int]) -> Tensor:
        packed = pack_rows([rows[index] for index in indices])
        chosen = sample_tokens(
            logits[indices],
            torch.from_numpy(packed.words).to(DEVICE),
            edited_rows=packed.edited_rows,
            searched_rows=packed.searched_rows,
        )
        return chosen.results

    crowd = results(list(range(12)))
    for index in (0, 7):
        assert torch.equal(results([index])[0], crowd[index])
    order = [5, 2, 11, 0]
    assert torch.equal(results(order), crowd[order])


def test_equal_tokens_are_kept_from_the_lowest_id_on() -> None:
    equal = torch.zeros(1, 1500).expand(12, -1).contiguous()
    nucleus = by_kernel(equal, [row(seed=seed, temperature=1.0, top_p=0.002) for seed in range(12)])
    assert {token.token_id for token in nucleus if token is not None} == {0, 1, 2}
    tied = torch.full((12, 1500), -1.0)
    tied[:, [700, 300, 1499]] = 2.0
    kept = by_kernel(tied, [row(seed=seed, temperature=1.0, top_k=1) for seed in range(12)])
    assert {token.token_id for token in kept if token is not None} == {300, 700, 1499}
    assert [token.token_id for token in by_kernel(tied, [row()] * 12) if token is not None] == [300] * 12


def test_coarse_logits_with_many_equals_get_the_tokens_of_torch() -> None:
    logits = (random_logits(16, 600, seed=8) * 2).round() / 2
    fields: list[dict[str, Any]] = [{"top_p": 0.37}, {"top_k": 25}, {"top_k": 7, "top_p": 0.83}, {"min_p": 0.05}]
    rows = [row(index, seed=index, temperature=0.5, **fields[index % 4]) for index in range(16)]
    check_against_torch(logits, rows)


def test_rows_that_no_token_can_be_chosen_from() -> None:
    vocab = 600
    logits = random_logits(10, vocab, seed=1)
    logits[1, 599] = math.nan
    logits[2, 0] = math.inf
    logits[3] = -math.inf
    logits[5, 17] = math.nan
    logits[6, :590] = -math.inf
    logits[8] = math.nan
    everything = tuple(range(vocab))
    rows = [
        row(),
        row(temperature=1.0),
        row(logprobs=2),
        row(temperature=1.0, top_p=0.5, logprobs=0),
        row(min_tokens=1, stop_token_ids=everything, temperature=1.0),
        row(min_tokens=1, stop_token_ids=(17,)),
        row(temperature=1.0, top_k=200, top_p=0.9, logprobs=20),
        row(temperature=0.7),
        row(temperature=0.7, top_k=3),
        row(logit_bias={5: -100.0}, logprobs=1),
    ]
    tokens = by_kernel(logits, rows)
    assert [index for index, token in enumerate(tokens) if token is None] == [1, 2, 3, 4, 5, 8]
    usable = [0, 6, 7, 9]
    check_against_torch(logits[usable], [rows[index] for index in usable])


def test_extreme_parameters() -> None:
    logits = torch.tensor([[1e4, -1e4, 9999.0, -math.inf, 3e38 * 0]]).expand(6, -1).contiguous()
    rows = [
        row(temperature=1e-5),
        row(temperature=1e300, seed=5),
        row(temperature=1.0, top_p=1e-300),
        row(temperature=1.0, min_p=1.0),
        row(temperature=1e300, top_k=10**12, seed=6),
        row(temperature=1.0, min_p=1e-300, top_p=1 - 1e-12),
    ]
    check_against_torch(logits, rows)
    only = torch.full((6, 700), -math.inf)
    only[:, 431] = -3e38
    assert [token.token_id for token in by_kernel(only, rows) if token is not None] == [431] * 6


def test_a_drawn_token_has_the_numbers_of_its_place() -> None:
    """With equal weights the winner is the smallest time of the groups' and of the members' numbers."""
    rows = [row(2**32 - 1 - index, seed=2**64 - 1 - index, sample=2**31 + index, temperature=1.0) for index in range(8)]
    tokens = by_kernel(torch.zeros(8, 4 * GROUP), rows)
    places = [Place(item.params.seed, item.params.sample, item.position) for item in rows]
    numbers = uniforms(places, GROUP + 4, torch.device("cpu"))
    expected = numbers[:, GROUP:].argmax(-1) * GROUP + numbers[:, :GROUP].argmax(-1)
    assert [token.token_id for token in tokens if token is not None] == expected.tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_16_bits(dtype: torch.dtype) -> None:
    logits, rows = random_logits(4, 300).to(dtype), mixed_rows(4, 300, seed=11)
    assert by_kernel(logits, rows) == by_kernel(logits.float(), rows)


def test_no_rows() -> None:
    assert by_kernel(torch.zeros(0, 40), []) == []


def test_wrong_calls_are_refused() -> None:
    with pytest.raises(ValueError, match=r"logits are \[3, 5\], not \[2, vocab\]"):
        KernelSampler().launch(torch.zeros(3, 5), [row()] * 2)
    with pytest.raises(ValueError, match="counts"):
        KernelSampler().launch(torch.zeros(1, 5), [row(presence_penalty=1.0)])
    words = torch.from_numpy(pack_rows([row()]).words).to(DEVICE)
    with pytest.raises(ValueError, match="logits: need"):
        sample_tokens(torch.zeros(1, 5, device=DEVICE).double(), words, edited_rows=0, searched_rows=0)
    with pytest.raises(ValueError, match="table: must be int32"):
        sample_tokens(torch.zeros(2, 5, device=DEVICE), words, edited_rows=0, searched_rows=0)


VOCAB = 128_256


@pytest.mark.gpu
@pytest.mark.parametrize("seed", [pytest.param(0, marks=pytest.mark.memcheck), 1])
def test_a_full_batch_gets_the_tokens_of_torch(seed: int) -> None:
    check_against_torch(random_logits(128, VOCAB, seed), mixed_rows(128, VOCAB, seed))


@pytest.mark.gpu
@pytest.mark.parametrize("fields", [{}, {"top_k": 50}, {"top_p": 0.9}, {"min_p": 0.02, "top_p": 0.95}], ids=str)
def test_draws_of_a_full_batch_follow_the_probabilities(fields: dict[str, Any]) -> None:
    logits = random_logits(3, VOCAB)[2:3]
    params = SamplingParams(seed=0, temperature=0.8, **fields)
    weights = filtered_weights(logits.clone(), logits.amax(-1), [params])[0].double()
    on_device = logits.to(DEVICE).expand(128, -1).contiguous()
    launches = [
        KernelSampler().launch(
            on_device, [row(step, seed=3, sample=sample, temperature=0.8, **fields) for sample in range(128)]
        )
        for step in range(160)
    ]
    tokens = torch.cat([launched.token_ids for launched in launches]).cpu()
    assert abs(chi_square(tokens, weights / weights.sum())) < 5


@pytest.mark.gpu
def test_a_launch_waits_for_nothing() -> None:
    logits, rows = random_logits(128, VOCAB).to(DEVICE), mixed_rows(128, VOCAB)
    sampler = KernelSampler()
    sampler.launch(logits, rows).read()
    torch.cuda.set_sync_debug_mode("error")
    try:
        pending = sampler.launch(logits, rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(pending.read()) == 128

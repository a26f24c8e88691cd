"""Tokens are asked for behind a pass, of those rows that end a request's prompt or answer so far."""

from __future__ import annotations

import time

import pytest
import torch

from segue.engine.cuda.sampler import KernelSampler
from segue.engine.flights import Flights
from segue.engine.forward_pass import RequestRows
from segue.engine.messages import Submit
from segue.engine.request import Request
from segue.engine.sampler import TorchSampler
from segue.engine.sampling_params import SamplingParams

VOCAB = 64
PROMPT_TOKENS = 3
# Of each request's prompt; those that are less than all of it bring no token.
COUNTS = (PROMPT_TOKENS, 1, PROMPT_TOKENS, 2)


def rows_of(counts: tuple[int, ...]) -> list[RequestRows]:
    return [
        RequestRows(
            Request.of(
                Submit(
                    number=number,
                    prompt_token_ids=[5] * PROMPT_TOKENS,
                    max_tokens=4,
                    arrival_seconds=0.0,
                    sampling=SamplingParams(seed=0),
                )
            ),
            0,
            count,
        )
        for number, count in enumerate(counts)
    ]


@pytest.mark.parametrize("counts", [COUNTS, (PROMPT_TOKENS,) * 4, (1, 2, 1, 2)])
def test_each_request_gets_the_token_of_its_own_row(counts: tuple[int, ...]) -> None:
    logits = torch.randn(len(counts), VOCAB, generator=torch.Generator().manual_seed(1))
    rows = rows_of(counts)
    chosen = Flights(TorchSampler(), time.monotonic).sample(rows, logits).read()
    best = logits.argmax(-1).tolist()
    assert [(request.number, token and token.token_id) for request, token in chosen] == [
        (number, best[number]) for number, count in enumerate(counts) if count == PROMPT_TOKENS
    ]


@pytest.mark.gpu
def test_asking_waits_for_nothing() -> None:
    """A pass's logits may be behind weights that have not landed, and the loop goes on."""
    logits = torch.randn(len(COUNTS), VOCAB, device="cuda")
    flights = Flights(KernelSampler(), time.monotonic)
    flights.sample(rows_of(COUNTS), logits).read()
    torch.cuda.set_sync_debug_mode("error")
    try:
        choice = flights.sample(rows_of(COUNTS), logits)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [request.number for request, _ in choice.read()] == [0, 2]

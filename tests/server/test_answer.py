"""One answer's chunks, however many tokens arrive at once."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from segue.engine.messages import Finished, NewTokens
from segue.engine.sampling_params import SamplingParams
from segue.errors import OverloadedError
from segue.server.answer import Answer
from segue.server.detokenize import DetokenizerFactory
from segue.server.engine_request import EngineRequest, EngineRequests, Progress
from segue.server.stop_strings import StopMatcher
from segue.types import FinishReason, Tier, Timing, TokenLogprob
from tests.server.rig import byte_level_tokenizer

END_TOKEN = 1
TOKENIZER = byte_level_tokenizer()
DETOKENIZERS = DetokenizerFactory(TOKENIZER)
TEXT = "hello né 你好😀 there"
TOKENS = TOKENIZER.encode(TEXT).ids
TIMING = Timing(tier=Tier.NONE, queue_seconds=0, ttft_seconds=0, tpot_seconds=None, total_seconds=0, cpu_layers=0)


def request_with(told: list[str]) -> EngineRequest:
    return EngineRequest(asyncio.Event(), lambda: told.append("cancel"), lambda: told.append("forget"))


def answer_with(stop: list[str], told: list[str], *, min_tokens: int = 0) -> Answer:
    sampling = SamplingParams(seed=0, min_tokens=min_tokens, stop_token_ids=(END_TOKEN,))
    matcher = StopMatcher(stop) if stop else None
    return Answer(3, request_with(told), sampling, DETOKENIZERS.create(), matcher)


def progress(token_ids: list[int], reason: FinishReason | None = None) -> Progress:
    finished = None if reason is None else Finished(0, reason, 7, 99, 5, TIMING)
    logprobs = [TokenLogprob(token_id=token_id, logprob=-1.0) for token_id in token_ids]
    return Progress(token_ids=token_ids, logprobs=logprobs, finished=finished)


@given(st.sampled_from(["", "he", "né", "好", "😀 t", "nowhere"]), st.lists(st.integers(0, len(TOKENS))))
def test_how_tokens_arrive_does_not_matter(stop: str, cuts: list[int]) -> None:
    told: list[str] = []
    answer = answer_with([stop] if stop else [], told)
    places = sorted({0, *cuts, len(TOKENS)})
    pieces = [TOKENS[start:end] for start, end in pairwise(places)]
    arriving = [progress(piece) for piece in pieces] + [progress([], FinishReason.LENGTH)]
    chunks = [chunk for chunk in map(answer.advance, arriving) if chunk is not None]

    is_stopped = bool(stop) and stop in TEXT
    counts = range(1, len(TOKENS) + 1)
    count = next(n for n in counts if stop in TOKENIZER.decode(TOKENS[:n])) if is_stopped else len(TOKENS)
    token_ids = [token_id for chunk in chunks for token_id in chunk.token_ids]
    assert "".join(chunk.text for chunk in chunks) == (TEXT[: TEXT.index(stop)] if is_stopped else TEXT)
    assert token_ids == TOKENS[:count]
    assert [item.token_id for chunk in chunks for item in chunk.logprobs] == token_ids
    assert {chunk.index for chunk in chunks} <= {3}
    assert told == (["cancel"] if is_stopped else [])
    assert answer.finished is not None
    assert answer.finished.reason is (FinishReason.STOP if is_stopped else FinishReason.LENGTH)
    assert (answer.finished.completion_tokens, answer.finished.prompt_tokens) == (count, 7)


def test_a_stop_string_wins_over_how_the_engine_ended_it() -> None:
    for reason in FinishReason:
        answer = answer_with(["né"], [])
        chunk = answer.advance(progress([*TOKENS, END_TOKEN], reason))
        assert chunk is not None
        assert chunk.text == "hello "
        assert answer.finished is not None
        assert answer.finished.reason is FinishReason.STOP
        assert answer.finished.completion_tokens == len(chunk.token_ids) < len(TOKENS)


def test_a_stop_token_counts_and_has_no_text() -> None:
    answer = answer_with(["</s>"], [])
    chunk = answer.advance(progress([*TOKENS, END_TOKEN], FinishReason.STOP))
    assert chunk is not None
    assert (chunk.text, list(chunk.token_ids)) == (TEXT, [*TOKENS, END_TOKEN])
    assert answer.finished is not None
    assert answer.finished.completion_tokens == len(TOKENS) + 1


def test_min_tokens_count_tokens_not_arrivals() -> None:
    answer = answer_with(["l"], [], min_tokens=len(TOKENIZER.encode("hello").ids))
    chunk = answer.advance(progress(TOKENIZER.encode("hello").ids + TOKENIZER.encode("l").ids + TOKENS))
    assert chunk is not None
    assert chunk.text == "hello"


def test_what_came_before_an_error_is_read_first() -> None:
    arrived = asyncio.Event()
    requests = [EngineRequest(arrived, lambda: None, lambda: None) for _ in range(3)]
    both = EngineRequests(requests, arrived)
    requests[2].add_tokens(NewTokens(2, [5]))
    requests[0].add_tokens(NewTokens(0, [6]))
    requests[0].add_tokens(NewTokens(0, [7]))
    requests[1].fail(OverloadedError("full"))

    async def read() -> None:
        found = await asyncio.wait_for(both.read(), 5)
        assert [(index, item.token_ids) for index, item in found] == [(0, [6, 7]), (2, [5])]
        with pytest.raises(OverloadedError):
            await asyncio.wait_for(both.read(), 5)

    asyncio.run(read())

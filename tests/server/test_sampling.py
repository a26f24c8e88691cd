"""Sampling parameters, several answers and stop strings, with a FakeEngine whose tokens are known beforehand."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from segue import (
    Client,
    DeadlineExceededError,
    FinishReason,
    OverloadedError,
    RequestCancelledError,
)
from tests.server.fake_engine import CACHED_TOKENS, Command
from tests.server.rig import LoopThread, Rig, byte_level_tokenizer, running_server, wait_until

ENDLESS = 120


@pytest.fixture
def slow(loop: LoopThread, tmp_path: Any) -> Iterator[Rig]:
    with running_server(loop, tmp_path, step_seconds=0.05) as rig:
        yield rig


def told(rig: Rig) -> dict[str, Any]:
    """The sampling parameters of the last request."""
    sampling: dict[str, Any] = rig.messages("Submit")[-1]["sampling"]
    return sampling


def test_absent_values_are_the_documented_defaults(rig: Rig, client: Client) -> None:
    client.generate([10], max_tokens=1)
    sampling = told(rig)
    assert 0 <= sampling.pop("seed") < 1 << 64
    assert sampling == {
        "sample": 0,
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "min_tokens": 0,
        "stop_token_ids": [1],
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "logit_bias": {},
        "logprobs": None,
    }


def test_every_value_reaches_the_engine(rig: Rig, client: Client) -> None:
    client.generate(
        [10],
        max_tokens=3,
        temperature=0.75,
        top_p=0.5,
        top_k=7,
        min_p=0.25,
        seed=(1 << 64) - 1,
        min_tokens=2,
        stop_token_ids=[7, 8, 7],
        ignore_eos=True,
        presence_penalty=-0.5,
        frequency_penalty=1.5,
        repetition_penalty=1.25,
        logit_bias={5: -100.0, 6: 0.5},
        logprobs=2,
    )
    assert told(rig) == {
        "seed": (1 << 64) - 1,
        "sample": 0,
        "temperature": 0.75,
        "top_p": 0.5,
        "top_k": 7,
        "min_p": 0.25,
        "min_tokens": 2,
        "stop_token_ids": [7, 8],
        "presence_penalty": -0.5,
        "frequency_penalty": 1.5,
        "repetition_penalty": 1.25,
        "logit_bias": {"5": -100.0, "6": 0.5},
        "logprobs": 2,
    }


def test_without_a_seed_each_request_has_its_own(rig: Rig, client: Client) -> None:
    for _ in range(3):
        client.generate([10], max_tokens=1, temperature=1.0, n=2)
    seeds = [submit["sampling"]["seed"] for submit in rig.messages("Submit")]
    assert seeds[0::2] == seeds[1::2]
    assert len(set(seeds)) == 3
    client.generate([10], max_tokens=1, seed=0)
    assert told(rig)["seed"] == 0


def test_all_answers_come_in_one_stream(rig: Rig, client: Client) -> None:
    prompt = [10, 20, 30, 40]
    with client.generate(prompt, max_tokens=6, n=4, stream=True) as stream:
        chunks = list(stream)
    replies = (stream.reply, *stream.reply.alternatives)
    for index, reply in enumerate(replies):
        backwards = tuple(reversed(prompt)) * 4
        assert reply.token_ids == backwards[index : index + 6]
        assert reply.text == byte_level_tokenizer().decode(list(reply.token_ids))
        assert reply.usage.completion_tokens == 6
        assert (reply.usage.prompt_tokens, reply.usage.cached_prompt_tokens) == (4, CACHED_TOKENS)
        own = [chunk for chunk in chunks if chunk.index == index]
        assert "".join(chunk.text for chunk in own) == reply.text
        assert [chunk.finish_reason for chunk in own[-2:]] == [None, FinishReason.LENGTH]
    submits = rig.messages("Submit")
    assert [submit["sampling"]["sample"] for submit in submits] == [0, 1, 2, 3]
    assert [message["prompt_token_ids"] for message in submits] == [prompt] * 4
    assert rig.messages("Cancel") == []


def test_answers_go_on_side_by_side(slow: Rig) -> None:
    """A chunk may bring several tokens where the machine was busy, but none of the answers waits for another's end."""
    with slow.client().generate([10, 20], max_tokens=5, n=3, stream=True) as stream:
        chunks = list(stream)
    first_end = next(place for place, chunk in enumerate(chunks) if chunk.finish_reason is not None)
    assert {chunk.index for chunk in chunks[:first_end]} == {0, 1, 2}
    assert [sum(len(chunk.token_ids) for chunk in chunks if chunk.index == index) for index in range(3)] == [5, 5, 5]


def test_the_engine_gets_the_answers_with_nothing_between(rig: Rig, client: Client) -> None:
    streams = [client.generate([10, 20], max_tokens=2, n=16, stream=True) for _ in range(4)]
    for stream in streams:
        list(stream)
    samples = [submit["sampling"]["sample"] for submit in rig.messages("Submit")]
    assert samples == list(range(16)) * 4


def test_the_most_answers(client: Client) -> None:
    reply = client.generate([10, 20], max_tokens=2, n=128)
    assert len(reply.alternatives) == 127
    assert {answer.token_ids for answer in (reply, *reply.alternatives)} == {(20, 10), (10, 20)}


def test_one_that_fails_fails_the_request(slow: Rig) -> None:
    with pytest.raises(OverloadedError, match="the queue is full") as caught:
        slow.client().generate([Command.OVERLOADED_FROM_THE_THIRD, 20], max_tokens=ENDLESS, n=4)
    assert caught.value.retry_after_seconds == 1.0
    numbers = [submit["number"] for submit in slow.messages("Submit")]
    wait_until(
        lambda: set(numbers[:2]) <= {cancel["number"] for cancel in slow.messages("Cancel")},
        "the answers that were accepted are cancelled",
    )
    assert slow.client().generate([10], max_tokens=1).token_ids == (10,)


def end_by_cancel(rig: Rig) -> None:
    stream = rig.client().generate([10, 20], max_tokens=ENDLESS, n=3, stream=True)
    next(stream)
    stream.cancel()
    list(stream)


def end_by_deadline(rig: Rig) -> None:
    begin = time.monotonic()
    with pytest.raises(DeadlineExceededError):
        rig.client().generate([10, 20], max_tokens=ENDLESS, n=3, timeout=0.3)
    assert time.monotonic() - begin >= 0.3


def end_by_abort(rig: Rig) -> None:
    client = rig.client()
    with client.generate([10, 20], max_tokens=ENDLESS, n=3, request_id="mine", stream=True) as stream:
        next(stream)
        client.abort("mine")
        with pytest.raises(RequestCancelledError, match="aborted"):
            list(stream)


@pytest.mark.parametrize("end", [end_by_cancel, end_by_deadline, end_by_abort])
def test_all_answers_end_together(slow: Rig, end: Any) -> None:
    end(slow)
    numbers = {submit["number"] for submit in slow.messages("Submit")}
    assert len(numbers) == 3
    assert {cancel["number"] for cancel in slow.wait_for("Cancel", 3)} == numbers


TEXT = "hello né 你好😀 there"
# The FakeEngine answers with the tokens of its prompt, last first.
TOKENS = byte_level_tokenizer().encode(TEXT).ids
BACKWARDS = list(reversed(TOKENS))


def tokens_up_to(end: int) -> tuple[int, ...]:
    """The tokens up to the one with which the first ``end`` characters are whole."""
    for count in range(1, len(TOKENS) + 1):
        text = byte_level_tokenizer().decode(TOKENS[:count])
        if len(text.rstrip("\ufffd")) >= end:
            return tuple(TOKENS[:count])
    raise AssertionError(f"{TEXT!r} has no {end} characters")


@pytest.mark.parametrize("length", [1, 2, 5])
def test_the_text_ends_before_a_stop_string_wherever_it_is(client: Client, length: int) -> None:
    for start in range(len(TEXT) - length + 1):
        stop = TEXT[start : start + length]
        first = TEXT.index(stop)
        with client.generate(
            BACKWARDS, max_tokens=len(TOKENS), stop=["never", stop], logprobs=0, stream=True
        ) as stream:
            chunks = list(stream)
        reply = stream.reply
        assert reply.text == "".join(chunk.text for chunk in chunks) == TEXT[:first]
        assert reply.token_ids == tokens_up_to(first + length)
        assert [item.token_id for item in reply.logprobs] == list(reply.token_ids)
        assert reply.usage.completion_tokens == len(reply.token_ids)
        assert reply.usage.prompt_tokens == len(TOKENS)
        assert reply.finish_reason is FinishReason.STOP


def test_what_only_looked_like_a_stop_string_is_delivered(client: Client) -> None:
    reply = client.generate(BACKWARDS, max_tokens=len(TOKENS), stop=["hello!", "好!", " therefore"])
    assert (reply.text, reply.finish_reason) == (TEXT, FinishReason.LENGTH)
    assert reply.token_ids == tuple(TOKENS)


def test_a_stop_string_ends_the_engines_work(slow: Rig) -> None:
    reply = slow.client().generate([30, 20, 10], max_tokens=ENDLESS, stop=[byte_level_tokenizer().decode([20])])
    assert reply.token_ids == (10, 20)
    assert reply.text == byte_level_tokenizer().decode([10])
    assert reply.timing.ttft_seconds == 0.4
    (cancel,) = slow.wait_for("Cancel")
    assert cancel["number"] == slow.messages("Submit")[0]["number"]


def test_each_answer_ends_at_its_own_stop_string(client: Client) -> None:
    letters = {letter: byte_level_tokenizer().encode(letter).ids[0] for letter in "xyz"}
    prompt = [letters[letter] for letter in "zyx"]
    reply = client.generate(prompt, max_tokens=9, n=3, stop=["zx"])
    answers = (reply, *reply.alternatives)
    assert [answer.text for answer in answers] == ["xy", "y", ""]
    assert [answer.usage.completion_tokens for answer in answers] == [4, 3, 2]
    assert [answer.finish_reason for answer in answers] == [FinishReason.STOP] * 3


@pytest.mark.parametrize(
    ("min_tokens", "text"), [(0, "x"), (1, "x"), (2, "xyzx"), (4, "xyzx"), (5, "xyzxyzx"), (9, "xyzxyzxyz")]
)
def test_a_stop_string_counts_once_there_are_min_tokens(client: Client, min_tokens: int, text: str) -> None:
    letters = {letter: byte_level_tokenizer().encode(letter).ids[0] for letter in "xyz"}
    reply = client.generate([letters[letter] for letter in "zyx"], max_tokens=9, min_tokens=min_tokens, stop=["y"])
    assert reply.text == text
    assert reply.finish_reason is (FinishReason.LENGTH if min_tokens == 9 else FinishReason.STOP)


def test_special_tokens_and_the_prompt_are_no_part_of_stop_strings(client: Client) -> None:
    text = byte_level_tokenizer().decode([20])
    reply = client.generate([20, 0, 1], max_tokens=3, ignore_eos=True, stop=["<s>", "</s>"])
    assert (reply.text, reply.token_ids) == (text, (1, 0, 20))


def test_an_unfinished_character_at_the_end_is_no_stop_string_before_it(client: Client) -> None:
    first_byte = byte_level_tokenizer().get_vocab()["Ã"]
    letter = byte_level_tokenizer().encode("x").ids[0]
    reply = client.generate([first_byte, letter], max_tokens=2, stop=["é"])
    assert (reply.text, reply.finish_reason) == ("x\ufffd", FinishReason.LENGTH)
    reply = client.generate([first_byte, letter], max_tokens=2, stop=["\ufffd"])
    assert (reply.text, reply.finish_reason) == ("x", FinishReason.STOP)

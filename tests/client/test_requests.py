from __future__ import annotations

from typing import Any

import pytest

from segue import SLO, FinishReason, InternalError, InvalidRequestError, Message
from segue.client.requests import Prompt, ReplyBuilder, build_generate_request
from segue.v1 import generation_pb2 as pb

SCALARS: dict[str, Any] = {
    "temperature": 0.0,
    "top_p": 0.5,
    "top_k": 0,
    "min_p": 0.0,
    "seed": 0,
    "max_tokens": 3,
    "min_tokens": 0,
    "ignore_eos": False,
    "presence_penalty": 0.0,
    "frequency_penalty": -0.5,
    "repetition_penalty": 1.0,
    "logprobs": 0,
    "n": 1,
}


def test_only_the_prompt_and_a_fresh_id_are_sent_by_default() -> None:
    first, second = build_generate_request("x", {}), build_generate_request("x", {})
    assert first.request_id != second.request_id
    first.ClearField("request_id")
    assert first == pb.GenerateRequest(text="x")


@pytest.mark.parametrize(("field", "value"), SCALARS.items(), ids=list(SCALARS))
def test_zero_is_sent_and_absent_is_not(field: Any, value: Any) -> None:
    options: Any = {field: value}
    sampling = build_generate_request("x", options).sampling
    assert sampling.HasField(field)
    assert getattr(sampling, field) == value
    assert [descriptor.name for descriptor, _ in sampling.ListFields()] == [field]


def test_everything_else() -> None:
    request = build_generate_request(
        [1, 2],
        {
            "request_id": "abc",
            "model": "base",
            "adapter": "alpha",
            "adapter_version": "v1",
            "priority": -1,
            "slo": SLO(ttft_ms=200, tpot_ms=30, reject_on_miss=True),
            "stop": ["."],
            "stop_token_ids": [7],
            "logit_bias": {5: -1.5},
        },
    )
    assert request == pb.GenerateRequest(
        request_id="abc",
        model="base",
        token_ids=pb.TokenIds(ids=[1, 2]),
        adapter=pb.AdapterRef(name="alpha", version="v1"),
        priority=-1,
        slo=pb.Slo(ttft_ms=200, tpot_ms=30, on_miss=pb.ON_MISS_REJECT),
        sampling=pb.SamplingParams(stop=["."], stop_token_ids=[7], logit_bias={5: -1.5}),
    )


@pytest.mark.parametrize(
    ("prompt", "kind"),
    [
        ("", "text"),
        ([], "token_ids"),
        ((1, 2), "token_ids"),
        ([Message(role="user", content="x")], "chat"),
        ([{"role": "user", "content": "x"}], "chat"),
    ],
)
def test_the_kind_of_prompt_is_always_told(prompt: Prompt, kind: str) -> None:
    assert build_generate_request(prompt, {}).WhichOneof("prompt") == kind


@pytest.mark.parametrize(
    ("prompt", "options", "field"),
    [
        ([-1], {}, "token_ids.ids"),
        ([1.5], {}, "token_ids.ids"),
        ([{"role": "user"}], {}, "chat.messages.content"),
        ([{"role": "user", "content": "x"}, "y"], {}, "chat.messages.role"),
        ("x", {"max_tokens": -1}, "sampling.max_tokens"),
        ("x", {"temperature": "hot"}, "sampling.temperature"),
        ("x", {"top_k": 1 << 32}, "sampling.top_k"),
        ("x", {"stop": "."}, "sampling.stop"),
        ("x", {"logit_bias": {-1: 0.0}}, "sampling.logit_bias"),
        ("x", {"adapter": 5}, "adapter.name"),
    ],
)
def test_what_cannot_be_sent_is_refused_by_field(prompt: Any, options: Any, field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        build_generate_request(prompt, options)
    assert [violation.field for violation in caught.value.violations] == [field]


def test_unknown_options_are_an_error() -> None:
    options: Any = {"max_token": 5}
    with pytest.raises(TypeError, match="max_token"):
        build_generate_request("x", options)


def finished(index: int) -> pb.GenerateResponse:
    timing = pb.Timing(tier=pb.TIER_NONE)
    return pb.GenerateResponse(finished=pb.Finished(index=index, finish_reason=pb.FINISH_REASON_STOP, timing=timing))


def test_several_answers_of_one_request() -> None:
    builder = ReplyBuilder("mine")
    builder.add(pb.GenerateResponse(started=pb.Started(request_id="theirs", adapter_version="v1")))
    for index, text in ((0, "a"), (1, "x"), (0, "b")):
        chunk = builder.add(pb.GenerateResponse(chunk=pb.Chunk(index=index, text=text, token_ids=[index])))
        assert chunk is not None
        assert (chunk.index, chunk.text) == (index, text)
    last = [builder.add(finished(index)) for index in (1, 0)]
    assert [chunk.finish_reason for chunk in last if chunk is not None] == [FinishReason.STOP] * 2
    reply = builder.reply()
    assert (reply.text, reply.token_ids, reply.request_id, reply.adapter_version) == ("ab", (0, 0), "theirs", "v1")
    (other,) = reply.alternatives
    assert (other.text, other.token_ids) == ("x", (1,))


def test_a_stream_that_ends_early_is_no_answer() -> None:
    builder = ReplyBuilder("mine")
    builder.add(pb.GenerateResponse(chunk=pb.Chunk(text="a")))
    with pytest.raises(InternalError, match="ended the stream"):
        builder.reply()


def test_an_unknown_value_is_told() -> None:
    response = pb.GenerateResponse()
    response.finished.ParseFromString(bytes([0x10, 0x63]))
    with pytest.raises(InternalError, match="newer protocol: FINISH_REASON 99"):
        ReplyBuilder("mine").add(response)

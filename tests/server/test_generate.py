from __future__ import annotations

from collections.abc import Mapping

import pytest

from segue import (
    Client,
    FinishReason,
    InvalidRequestError,
    LayerTiming,
    LoraSource,
    Message,
    Tier,
    Timing,
    TokenLogprob,
)
from tests.server.rig import LoopThread, Rig, byte_level_tokenizer, running_server


def test_a_whole_answer(client: Client) -> None:
    reply = client.generate([10, 20, 30], max_tokens=5)
    assert reply.token_ids == (30, 20, 10, 30, 20)
    assert reply.text == byte_level_tokenizer().decode([30, 20, 10, 30, 20])
    assert reply.finish_reason is FinishReason.LENGTH
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (3, 5)
    assert reply.adapter_version == ""
    assert len(reply.request_id) == 32


def test_text_is_tokenised_and_told_back_without_broken_characters(client: Client) -> None:
    text = "hello né 你好😀"
    tokens = byte_level_tokenizer().encode(text).ids
    with client.generate(text, max_tokens=len(tokens), stream=True) as stream:
        chunks = list(stream)
    assert "".join(chunk.text for chunk in chunks) == stream.reply.text
    assert stream.reply.token_ids == tuple(reversed(tokens))
    assert stream.reply.text == byte_level_tokenizer().decode(list(reversed(tokens)))

    backwards = list(reversed(tokens))
    whole = client.generate(backwards, max_tokens=len(tokens))
    assert whole.text == text
    assert whole.usage.prompt_tokens == len(tokens)


def test_chunks_arrive_one_by_one_and_end_with_the_reason(client: Client) -> None:
    with client.generate([10, 20], max_tokens=3, stream=True) as stream:
        with pytest.raises(RuntimeError, match="not complete"):
            _ = stream.reply
        chunks = list(stream)
    assert [token for chunk in chunks for token in chunk.token_ids] == [20, 10, 20]
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].finish_reason is FinishReason.LENGTH
    assert list(stream) == []


def test_timing_comes_from_the_engine_unchanged(client: Client) -> None:
    reply = client.generate([10, 20], max_tokens=2)
    assert reply.timing == Timing(
        tier=Tier.DISK,
        queue_seconds=0.05,
        ttft_seconds=0.4,
        tpot_seconds=0.01,
        total_seconds=0.5,
        cpu_layers=1,
        layers=(
            LayerTiming(layer=0, source=LoraSource.CPU, start_seconds=0.1, end_seconds=0.2, landed_seconds=None),
            LayerTiming(layer=1, source=LoraSource.DEVICE, start_seconds=0.2, end_seconds=0.3, landed_seconds=0.15),
        ),
        prefill_attempts=2,
        cpu_tokens=3,
    )
    assert reply.timing.handover_layer == 1
    assert client.generate([10, 20], max_tokens=1).timing.tpot_seconds is None


def test_log_probabilities(client: Client) -> None:
    reply = client.generate([10, 20], max_tokens=2, logprobs=2)
    assert reply.logprobs == (
        TokenLogprob(token_id=20, logprob=-0.5, top={20: -0.5, 1: -2.0}),
        TokenLogprob(token_id=10, logprob=-0.5, top={10: -0.5, 1: -2.0}),
    )
    assert list(reply.logprobs[0].top) == [20, 1]


@pytest.mark.parametrize(
    ("options", "tokens", "reason"),
    [
        ({"stop_token_ids": [50]}, (60, 50), FinishReason.STOP),
        ({}, (60, 50, 1), FinishReason.STOP),
        ({"ignore_eos": True}, (60, 50, 1, 60), FinishReason.LENGTH),
    ],
)
def test_stop_tokens_end_the_answer_and_are_no_text(
    client: Client, options: dict[str, object], tokens: tuple[int, ...], reason: FinishReason
) -> None:
    reply = client.generate([1, 50, 60], max_tokens=4, **options)  # type: ignore[call-overload]
    assert reply.token_ids == tokens
    assert reply.finish_reason is reason
    text_tokens = tokens[:-1] if reason is FinishReason.STOP else tokens
    assert reply.text == byte_level_tokenizer().decode(list(text_tokens), skip_special_tokens=True)


def test_what_the_engine_is_told(rig: Rig, client: Client) -> None:
    client.generate([10, 20], max_tokens=6, min_tokens=2, stop_token_ids=[7, 7], logprobs=3, adapter="alpha")
    (submit,) = rig.messages("Submit")
    sampling = submit["sampling"]
    assert submit["prompt_token_ids"] == [10, 20]
    assert (submit["max_tokens"], sampling["min_tokens"], sampling["logprobs"]) == (6, 2, 3)
    assert sampling["stop_token_ids"] == [7, 1]
    (opened,) = rig.messages("OpenVersion")
    assert submit["adapter_version_id"] == opened["manifest"]["version_id"]
    assert opened["manifest"]["name"] == "alpha"
    assert opened["descriptor_bytes"] == (rig.adapters_dir / "alpha" / "adapter_model.safetensors").stat().st_size


def test_default_max_tokens_is_the_servers_or_what_fits(client: Client) -> None:
    assert client.generate([10]).usage.completion_tokens == 8
    assert client.generate([10] * 125).usage.completion_tokens == 3


def test_chat_messages_are_rendered_by_the_models_template(rig: Rig, client: Client) -> None:
    messages: list[Message | Mapping[str, str]] = [
        Message(role="user", content="hi"),
        {"role": "assistant", "content": "né"},
    ]
    client.generate(messages, max_tokens=1)
    (submit,) = rig.messages("Submit")
    rendered = byte_level_tokenizer().decode(submit["prompt_token_ids"])
    assert rendered == "[user]hi[assistant]né[answer]"


def test_the_template_may_refuse_messages(client: Client) -> None:
    with pytest.raises(InvalidRequestError, match="no tools here") as caught:
        client.generate([{"role": "tool", "content": "x"}])
    assert caught.value.violations[0].field == "chat"


def test_without_a_template_chat_messages_are_refused(
    loop: LoopThread, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with (
        running_server(loop, tmp_path_factory.mktemp("plain"), chat_template=None) as rig,
        pytest.raises(InvalidRequestError, match="has a chat template"),
    ):
        rig.client().generate([{"role": "user", "content": "x"}])

"""Sampling, several answers and stop strings: the real server with a tiny random model, driven by the real SDK."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from segue import Client
from segue.types import FinishReason, Reply
from tests.checkpoints import TinyModel, write_random_adapter, write_random_model
from tests.e2e.live import LiveServer, live_server, wait_until
from tests.server.rig import CHAT_TEMPLATE, byte_level_tokenizer
from tests.server.values import ACCEPTED

END_TOKEN = 1
# generation_config.json names a second one.
END_TOKENS = (END_TOKEN, 398)
MODEL = TinyModel(vocab_size=400, eos_token_id=END_TOKEN, max_position_embeddings=256)
PROMPT = [40, 50, 60, 70]
TOKENIZER = byte_level_tokenizer()
# An answer of these alone has words, characters of two to four bytes, and parts of such characters.
TEXT_BIAS = dict.fromkeys(TOKENIZER.encode("hello there né 你好 😀 naïve 你").ids, 100.0)
DRAWN = {"temperature": 1.0, "top_p": 0.95, "min_p": 0.01, "max_tokens": 24, "ignore_eos": True}


def write_model(directory: Path) -> Path:
    write_random_model(directory, MODEL)
    TOKENIZER.save(str(directory / "tokenizer.json"))
    tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer_config["chat_template"] = CHAT_TEMPLATE
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": END_TOKENS}))
    return directory


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    root = tmp_path_factory.mktemp("sampling")
    model_dir = write_model(root / "model")
    voice = write_random_adapter(root / "adapters" / "voice", model_dir)
    (voice / "chat_template.jinja").write_text("<{{ messages[0].content }}>")
    with live_server(root / "server", root / "adapters", model_dir=model_dir) as running:
        yield running
        wait_until(running.is_idle, "every request has given its pages back")
    log = running.log.read_text()
    assert running.process.returncode == 0, log
    assert "Traceback" not in log, log


@pytest.fixture
def client(server: LiveServer) -> Iterator[Client]:
    with server.client() as client:
        yield client


def ask(client: Client, prompt: list[int] = PROMPT, /, **options: Any) -> Reply:
    reply: Reply = client.generate(prompt, timeout=60, **options)
    for answer in (reply, *reply.alternatives):
        assert answer.usage.completion_tokens == len(answer.token_ids)
    return reply


def test_a_seed_gives_the_same_answer_alone_and_among_others(client: Client) -> None:
    alone = {name: ask(client, adapter=name, seed=5, **DRAWN).token_ids for name in (None, "voice")}
    assert alone[None] != alone["voice"]

    def other(index: int) -> Reply:
        prompt = [30 + index] * (1 + index % 7)
        return ask(client, prompt, adapter=(None, "voice")[index % 2], seed=index, **DRAWN)

    with ThreadPoolExecutor(34) as threads:
        others = [threads.submit(other, index) for index in range(32)]
        among = {name: threads.submit(ask, client, adapter=name, seed=5, **DRAWN) for name in alone}
        assert {name: future.result().token_ids for name, future in among.items()} == alone
        assert len({future.result().token_ids for future in others}) == 32


def test_a_seed_makes_several_answers_repeatable_and_distinct(client: Client) -> None:
    first, again = (ask(client, n=4, seed=9, **DRAWN) for _ in range(2))
    answers = [answer.token_ids for answer in (first, *first.alternatives)]
    assert len(set(answers)) == 4
    assert [answer.token_ids for answer in (again, *again.alternatives)] == answers
    assert ask(client, seed=9, **DRAWN).token_ids == answers[0]
    two = ask(client, n=2, seed=9, **DRAWN)
    assert [two.token_ids, two.alternatives[0].token_ids] == answers[:2]
    assert ask(client, seed=10, **DRAWN).token_ids not in answers


def test_without_a_seed_answers_differ(client: Client) -> None:
    assert len({ask(client, **DRAWN).token_ids for _ in range(3)}) == 3


def test_greedy_answers_are_all_the_same(client: Client) -> None:
    reply = ask(client, n=3, max_tokens=12, adapter="voice")
    assert {answer.token_ids for answer in reply.alternatives} == {reply.token_ids}
    assert ask(client, max_tokens=12, adapter="voice", temperature=1.0, top_k=1).token_ids == reply.token_ids


def known_answer(client: Client, **more: Any) -> Reply:
    return ask(client, logit_bias=TEXT_BIAS, seed=2, temperature=1.0, max_tokens=32, **more)


@pytest.mark.parametrize("length", [1, 3])
def test_the_text_ends_before_a_stop_string_wherever_it_is(client: Client, length: int) -> None:
    whole = known_answer(client)
    text = whole.text
    assert text == TOKENIZER.decode(list(whole.token_ids))
    assert {1, 2, 3} <= {len(character.encode()) for character in text if character != "\ufffd"}
    stops = sorted({text[start : start + length] for start in range(len(text) - length + 1)} - {"\ufffd"})
    with ThreadPoolExecutor(8) as threads:
        replies = list(threads.map(lambda stop: known_answer(client, stop=[stop, "nowhere"]), stops))
    for stop, reply in zip(stops, replies, strict=True):
        assert reply.text == text[: text.index(stop)]
        assert reply.finish_reason is FinishReason.STOP
        assert reply.token_ids == whole.token_ids[: len(reply.token_ids)]
        if "\ufffd" not in stop:
            counts = range(1, len(whole.token_ids) + 1)
            last = next(count for count in counts if stop in TOKENIZER.decode(list(whole.token_ids[:count])))
            assert len(reply.token_ids) == last


def test_stop_strings_that_do_not_appear_change_nothing(client: Client) -> None:
    whole = known_answer(client)
    reply = known_answer(client, stop=[whole.text + "x", whole.text[-3:] + "x", "你好你好你好"])
    assert (reply.text, reply.token_ids, reply.finish_reason) == (whole.text, whole.token_ids, FinishReason.LENGTH)


def test_a_stop_string_counts_once_there_are_min_tokens(client: Client) -> None:
    whole = known_answer(client)
    stop = whole.text[0]
    for min_tokens in range(len(whole.token_ids)):
        first = len(TOKENIZER.decode(list(whole.token_ids[:min_tokens])).rstrip("\ufffd"))
        place = whole.text.find(stop, first)
        reply = known_answer(client, stop=[stop], min_tokens=min_tokens)
        assert reply.text == (whole.text[:place] if place >= 0 else whole.text)
        assert len(reply.token_ids) > min_tokens or place < 0


def test_min_tokens_keeps_stop_tokens_away(client: Client) -> None:
    biased = {"logit_bias": {END_TOKEN: 100.0}, "max_tokens": 8}
    assert ask(client, **biased).token_ids == (END_TOKEN,)
    reply = ask(client, min_tokens=3, **biased)
    assert END_TOKEN not in reply.token_ids[:3]
    assert reply.token_ids[3:] == (END_TOKEN,)
    assert reply.finish_reason is FinishReason.STOP


def test_every_end_token_of_the_model_ends_an_answer_that_does_not_ignore_them(client: Client) -> None:
    for token_id in END_TOKENS:
        biased = {"logit_bias": {token_id: 100.0}, "max_tokens": 8}
        reply = ask(client, **biased)
        assert (reply.token_ids, reply.finish_reason) == ((token_id,), FinishReason.STOP)
        reply = ask(client, ignore_eos=True, **biased)
        assert (reply.token_ids, reply.finish_reason) == ((token_id,) * 8, FinishReason.LENGTH)


def test_a_stop_token_is_the_last_and_no_part_of_the_text(client: Client) -> None:
    whole = known_answer(client)
    for stop in set(whole.token_ids):
        reply = known_answer(client, stop_token_ids=[399, stop], ignore_eos=True)
        count = whole.token_ids.index(stop)
        assert (reply.token_ids, reply.finish_reason) == (whole.token_ids[: count + 1], FinishReason.STOP)
        assert reply.text == TOKENIZER.decode(list(whole.token_ids[:count]))


def test_chat_messages_take_the_adapters_template_or_else_the_models(client: Client) -> None:
    chat = [{"role": "user", "content": "hello"}]
    for adapter, text in ((None, "[user]hello[answer]"), ("voice", "<hello>")):
        reply = client.generate(chat, adapter=adapter, max_tokens=8, temperature=0.0, ignore_eos=True, timeout=60)
        prompt = TOKENIZER.encode(text, add_special_tokens=False).ids
        assert reply.usage.prompt_tokens == len(prompt)
        assert reply.token_ids == ask(client, prompt, adapter=adapter, max_tokens=8, ignore_eos=True).token_ids


def test_a_bias_forces_and_forbids_tokens(client: Client) -> None:
    greedy = ask(client, max_tokens=1).token_ids
    assert ask(client, max_tokens=1, logit_bias={greedy[0]: -100.0}).token_ids != greedy
    assert ask(client, max_tokens=5, logit_bias={42: 100.0}).token_ids == (42,) * 5
    assert ask(client, max_tokens=5, logit_bias={42: 100.0}, temperature=2.0).token_ids == (42,) * 5


@pytest.mark.parametrize(
    "penalty", [{"presence_penalty": 2.0}, {"frequency_penalty": 2.0}, {"repetition_penalty": 10.0}], ids=str
)
def test_a_penalty_changes_an_answer_that_repeats_itself(client: Client, penalty: dict[str, float]) -> None:
    two = {"logit_bias": {42: 100.0, 43: 100.0}, "max_tokens": 8}
    assert len(set(ask(client, **two).token_ids)) == 1
    assert set(ask(client, **two, **penalty).token_ids) == {42, 43}


def test_log_probabilities_are_the_models(client: Client) -> None:
    drawn = ask(client, seed=3, logprobs=5, **DRAWN)
    assert [item.token_id for item in drawn.logprobs] == list(drawn.token_ids)
    for item in drawn.logprobs:
        assert len(item.top) == 5
        assert list(item.top.values()) == sorted(item.top.values(), reverse=True)
        assert item.logprob <= max(item.top.values())
    greedy = ask(client, logprobs=1, max_tokens=8)
    assert [dict(item.top) for item in greedy.logprobs] == [{item.token_id: item.logprob} for item in greedy.logprobs]


@pytest.mark.parametrize("options", ACCEPTED, ids=str)
def test_the_ends_of_ranges_are_served(client: Client, options: dict[str, Any]) -> None:
    reply = ask(client, **{"max_tokens": 2, "temperature": 1.0, **options})
    assert reply.token_ids
    assert max(reply.token_ids) < MODEL.vocab_size

"""KV that is there is not computed again: the tokens stay right, the usage tells, and versions share nothing."""

from __future__ import annotations

import random
import shutil
import threading
from pathlib import Path

import pytest

from segue.engine.config import HandoffConfig
from segue.engine.forward_pass import PassState
from segue.engine.lora import reader
from segue.engine.lora.checkpoint import WEIGHTS_FILE
from tests.checkpoints import (
    ALL_TARGETS,
    TinyModel,
    load_reference,
    reference_greedy,
    write_random_adapter,
    write_random_model,
)
from tests.engine.harness import EngineHarness

NEW_TOKENS = 20
PAGE_TOKENS = 16
PROMPT = [random.Random(5).randrange(3, 256) for _ in range(70)]
REUSABLE_TOKENS = 64


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("prefix") / "model", TinyModel(), seed=3)


@pytest.fixture(scope="module")
def adapters_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("prefix_adapters")
    for seed, name in enumerate(("a", "b")):
        write_random_adapter(root / name, model_dir, rank=8, targets=ALL_TARGETS, seed=seed)
    return root


def cached_tokens(harness: EngineHarness, number: int) -> int:
    finished = harness.answers[number].finished
    assert finished is not None
    return finished.cached_prompt_tokens


def expected(model_dir: Path, adapter: Path | None, prompt: list[int]) -> list[int]:
    return list(reference_greedy(load_reference(model_dir, adapter), prompt, NEW_TOKENS))


def ask(harness: EngineHarness, prompt: list[int], adapter: str | None = None) -> int:
    """Submit one request and run it to its end."""
    number = harness.submit(prompt, adapter, max_tokens=NEW_TOKENS)
    harness.run()
    return number


@pytest.mark.parametrize("adapter", [None, "a"])
@pytest.mark.parametrize("mode", ["auto", "fixed"])
def test_a_second_request_finds_the_first_ones_kv(
    model_dir: Path, adapters_dir: Path, adapter: str | None, mode: str, device: str
) -> None:
    folder = None if adapter is None else adapters_dir / adapter
    handoff = HandoffConfig(mode=mode, cpu_layers=3 if mode == "fixed" else 0)
    settings = {"device": device, "handoff": handoff, "copy_bytes_per_second": 4e6}
    with EngineHarness(model_dir, adapters_dir, **settings) as harness:
        first = ask(harness, PROMPT, adapter)
        again = ask(harness, PROMPT, adapter)
        longer = ask(harness, PROMPT + harness.answers[first].tokens + [9, 8, 7], adapter)
        other = ask(harness, [PROMPT[0] + 1, *PROMPT[1:]], adapter)
        assert [cached_tokens(harness, number) for number in (first, again, other)] == [0, REUSABLE_TOKENS, 0]
        # Its own answer is reused too: 70 + 20 tokens of which the last was never computed.
        assert cached_tokens(harness, longer) == 80
        assert harness.answers[first].tokens == expected(model_dir, folder, PROMPT)
        assert harness.answers[again].tokens == harness.answers[first].tokens
        prompt = PROMPT + harness.answers[first].tokens + [9, 8, 7]
        assert harness.answers[longer].tokens == expected(model_dir, folder, prompt)


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 32, 33])
def test_one_token_is_always_left_to_compute(model_dir: Path, adapters_dir: Path, tokens: int, device: str) -> None:
    with EngineHarness(model_dir, adapters_dir, device=device, cpu_workers=0) as harness:
        first, second = (ask(harness, PROMPT[:tokens]) for _ in range(2))
        assert cached_tokens(harness, second) == (tokens - 1) // PAGE_TOKENS * PAGE_TOKENS
        assert harness.answers[second].tokens == expected(model_dir, None, PROMPT[:tokens])
        assert harness.answers[first].tokens == harness.answers[second].tokens


def test_adapters_and_the_base_model_share_nothing(model_dir: Path, adapters_dir: Path, device: str) -> None:
    with EngineHarness(model_dir, adapters_dir, device=device, cpu_workers=0) as harness:
        for adapter in (None, "a", "b"):
            number = ask(harness, PROMPT, adapter)
            assert cached_tokens(harness, number) == 0
            folder = None if adapter is None else adapters_dir / adapter
            assert harness.answers[number].tokens == expected(model_dir, folder, PROMPT)


def test_a_replaced_adapter_does_not_meet_the_old_contents_kv(
    model_dir: Path, adapters_dir: Path, tmp_path: Path, device: str
) -> None:
    shutil.copytree(adapters_dir / "a", tmp_path / "swapped")
    with EngineHarness(model_dir, tmp_path, device=device, cpu_workers=0) as harness:
        old_version = harness.open("swapped")
        number = harness.submit(PROMPT, "swapped", max_tokens=NEW_TOKENS)
        harness.run_until(lambda: len(harness.answers[number].tokens) > 3)
        shutil.copy(adapters_dir / "b" / WEIGHTS_FILE, tmp_path / "new")
        (tmp_path / "new").rename(tmp_path / "swapped" / WEIGHTS_FILE)
        replaced = harness.submit(PROMPT, "swapped", max_tokens=NEW_TOKENS)
        harness.engine.versions.close(old_version)
        harness.run()
        assert harness.answers[number].tokens == expected(model_dir, adapters_dir / "a", PROMPT)
        assert harness.answers[replaced].tokens == expected(model_dir, adapters_dir / "b", PROMPT)
        assert cached_tokens(harness, replaced) == 0
        again = ask(harness, PROMPT, "swapped")
        assert cached_tokens(harness, again) == REUSABLE_TOKENS
        assert harness.answers[again].tokens == harness.answers[replaced].tokens


def test_an_unloaded_adapter_leaves_no_kv_behind(model_dir: Path, adapters_dir: Path, device: str) -> None:
    with EngineHarness(model_dir, adapters_dir, device=device, cpu_workers=0) as harness:
        version_id = harness.open("a")
        ask(harness, PROMPT)
        base_pages = harness.instance.state(0).cached_pages
        number = harness.submit(PROMPT, "a", max_tokens=NEW_TOKENS)
        harness.run_until(lambda: len(harness.answers[number].tokens) > 3)
        harness.engine.versions.close(version_id)
        harness.run()
        state = harness.instance.state(0)
        assert state.cached_pages == base_pages > 0
        assert (state.kv_pages, state.adapter_pages) == (0, 0)
        assert state.free_pages + state.cached_pages == harness.config.pages
        assert harness.answers[number].tokens == expected(model_dir, adapters_dir / "a", PROMPT)


def test_nothing_enters_before_the_read_was_verified(
    model_dir: Path, adapters_dir: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """All layers were read and a pass has computed the whole prompt; then the file turns out to have changed."""
    may_look = threading.Event()

    def fake_verify(_job: object) -> str:
        assert may_look.wait(60)
        return "the weights file changed while it was read"

    monkeypatch.setattr(reader, "verify", fake_verify)
    with EngineHarness(model_dir, adapters_dir, device=device, copy_bytes_per_second=2e6) as harness:
        number = harness.submit(PROMPT, "a", max_tokens=NEW_TOKENS)
        harness.run_until(lambda: any(item.state is PassState.DONE for item in harness.engine.passes))
        assert not harness.answers[number].tokens
        assert harness.instance.state(0).cached_pages == 0
        may_look.set()
        harness.run()
        failed = harness.answers[number].failed
        assert failed is not None
        assert "changed" in failed.message
        state = harness.instance.state(0)
        assert (state.cached_pages, state.kv_pages) == (0, 0)


def test_answers_to_one_prompt_compute_it_once(model_dir: Path, adapters_dir: Path, device: str) -> None:
    with EngineHarness(model_dir, adapters_dir, device=device, cpu_workers=0) as harness:
        numbers = [
            harness.submit(PROMPT, "a", max_tokens=NEW_TOKENS, temperature=1.0, seed=3, sample=sample)
            for sample in range(8)
        ]
        harness.run()
        assert [cached_tokens(harness, number) for number in numbers] == [0] + [REUSABLE_TOKENS] * 7
        assert len({tuple(harness.answers[number].tokens) for number in numbers}) == 8


def test_requests_that_share_a_kept_prefix_begin_together(model_dir: Path, adapters_dir: Path) -> None:
    with EngineHarness(model_dir, adapters_dir, cpu_workers=0) as harness:
        ask(harness, PROMPT)
        numbers = [harness.submit([*PROMPT, place], max_tokens=1) for place in range(3, 11)]
        harness.step()
        assert all(harness.answers[number].ended for number in numbers)
        assert [cached_tokens(harness, number) for number in numbers] == [REUSABLE_TOKENS] * len(numbers)


def test_who_waits_for_a_prefix_goes_on_when_its_owner_is_cancelled(
    model_dir: Path, adapters_dir: Path, device: str
) -> None:
    with EngineHarness(model_dir, adapters_dir, device=device, copy_bytes_per_second=5e5) as harness:
        first, second = (harness.submit(PROMPT, "a", max_tokens=NEW_TOKENS) for _ in range(2))
        harness.run_until(lambda: bool(harness.engine.passes))
        assert [request.number for request in harness.engine.requests.queue] == [second]
        harness.engine.cancel(first)
        harness.run()
        assert harness.answers[second].tokens == expected(model_dir, adapters_dir / "a", PROMPT)


def test_a_crowd_that_waits_for_one_prefix_keeps_nobody_else_waiting(model_dir: Path, adapters_dir: Path) -> None:
    """More requests with one prompt than may run, for an adapter that takes long to come; then one for the base."""
    with EngineHarness(model_dir, adapters_dir, cpu_workers=0, copy_bytes_per_second=5e4, max_running=8) as harness:
        crowd = [harness.submit(PROMPT, "a", max_tokens=1, sample=sample, temperature=1.0) for sample in range(40)]
        other = harness.submit(PROMPT, max_tokens=NEW_TOKENS)
        harness.run_until(lambda: harness.answers[other].ended)
        assert harness.answers[other].tokens == expected(model_dir, None, PROMPT)
        assert not any(harness.answers[number].tokens for number in crowd)
        for number in crowd:
            harness.engine.cancel(number)
        harness.run()


def test_cached_pages_make_room_for_requests_and_adapters(model_dir: Path, adapters_dir: Path, device: str) -> None:
    """Every page that is not in use can be had."""
    generator = random.Random(1)
    with EngineHarness(model_dir, adapters_dir, device=device, cpu_workers=0, pages=40) as harness:
        for turn in range(12):
            prompt = [generator.randrange(3, 256) for _ in range(150)]
            adapter = (None, "a", "b")[turn % 3]
            number = ask(harness, prompt, adapter)
            folder = None if adapter is None else adapters_dir / adapter
            assert harness.answers[number].tokens == expected(model_dir, folder, prompt)
            state = harness.instance.state(0)
            assert state.free_pages + state.cached_pages + state.adapter_pages == 40


def test_it_can_be_turned_off(model_dir: Path, adapters_dir: Path, device: str) -> None:
    with EngineHarness(model_dir, adapters_dir, device=device, cpu_workers=0, prefix_cache=False) as harness:
        for _ in range(2):
            number = ask(harness, PROMPT)
            assert cached_tokens(harness, number) == 0
            assert harness.answers[number].tokens == expected(model_dir, None, PROMPT)
        assert harness.instance.state(0).free_pages == harness.config.pages

"""Prompts of warm adapters ride in the steps of requests that decode: each of these gets a token in every step."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.checkpoints import TinyModel, load_reference, reference_greedy, write_random_adapter, write_random_model
from tests.engine.harness import EngineHarness

CHUNK_TOKENS = 8
LONG_PROMPT = [random.Random(9).randrange(3, 256) for _ in range(100)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("riding")
    model_dir = write_random_model(root / "model", TinyModel(layers=3), seed=6)
    for seed, name in enumerate(("a", "b")):
        write_random_adapter(root / "adapters" / name, model_dir, rank=8, seed=seed)
    return model_dir, root / "adapters"


@pytest.mark.parametrize("adapter", [None, "b"])
@pytest.mark.parametrize("runs_ahead", [False, True])
def test_a_long_prompt_takes_no_step_from_those_who_decode(
    folders: tuple[Path, Path], adapter: str | None, runs_ahead: bool, device: str
) -> None:
    settings = {"device": device, "runs_ahead": runs_ahead, "chunk_tokens": CHUNK_TOKENS, "cpu_workers": 0}
    with EngineHarness(folders[0], folders[1], **settings) as harness:
        for name in ("a", "b"):
            harness.warm(name)
        short = harness.submit([5, 6, 7], "a", max_tokens=60)
        harness.run_until(lambda: bool(harness.answers[short].tokens))
        long = harness.submit(LONG_PROMPT, adapter, max_tokens=4)
        steps = 0
        while not harness.answers[long].tokens:
            before = len(harness.answers[short].tokens)
            harness.step()
            steps += 1
            assert len(harness.answers[short].tokens) == before + 1
            assert not harness.engine.passes
        # Ahead, the token of a step comes with the next one.
        assert steps == -(-len(LONG_PROMPT) // CHUNK_TOKENS) + runs_ahead
        harness.run()
        folder = None if adapter is None else folders[1] / adapter
        assert tuple(harness.answers[long].tokens) == reference_greedy(
            load_reference(folders[0], folder), LONG_PROMPT, 4
        )


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_several_prompts_share_a_steps_rows_in_the_order_of_their_arrival(
    folders: tuple[Path, Path], runs_ahead: bool, device: str
) -> None:
    settings = {"device": device, "runs_ahead": runs_ahead, "chunk_tokens": CHUNK_TOKENS, "cpu_workers": 0}
    with EngineHarness(folders[0], folders[1], **settings) as harness:
        short = harness.submit([5, 6, 7], max_tokens=60)
        harness.run_until(lambda: bool(harness.answers[short].tokens))
        prompts = [[10 + place] * 11 for place in range(4)]
        numbers = [harness.submit(prompt, max_tokens=2) for prompt in prompts]
        first_token_steps: dict[int, int] = {}
        for step in range(40):
            harness.step()
            for number in numbers:
                if harness.answers[number].tokens:
                    first_token_steps.setdefault(number, step)
        # 44 rows, 8 a step: the first prompt ends in the second step, the last in the sixth.
        assert [first_token_steps[number] - runs_ahead for number in numbers] == [1, 2, 4, 5]

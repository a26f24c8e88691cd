"""A step is enqueued before the tokens of the one before are read: nothing that a caller sees depends on it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from segue.engine.pending import PendingToken, fill_pending
from segue.types import FinishReason
from tests.checkpoints import TinyModel, write_random_adapter, write_random_model
from tests.engine.harness import EngineHarness

NEW_TOKENS = 12


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("ahead")
    model_dir = write_random_model(root / "model", TinyModel(layers=2), seed=6)
    write_random_adapter(root / "adapters" / "a", model_dir, rank=8, seed=1)
    return model_dir, root / "adapters"


def prompts() -> list[list[int]]:
    generator = random.Random(11)
    return [[generator.randrange(3, 256) for _ in range(generator.randint(1, 40))] for _ in range(12)]


def answers(
    folders: tuple[Path, Path], device: str, *, runs_ahead: bool, **sampling: object
) -> list[tuple[list[int], object]]:
    settings = {"device": device, "chunk_tokens": 8, "cpu_workers": 0, "runs_ahead": runs_ahead}
    with EngineHarness(folders[0], folders[1], **settings) as harness:
        numbers = []
        for place, prompt in enumerate(prompts()):
            options = {"max_tokens": 1 + place, **sampling}
            numbers.append(harness.submit(prompt, None if place % 3 else "a", **options))  # type: ignore[arg-type]
            harness.step()
        harness.run()
        found = [harness.answers[number] for number in numbers]
        return [(answer.tokens, answer.finished and answer.finished.reason) for answer in found]


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"stop_token_ids": frozenset(range(0, 256, 5)), "max_tokens": NEW_TOKENS},
        {"temperature": 1.0, "repetition_penalty": 1.3, "presence_penalty": 0.4, "max_tokens": NEW_TOKENS},
        {"temperature": 1.2, "min_tokens": 6, "stop_token_ids": frozenset(range(0, 256, 3)), "max_tokens": NEW_TOKENS},
    ],
    ids=["lengths", "stops", "penalties", "min-tokens"],
)
def test_the_answers_are_the_same(folders: tuple[Path, Path], sampling: dict[str, object], device: str) -> None:
    ahead, in_step = (answers(folders, device, runs_ahead=runs_ahead, **sampling) for runs_ahead in (True, False))
    assert ahead == in_step


def test_a_token_is_read_after_the_next_step_was_enqueued(folders: tuple[Path, Path], device: str) -> None:
    with EngineHarness(*folders, device=device, cpu_workers=0, runs_ahead=True) as harness:
        number = harness.submit([5, 6, 7], max_tokens=3)
        harness.step()
        assert harness.engine.requests.get(number) is not None
        assert harness.answers[number].tokens == []
        assert harness.engine.can_go_on
        harness.step()
        assert len(harness.answers[number].tokens) == 1
        request = harness.engine.requests.get(number)
        assert request is not None
        assert (request.flights, request.ahead_rows, request.ahead_tokens) == (1, 1, 1)
        harness.run()
        assert len(harness.answers[number].tokens) == 3


def test_one_that_is_cancelled_under_way_gives_its_pages_back_when_it_has_been_read(
    folders: tuple[Path, Path], device: str
) -> None:
    settings = {"device": device, "cpu_workers": 0, "runs_ahead": True, "prefix_cache": False}
    with EngineHarness(folders[0], folders[1], **settings) as harness:
        gone = harness.submit([5, 6, 7], "a", max_tokens=30)
        other = harness.submit([8, 9], max_tokens=6)
        harness.run_until(lambda: len(harness.answers[gone].tokens) > 1)
        harness.engine.cancel(gone)
        request = harness.engine.requests.get(gone)
        assert request is not None, "rows of it are on the device"
        assert request.pages
        harness.step()
        harness.step()
        finished = harness.answers[gone].finished
        assert finished is not None
        assert finished.reason is FinishReason.CANCELLED
        assert harness.engine.requests.get(gone) is None
        harness.run()
        assert len(harness.answers[other].tokens) == 6


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_pending_tokens_go_to_their_rows(dtype: torch.dtype) -> None:
    first, second = torch.tensor([10, 11, 12]), torch.tensor([20, 21, 22], dtype=torch.int32)
    token_ids = torch.zeros(8, dtype=dtype)
    fill_pending(token_ids, [(1, PendingToken(first, 0)), (2, PendingToken(first, 1)), (3, PendingToken(first, 2))])
    fill_pending(token_ids, [(7, PendingToken(second, 0)), (0, PendingToken(second, 2)), (5, PendingToken(first, 1))])
    assert token_ids.tolist() == [22, 10, 11, 12, 0, 11, 0, 20]

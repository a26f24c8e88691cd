"""An engine that chooses tokens by the kernels: the answers of one that does in torch. In Triton's interpreter."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from segue.engine.backend import Backend
from segue.engine.cuda.sampler import KernelSampler
from segue.engine.instance import EngineInstance
from segue.engine.models.decoder import DecoderModel
from segue.types import FinishReason
from tests.checkpoints import TinyModel, write_random_model
from tests.engine.harness import EngineHarness
from tests.engine.worlds import prompts

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled where there is a GPU")

NEW_TOKENS = 12
STOPS = frozenset(range(0, 256, 3))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("sampler")
    (root / "adapters").mkdir()
    return write_random_model(root / "model", TinyModel(layers=1), seed=4), root / "adapters"


def answers(
    folders: tuple[Path, Path], sampling: dict[str, Any], *, runs_ahead: bool
) -> list[tuple[list[int], FinishReason]]:
    with EngineHarness(*folders, cpu_workers=0, runs_ahead=runs_ahead) as harness:
        numbers = []
        for place, prompt in enumerate(prompts(4, seed=6)):
            numbers.append(harness.submit(prompt, seed=place, max_tokens=NEW_TOKENS, **sampling))
            harness.step()
        harness.run()
        found = [harness.answers[number] for number in numbers]
        assert all(answer.finished is not None for answer in found)
        return [(answer.tokens, answer.finished.reason) for answer in found if answer.finished is not None]


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 1.2, "min_tokens": 6, "stop_token_ids": STOPS},
        {"temperature": 0.0, "min_tokens": 3, "stop_token_ids": STOPS, "logit_bias": {3: 4.0, 7: -2.0}},
        {"temperature": 1.0, "top_p": 0.8, "top_k": 50, "repetition_penalty": 1.3, "presence_penalty": 0.4},
    ],
    ids=["min-tokens", "greedy", "penalties"],
)
def test_the_kernels_choose_what_torch_does(
    folders: tuple[Path, Path], sampling: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = answers(folders, sampling, runs_ahead=False)
    in_torch = EngineInstance._backend

    def by_kernels(instance: EngineInstance, model: DecoderModel, chunk_elems: int) -> Backend:
        return dataclasses.replace(in_torch(instance, model, chunk_elems), sampler=KernelSampler())

    monkeypatch.setattr(EngineInstance, "_backend", by_kernels)
    for runs_ahead in (True, False):
        assert answers(folders, sampling, runs_ahead=runs_ahead) == expected

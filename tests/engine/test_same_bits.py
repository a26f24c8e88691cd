"""The same requests give the same bits each time: kernels sum in a fixed order, whichever pages they find."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from segue.types import TokenLogprob
from tests.checkpoints import ALL_TARGETS, TinyModel, write_random_adapter, write_random_model
from tests.engine.harness import EngineHarness
from tests.engine.worlds import prompts

# Kernels are compiled when they are first met.
pytestmark = pytest.mark.timeout(700)

NEW_TOKENS = 24
ROUNDS = 3
RANKS = {"a": 8, "b": 64, "c": 1, "d": 24}
REQUESTS = 24


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, dtype: torch.dtype) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("bits")
    shape = TinyModel(hidden_size=256, heads=4, kv_heads=2, head_dim=128, layers=3)
    model_dir = write_random_model(root / "model", shape, seed=4, dtype=dtype)
    for seed, (name, rank) in enumerate(RANKS.items()):
        write_random_adapter(
            root / "adapters" / name, model_dir, rank=rank, targets=ALL_TARGETS, dtype=dtype, seed=seed
        )
    return model_dir, root / "adapters"


def test_the_same_batch_twice_gives_the_same_bits(folders: tuple[Path, Path], dtype: torch.dtype, device: str) -> None:
    """Prompts in chunks beside decodes, then decodes: log probabilities are equal, not close."""
    names = [*RANKS, None, None]
    asked = [(names[place % len(names)], prompt) for place, prompt in enumerate(prompts(REQUESTS, seed=6))]
    settings = {"device": device, "dtype": str(dtype).removeprefix("torch."), "chunk_tokens": 16, "budget_tokens": 64}
    with EngineHarness(folders[0], folders[1], cpu_workers=0, prefix_cache=False, **settings) as harness:
        for name in RANKS:
            harness.warm(name)
        rounds: list[list[tuple[list[int], list[TokenLogprob]]]] = []
        for number in range(ROUNDS):
            # Pages in another order.
            held = harness.submit([5] * (17 + 40 * number), max_tokens=2)
            harness.run(timeout_seconds=600)
            assert harness.answers[held].failed is None
            numbers = [harness.submit(prompt, name, max_tokens=NEW_TOKENS, logprobs=3) for name, prompt in asked]
            harness.run(timeout_seconds=600)
            answers = [harness.answers[number] for number in numbers]
            assert all(len(answer.tokens) == NEW_TOKENS for answer in answers)
            rounds.append([(answer.tokens, answer.logprobs) for answer in answers])
    assert all(later == rounds[0] for later in rounds[1:])

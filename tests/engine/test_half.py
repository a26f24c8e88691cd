"""bfloat16: the engine's log probabilities of its own tokens are within rounding of float32's, whatever runs beside.

Nobody can promise the same tokens for batches of different shapes there. On CUDA it runs on FlashInfer and in graphs.
"""

from __future__ import annotations

import pytest
import torch

from segue.engine.config import HandoffConfig
from segue.types import LoraSource, Tier
from tests.checkpoints import (
    ALL_TARGETS,
    TinyModel,
    write_random_adapter,
    write_random_model,
)
from tests.engine.harness import Answer, EngineHarness
from tests.engine.worlds import MILD, World, prompts

# Kernels are compiled when they are first met.
pytestmark = pytest.mark.timeout(700)
TIMEOUT_SECONDS = 600

NEW_TOKENS = 32
SHAPES = {
    "llama": TinyModel(hidden_size=256, heads=4, kv_heads=2, head_dim=128, layers=4),
    "llama, one kv head": TinyModel(hidden_size=256, heads=4, kv_heads=1, head_dim=128, layers=4),
    "mistral": TinyModel(
        family="mistral", hidden_size=256, heads=4, kv_heads=2, head_dim=128, extra={"sliding_window": 24}
    ),
    "qwen2": TinyModel(family="qwen2", hidden_size=256, heads=4, kv_heads=2, head_dim=128),
    "qwen3": TinyModel(family="qwen3", hidden_size=256, heads=4, kv_heads=2, head_dim=128),
}
ADAPTERS: dict[str, tuple[int, tuple[str, ...]]] = {
    "a": (8, ("q_proj", "v_proj")),
    "b": (64, ALL_TARGETS),
    "c": (1, ("o_proj", "down_proj")),
    "d": (24, ("k_proj", "gate_proj")),
}
NAMES = (*ADAPTERS, None, *ADAPTERS, None)
ASKED = tuple(zip(NAMES, prompts(len(NAMES), seed=1), strict=True))


@pytest.fixture(scope="module", params=SHAPES, ids=str)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("half")
    shape = SHAPES[request.param]
    model_dir = write_random_model(root / "model", shape, seed=2, dtype=torch.bfloat16, **MILD)
    for seed, (name, (rank, targets)) in enumerate(ADAPTERS.items()):
        folder = root / "adapters" / name
        write_random_adapter(folder, model_dir, rank=rank, targets=targets, dtype=torch.bfloat16, seed=seed)
    return World(model_dir, root / "adapters", shape.layers)


@pytest.mark.parametrize("hot", [True, False], ids=["hot", "cold"])
@pytest.mark.parametrize("together", [True, False], ids=["in a batch", "alone"])
def test_log_probabilities_are_those_of_float32(world: World, hot: bool, together: bool, device: str) -> None:
    """A cold pass takes its first layers' deltas from the CPU, whatever a planner would think of so small a model."""
    settings = {"device": device, "dtype": "bfloat16", "chunk_tokens": 16, "copy_bytes_per_second": 4e6}
    handoff = HandoffConfig(mode="fixed", cpu_layers=2)
    with EngineHarness(world.model_dir, world.adapters_dir, prefix_cache=False, handoff=handoff, **settings) as harness:
        if hot:
            for name in ADAPTERS:
                harness.warm(name)
        answers = answer_together(harness) if together else answer_alone(harness, evict=not hot)
    world.compare_half([(*asked, answer) for asked, answer in zip(ASKED, answers, strict=True)], NEW_TOKENS)
    sources: set[LoraSource] = set()
    for answer, (adapter, _) in zip(answers, ASKED, strict=True):
        assert answer.finished is not None
        sources |= {layer.source for layer in answer.finished.timing.layers}
        assert adapter is None or (answer.finished.timing.tier is Tier.DEVICE) == hot
    assert (LoraSource.CPU in sources) is not hot


def answer_together(harness: EngineHarness) -> list[Answer]:
    numbers = [harness.submit(prompt, name, max_tokens=NEW_TOKENS, logprobs=2) for name, prompt in ASKED]
    harness.run(TIMEOUT_SECONDS)
    return [harness.answers[number] for number in numbers]


def answer_alone(harness: EngineHarness, *, evict: bool) -> list[Answer]:
    """One after the other; with ``evict`` each finds its adapter on disk."""
    answers = []
    for name, prompt in ASKED:
        number = harness.submit(prompt, name, max_tokens=NEW_TOKENS, logprobs=2)
        harness.run(TIMEOUT_SECONDS)
        answers.append(harness.answers[number])
        if evict and name is not None:
            version_id = harness.open(name)
            harness.run_until(lambda: harness.instance.store.is_landed(version_id))  # noqa: B023
            harness.engine.versions.evict(version_id)
    return answers

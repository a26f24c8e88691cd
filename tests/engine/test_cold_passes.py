"""bfloat16: passes of loading adapters, on CUDA by graphs of their layers, handed over anywhere and beside others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from segue.engine.config import HandoffConfig
from segue.types import Tier, TokenLogprob
from tests.checkpoints import ALL_TARGETS, TinyModel, write_random_adapter, write_random_model
from tests.engine.harness import EngineHarness
from tests.engine.worlds import MILD, Answered, World, prompts

# Kernels are compiled when they are first met.
pytestmark = pytest.mark.timeout(700)
TIMEOUT_SECONDS = 600

LAYERS = 4
NEW_TOKENS = 12
SHAPES = {
    "llama": TinyModel(hidden_size=256, heads=4, kv_heads=2, head_dim=128, layers=LAYERS, max_position_embeddings=1024),
    "mistral": TinyModel(
        family="mistral",
        hidden_size=256,
        heads=4,
        kv_heads=2,
        head_dim=128,
        layers=LAYERS,
        max_position_embeddings=1024,
        extra={"sliding_window": 24},
    ),
    "qwen2": TinyModel(
        family="qwen2", hidden_size=256, heads=4, kv_heads=2, head_dim=128, layers=LAYERS, max_position_embeddings=1024
    ),
}
ADAPTERS: dict[str, tuple[int, tuple[str, ...]]] = {
    "a": (8, ("q_proj", "v_proj")),
    "b": (64, ALL_TARGETS),
    "c": (1, ("o_proj", "down_proj")),
    "d": (24, ("k_proj", "gate_proj")),
}
# One, the ends of shapes, and more rows than any shape has.
PROMPT_TOKENS = (1, 16, 17, 130, 200, 520)


@pytest.fixture(scope="module", params=SHAPES, ids=str)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("cold")
    model_dir = write_random_model(root / "model", SHAPES[request.param], seed=2, dtype=torch.bfloat16, **MILD)
    for seed, (name, (rank, targets)) in enumerate(ADAPTERS.items()):
        folder = root / "adapters" / name
        write_random_adapter(folder, model_dir, rank=rank, targets=targets, dtype=torch.bfloat16, seed=seed)
    return World(model_dir, root / "adapters", LAYERS)


def harness_of(world: World, device: str, **config: Any) -> EngineHarness:
    settings: dict[str, Any] = {
        "device": device,
        "dtype": "bfloat16",
        "prefix_cache": False,
        "budget_tokens": 600,
        "max_context_tokens": 640,
        "cpu_slots": 64,
    }
    return EngineHarness(world.model_dir, world.adapters_dir, **{**settings, **config})


@pytest.mark.parametrize("cpu_layers", range(LAYERS + 1))
def test_handed_over_at_every_layer(world: World, device: str, cpu_layers: int) -> None:
    handoff = HandoffConfig(mode="fixed", cpu_layers=cpu_layers)
    answered: list[Answered] = []
    with harness_of(world, device, handoff=handoff) as harness:
        for name, prompt in zip(ADAPTERS, prompts(len(ADAPTERS), seed=cpu_layers), strict=True):
            harness.bring_to_host([name])
            number = harness.submit(prompt, name, max_tokens=NEW_TOKENS, logprobs=0)
            harness.run(TIMEOUT_SECONDS)
            answered.append((name, prompt, harness.answers[number]))
            finished = harness.answers[number].finished
            assert finished is not None
            assert finished.timing.cpu_layers == cpu_layers
    world.compare_half(answered, NEW_TOKENS)


def test_prompts_of_any_length(world: World, device: str) -> None:
    """Each finds its adapter on disk."""
    answered: list[Answered] = []
    with harness_of(world, device, handoff=HandoffConfig(mode="stream")) as harness:
        for tokens in PROMPT_TOKENS:
            prompt = [3 + place * place % 253 for place in range(tokens)]
            number = harness.submit(prompt, "b", max_tokens=NEW_TOKENS, logprobs=0)
            harness.run(TIMEOUT_SECONDS)
            answer = harness.answers[number]
            assert answer.finished is not None
            assert answer.finished.timing.tier is Tier.DISK
            answered.append(("b", prompt, answer))
            harness.bring_to_host(["b"])
            harness.engine.versions.evict(harness.open("b"))
    world.compare_half(answered, NEW_TOKENS)


@pytest.mark.parametrize("cpu_layers", [0, 2])
def test_several_adapters_in_one_pass(world: World, device: str, cpu_layers: int) -> None:
    asked = list(zip([*ADAPTERS, "b"], prompts(len(ADAPTERS) + 1, seed=5), strict=True))
    handoff = HandoffConfig(mode="fixed", cpu_layers=cpu_layers)
    with harness_of(world, device, handoff=handoff, merged_rows=256) as harness:
        harness.bring_to_host(ADAPTERS)
        numbers = [harness.submit(prompt, name, max_tokens=NEW_TOKENS, logprobs=0) for name, prompt in asked]
        harness.run(TIMEOUT_SECONDS)
        answers = [harness.answers[number] for number in numbers]
    world.compare_half([(*item, answer) for item, answer in zip(asked, answers, strict=True)], NEW_TOKENS)


def test_the_same_bits_alone_and_beside_others(world: World, device: str) -> None:
    """A cold first token, again and again: alone, beside requests that decode, beside other cold passes."""
    (prompt,) = prompts(1, seed=9)
    seen: list[list[TokenLogprob]] = []
    cold: list[Answered] = []
    with harness_of(world, device, handoff=HandoffConfig(mode="stream"), merged_rows=0, max_passes=8) as harness:
        for others in ([], [None] * 6, ["a", "c"], [None, None, "a", "d"]):
            harness.bring_to_host(ADAPTERS)
            asked = list(zip(others, prompts(len(others), seed=4), strict=True))
            beside = [harness.submit(item, name, max_tokens=40, logprobs=0) for name, item in asked if name is None]
            for _ in range(4):
                harness.step()
            number = harness.submit(prompt, "b", max_tokens=1, logprobs=5)
            arriving = [
                (harness.submit(item, name, max_tokens=NEW_TOKENS, logprobs=0), name, item)
                for name, item in asked
                if name
            ]
            harness.run(TIMEOUT_SECONDS)
            seen.append(harness.answers[number].logprobs)
            assert all(len(harness.answers[item].tokens) == 40 for item in beside)
            cold += [(name, own, harness.answers[item]) for item, name, own in arriving]
    world.compare_half(cold, NEW_TOKENS)
    assert all(item == seen[0] for item in seen[1:])


@pytest.mark.gpu
def test_layers_are_graphs(world: World) -> None:
    """Those of a pass, and of as many passes at once as there are sets."""
    with harness_of(world, "cuda", handoff=HandoffConfig(mode="stream"), merged_rows=0) as harness:
        harness.bring_to_host(ADAPTERS)
        for name, prompt in zip(ADAPTERS, prompts(len(ADAPTERS), seed=3), strict=True):
            harness.submit(prompt, name, max_tokens=1)
        harness.run(TIMEOUT_SECONDS)
        sets = harness.instance.engine._runner._passes
        assert sets is not None
        assert all(item._graphs for item in sets._sets)  # type: ignore[attr-defined]
        assert len(sets._idle) == len(sets._sets)  # type: ignore[attr-defined]

"""Tokens and log probabilities equal those of transformers + PEFT, one by one, whatever runs beside them."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from segue.engine.config import HandoffConfig
from segue.types import LayerTiming, LoraSource, Tier
from tests.checkpoints import (
    ALL_TARGETS,
    ROPE_LLAMA3,
    TinyModel,
    load_reference,
    reference_greedy,
    reference_logits,
    write_random_adapter,
    write_random_model,
)
from tests.engine.harness import Answer, EngineHarness

NEW_TOKENS = 64
LOGPROB_TOLERANCE = 1e-4
SHAPES = {
    "one kv head, tied": TinyModel(kv_heads=1, tied=True),
    "two kv heads, llama3 rope": TinyModel(kv_heads=2, rope=ROPE_LLAMA3),
    "three kv heads": TinyModel(hidden_size=96, heads=6, kv_heads=3, layers=4),
    "mistral with a window": TinyModel(family="mistral", kv_heads=1, extra={"sliding_window": 24}),
    "qwen2": TinyModel(family="qwen2", tied=True),
    "qwen3": TinyModel(family="qwen3", layers=4),
}
ADAPTERS: dict[str, dict[str, object]] = {
    "r1": {"rank": 1, "targets": ("q_proj",)},
    "r2": {"rank": 2, "targets": ("v_proj", "o_proj")},
    "r3": {"rank": 3, "targets": ("gate_proj", "down_proj")},
    "r8": {"rank": 8},
    "r16": {"rank": 16, "targets": ALL_TARGETS},
    "r24": {"rank": 24, "targets": ("k_proj", "up_proj")},
    "mixed": {"rank": 4, "targets": ALL_TARGETS, "rank_by_module": {"q_proj": 33, "down_proj": 7, "up_proj": 1}},
    "r64": {"rank": 64, "targets": ALL_TARGETS},
}


@dataclass(frozen=True)
class World:
    """A checkpoint and its adapters on disk, with reference answers made on demand."""

    model_dir: Path
    adapters_dir: Path
    layers: int

    def expected(self, adapter: str | None, prompt: list[int]) -> tuple[list[int], torch.Tensor]:
        """Greedy tokens, and the log probability of each."""
        reference = load_reference(self.model_dir, None if adapter is None else self.adapters_dir / adapter)
        tokens = list(reference_greedy(reference, prompt, NEW_TOKENS))
        logprobs = torch.log_softmax(reference_logits(reference, prompt + tokens), dim=-1)
        return tokens, logprobs[len(prompt) - 1 : -1].gather(1, torch.tensor(tokens)[:, None])[:, 0]

    def compare(self, adapter: str | None, prompt: list[int], answer: Answer) -> None:
        assert answer.failed is None
        tokens, logprobs = self.expected(adapter, prompt)
        assert answer.tokens == tokens, f"adapter {adapter}"
        got = torch.tensor([item.logprob for item in answer.logprobs])
        assert (got - logprobs).abs().max() < LOGPROB_TOLERANCE, f"adapter {adapter}"


@pytest.fixture(scope="module", params=SHAPES, ids=str)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    shape = SHAPES[request.param]
    root = tmp_path_factory.mktemp("world")
    model_dir = write_random_model(root / "model", shape, seed=7)
    for seed, (name, options) in enumerate(ADAPTERS.items()):
        write_random_adapter(root / "adapters" / name, model_dir, seed=seed, **options)  # type: ignore[arg-type]
    return World(model_dir, root / "adapters", shape.layers)


def prompts(count: int, seed: int) -> list[list[int]]:
    generator = random.Random(seed)
    return [[generator.randrange(3, 256) for _ in range(generator.randint(1, 45))] for _ in range(count)]


def test_sixteen_requests_at_once_equal_one_by_one(world: World) -> None:
    adapters = [*ADAPTERS, None, None, None, "r8", "r64", "r64", "r1", "mixed"]
    asked = list(zip(adapters, prompts(len(adapters), seed=3), strict=True))
    with EngineHarness(world.model_dir, world.adapters_dir, copy_bytes_per_second=2e6, budget_tokens=32) as harness:
        harness.warm("r8")
        harness.warm("mixed")
        numbers = []
        for adapter, prompt in asked:
            numbers.append(harness.submit(prompt, adapter, max_tokens=NEW_TOKENS, logprobs=0))
            for _ in range(3):
                harness.step()
        harness.run()
        for number, (adapter, prompt) in zip(numbers, asked, strict=True):
            world.compare(adapter, prompt, harness.answers[number])
        tiers = {adapter: tier_of(harness, number) for number, (adapter, _) in zip(numbers, asked, strict=True)}
        assert tiers["r8"] is Tier.DEVICE
        assert tiers[None] is Tier.NONE
        sources = [tuple(layer.source for layer in layers_of(harness, number)) for number in numbers]
        assert any(LoraSource.CPU in item for item in sources), "no cold prefill had help of the CPU"
        assert harness.instance.state(0).kv_pages == 0


def tier_of(harness: EngineHarness, number: int) -> Tier:
    finished = harness.answers[number].finished
    assert finished is not None
    return finished.timing.tier


def layers_of(harness: EngineHarness, number: int) -> tuple[LayerTiming, ...]:
    finished = harness.answers[number].finished
    assert finished is not None
    return finished.timing.layers


@pytest.mark.parametrize("adapter", ["r3", "r8", "r64"])
@pytest.mark.parametrize("where", ["layer 0", "the middle", "the last layer", "never"])
def test_handover_anywhere_gives_the_same_tokens(world: World, adapter: str, where: str) -> None:
    cpu_layers = {
        "layer 0": 0,
        "the middle": world.layers // 2,
        "the last layer": world.layers - 1,
        "never": world.layers,
    }
    forced = cpu_layers[where]
    (prompt,) = prompts(1, seed=len(adapter) + forced)
    handoff = HandoffConfig(mode="fixed", cpu_layers=forced)
    with EngineHarness(world.model_dir, world.adapters_dir, handoff=handoff, copy_bytes_per_second=4e6) as harness:
        number = harness.submit(prompt, adapter, max_tokens=NEW_TOKENS, logprobs=0)
        harness.run()
        world.compare(adapter, prompt, harness.answers[number])
        finished = harness.answers[number].finished
        assert finished is not None
        timing = finished.timing
        assert timing.cpu_layers == forced
        assert [layer.source for layer in timing.layers] == [
            LoraSource.CPU if layer < forced else LoraSource.DEVICE for layer in range(world.layers)
        ]
        assert timing.handover_layer == (forced if 0 < forced < world.layers else None)
        assert all(
            layer.landed_seconds is not None and layer.landed_seconds <= layer.start_seconds
            for layer in timing.layers
            if layer.source is LoraSource.DEVICE
        )

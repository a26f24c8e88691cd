"""Tokens and log probabilities equal those of transformers + PEFT, one by one, whatever runs beside them."""

from __future__ import annotations

import pytest

from segue.engine.config import HandoffConfig
from segue.types import LayerTiming, LoraSource, Tier
from tests.engine.harness import EngineHarness
from tests.engine.worlds import ADAPTERS, SHAPES, World, build_world, prompts

NEW_TOKENS = 64


@pytest.fixture(scope="module", params=SHAPES, ids=str)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(tmp_path_factory.mktemp("world"), SHAPES[request.param])


def test_sixteen_requests_at_once_equal_one_by_one(world: World, device: str) -> None:
    adapters = [*ADAPTERS, None, None, None, "r8", "r64", "r64", "r1", "mixed"]
    asked = list(zip(adapters, prompts(len(adapters), seed=3), strict=True))
    settings = {"device": device, "copy_bytes_per_second": 2e6, "budget_tokens": 32}
    with EngineHarness(world.model_dir, world.adapters_dir, **settings) as harness:
        harness.warm("r8")
        harness.warm("mixed")
        numbers = []
        for adapter, prompt in asked:
            numbers.append(harness.submit(prompt, adapter, max_tokens=NEW_TOKENS, logprobs=0))
            for _ in range(3):
                harness.step()
        harness.run()
        for number, (adapter, prompt) in zip(numbers, asked, strict=True):
            world.compare(adapter, prompt, harness.answers[number], NEW_TOKENS)
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
def test_handover_anywhere_gives_the_same_tokens(world: World, adapter: str, where: str, device: str) -> None:
    cpu_layers = {
        "layer 0": 0,
        "the middle": world.layers // 2,
        "the last layer": world.layers - 1,
        "never": world.layers,
    }
    forced = cpu_layers[where]
    (prompt,) = prompts(1, seed=len(adapter) + forced)
    handoff = HandoffConfig(mode="fixed", cpu_layers=forced)
    settings = {"device": device, "handoff": handoff, "copy_bytes_per_second": 4e6}
    with EngineHarness(world.model_dir, world.adapters_dir, **settings) as harness:
        number = harness.submit(prompt, adapter, max_tokens=NEW_TOKENS, logprobs=0)
        harness.run()
        world.compare(adapter, prompt, harness.answers[number], NEW_TOKENS)
        finished = harness.answers[number].finished
        assert finished is not None
        timing = finished.timing
        assert timing.cpu_layers == forced
        assert [layer.source for layer in timing.layers] == [
            LoraSource.CPU if layer < forced else LoraSource.DEVICE for layer in range(world.layers)
        ]
        assert timing.handover_layer == (forced if 0 < forced < world.layers else None)
        # On CUDA a layer may be enqueued behind its landing.
        latest = float("inf") if device == "cuda" else 0.0
        assert all(
            layer.landed_seconds is not None and layer.landed_seconds <= layer.start_seconds + latest
            for layer in timing.layers
            if layer.source is LoraSource.DEVICE
        )

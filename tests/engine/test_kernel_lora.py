"""The engine's tables and plans for the LoRA kernels: answers through them, run by Triton's interpreter on the CPU."""

from __future__ import annotations

import random

import pytest

from segue.engine.config import HandoffConfig
from tests.checkpoints import ALL_TARGETS, TinyModel
from tests.engine.harness import EngineHarness
from tests.engine.interpreted import FakeCuda, small_world, without_gpu
from tests.engine.worlds import World

pytestmark = without_gpu

NEW_TOKENS = 5
MAX_RANK = 32
ADAPTERS: dict[str, dict[str, object]] = {
    "a": {"rank": 8},
    "b": {"rank": 24, "targets": ALL_TARGETS, "rank_by_module": {"q_proj": 3, "down_proj": 32}},
    "c": {"rank": 1, "targets": ("k_proj", "up_proj"), "layers": [1]},
    "d": {"rank": 16, "targets": ("o_proj",)},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return small_world(tmp_path_factory.mktemp("kernels"), TinyModel(layers=2, kv_heads=1), ADAPTERS, seed=5)


@pytest.mark.parametrize("mode", ["auto", "fixed"])
def test_answers_through_the_kernels_are_those_of_peft(
    world: World, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More adapters than the tables have rows, in turns; with ``fixed`` each is handed over after its first layer."""
    FakeCuda(max_rank=MAX_RANK, max_rows=64, table_rows=3).install(monkeypatch)
    generator = random.Random(3)
    handoff = HandoffConfig(mode=mode, cpu_layers=1 if mode == "fixed" else 0)
    settings = {"handoff": handoff, "budget_tokens": 48, "max_lora_rank": MAX_RANK}
    with EngineHarness(world.model_dir, world.adapters_dir, **settings) as harness:
        for names in (["a", "b", None, "b"], ["c", "d", "c"], ["a", "d", None]):
            asked = [(name, [generator.randrange(3, 256) for _ in range(generator.randint(1, 20))]) for name in names]
            numbers = [harness.submit(prompt, name, max_tokens=NEW_TOKENS, logprobs=0) for name, prompt in asked]
            harness.run(timeout_seconds=150)
            for number, (name, prompt) in zip(numbers, asked, strict=True):
                world.compare(name, prompt, harness.answers[number], NEW_TOKENS)
            # What is evicted gives its row of the tables back.
            for name in set(names) - {None}:
                assert name is not None
                harness.engine.versions.evict(harness.open(name))
            harness.run_until(lambda: harness.instance.state(0).adapter_pages == 0)

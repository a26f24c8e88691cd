"""The engine's tables and plans for the LoRA kernels: answers through them, run by Triton's interpreter on the CPU."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from segue.engine.attention import TorchAttention
from segue.engine.backend import Backend
from segue.engine.config import HandoffConfig
from segue.engine.cuda.lora import KernelLora, LoraSizes
from segue.engine.instance import EngineInstance
from segue.engine.models.decoder import DecoderModel
from segue.engine.models.rope import RotaryEmbedding
from tests.checkpoints import (
    ALL_TARGETS,
    TinyModel,
    load_reference,
    reference_greedy,
    write_random_adapter,
    write_random_model,
)
from tests.engine.harness import EngineHarness

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled where there is a GPU")

NEW_TOKENS = 5
MAX_RANK = 32
TABLE_ROWS = 3
ADAPTERS: dict[str, dict[str, object]] = {
    "a": {"rank": 8},
    "b": {"rank": 24, "targets": ALL_TARGETS, "rank_by_module": {"q_proj": 3, "down_proj": 32}},
    "c": {"rank": 1, "targets": ("k_proj", "up_proj"), "layers": [1]},
    "d": {"rank": 16, "targets": ("o_proj",)},
}


def interpreted_backend(instance: EngineInstance, model: DecoderModel, chunk_elems: int) -> Backend:
    """Takes the place of EngineInstance._backend: the kernels in the interpreter, attention in torch."""
    pool, store = instance._pool, instance.store
    shapes = dict(model.config.projection_shapes())
    sizes = LoraSizes(adapters=TABLE_ROWS, adapter_pages=pool.pages, max_rank=MAX_RANK, max_rows=64)
    lora = KernelLora(store, pool, sizes, shapes, chunk_elems, multiprocessors=2)
    rotary = RotaryEmbedding(model.config.rope, model.config.head_dim)
    return Backend(lora=lora, attention=TorchAttention(pool, model.config.sliding_windows, rotary))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("kernels")
    model_dir = write_random_model(root / "model", TinyModel(layers=2, kv_heads=1), seed=5)
    for seed, (name, options) in enumerate(ADAPTERS.items()):
        write_random_adapter(root / "adapters" / name, model_dir, seed=seed, **options)  # type: ignore[arg-type]
    return model_dir, root / "adapters"


@pytest.mark.parametrize("mode", ["auto", "fixed"])
def test_answers_through_the_kernels_are_those_of_peft(
    folders: tuple[Path, Path], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More adapters than the tables have rows, in turns; with ``fixed`` each is handed over after its first layer."""
    monkeypatch.setattr(EngineInstance, "_backend", interpreted_backend)
    generator = random.Random(3)
    handoff = HandoffConfig(mode=mode, cpu_layers=1 if mode == "fixed" else 0)
    with EngineHarness(*folders, handoff=handoff, budget_tokens=48, max_lora_rank=MAX_RANK) as harness:
        for names in (["a", "b", None, "b"], ["c", "d", "c"], ["a", "d", None]):
            asked = [(name, [generator.randrange(3, 256) for _ in range(generator.randint(1, 20))]) for name in names]
            numbers = [harness.submit(prompt, name, max_tokens=NEW_TOKENS) for name, prompt in asked]
            harness.run(timeout_seconds=150)
            for number, (name, prompt) in zip(numbers, asked, strict=True):
                reference = load_reference(folders[0], None if name is None else folders[1] / name)
                expected = reference_greedy(reference, prompt, NEW_TOKENS)
                assert tuple(harness.answers[number].tokens) == expected, name
            # What is evicted gives its row of the tables back.
            for name in set(names) - {None}:
                assert name is not None
                harness.engine.versions.evict(harness.open(name))
            harness.run_until(lambda: harness.instance.state(0).adapter_pages == 0)

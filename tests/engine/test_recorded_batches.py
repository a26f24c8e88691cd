"""Batches that are recorded once and replayed with other requests in them, without a GPU: tokens are those of PEFT.

What is faked is the recording and FlashInfer. Inputs, shapes, plans and the LoRA kernels, interpreted, are real.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from segue.engine.attention import TorchAttention
from segue.engine.backend import Backend
from segue.engine.cuda.batch_graphs import BatchGraphs
from segue.engine.cuda.batch_shapes import batch_shapes
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
from tests.engine.fake_recording import FakeBatchAttention, FakeRecorder
from tests.engine.harness import EngineHarness

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled where there is a GPU")

NEW_TOKENS = 4
MAX_RANK = 64
MAX_ROWS, MAX_SEQUENCES = 160, 8
# Fewer than adapters, so that rows of the tables are given to others.
TABLE_ROWS = 2
ADAPTERS: dict[str, dict[str, object]] = {
    "a": {"rank": 8, "targets": ("q_proj", "v_proj")},
    "b": {"rank": 64, "targets": ALL_TARGETS},
    "c": {"rank": 1, "targets": ("o_proj", "down_proj")},
    "d": {"rank": 24, "targets": ("k_proj", "gate_proj")},
}


@pytest.fixture(scope="module", params=[None, 6], ids=["whole", "window"])
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("recorded")
    shape = TinyModel(layers=2, kv_heads=1)
    if request.param is not None:
        shape = replace(shape, family="mistral", extra={"sliding_window": request.param})
    model_dir = write_random_model(root / "model", shape, seed=5)
    for seed, (name, options) in enumerate(ADAPTERS.items()):
        write_random_adapter(root / "adapters" / name, model_dir, seed=seed, **options)  # type: ignore[arg-type]
    return model_dir, root / "adapters"


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> FakeRecorder:
    """Engines in this test record their batches with it."""
    made = FakeRecorder()

    def backend(instance: EngineInstance, model: DecoderModel, chunk_elems: int) -> Backend:
        pool, windows = instance._pool, model.config.sliding_windows
        rotary = RotaryEmbedding(model.config.rope, model.config.head_dim)
        sizes = LoraSizes(adapters=TABLE_ROWS, adapter_pages=pool.pages, max_rank=MAX_RANK, max_rows=MAX_ROWS)
        shapes = dict(model.config.projection_shapes())
        lora = KernelLora(instance.store, pool, sizes, shapes, chunk_elems, multiprocessors=2)
        batches = BatchGraphs(
            model,
            pool,
            FakeBatchAttention(pool, windows, rotary),
            lora,
            made,
            batch_shapes(MAX_ROWS, MAX_SEQUENCES),
            max_sequences=MAX_SEQUENCES,
            context_tokens=128,
        )
        return Backend(lora=lora, attention=TorchAttention(pool, windows, rotary), batches=batches)

    monkeypatch.setattr(EngineInstance, "_backend", backend)
    return made


def harness_of(folders: tuple[Path, Path]) -> EngineHarness:
    limits = {"budget_tokens": MAX_ROWS, "max_running": MAX_SEQUENCES, "max_lora_rank": MAX_RANK, "chunk_tokens": 16}
    return EngineHarness(folders[0], folders[1], cpu_workers=0, prefix_cache=False, **limits)


def compare(harness: EngineHarness, folders: tuple[Path, Path], asked: list[tuple[int, str | None, list[int]]]) -> None:
    for number, name, prompt in asked:
        reference = load_reference(folders[0], None if name is None else folders[1] / name)
        assert tuple(harness.answers[number].tokens) == reference_greedy(reference, prompt, NEW_TOKENS), name


def make_prompt(generator: random.Random, most: int) -> list[int]:
    return [generator.randrange(3, 256) for _ in range(generator.randint(1, most))]


def test_one_after_the_other_nothing_is_left_of_the_batch_before(
    folders: tuple[Path, Path], recorder: FakeRecorder
) -> None:
    """Adapters with other modules, and in rows of the tables that others had."""
    generator = random.Random(1)
    with harness_of(folders) as harness:
        asked = []
        for name in ("b", "a", None, "c", "d", "a", "b", "c"):
            prompt = make_prompt(generator, 30)
            if name is not None:
                harness.warm(name)
            number = harness.submit(prompt, name, max_tokens=NEW_TOKENS)
            harness.run(timeout_seconds=150)
            asked.append((number, name, prompt))
            if name is not None:
                harness.engine.versions.evict(harness.open(name))
        compare(harness, folders, asked)
        assert len(recorder.replays) > len(recorder.recorded)


def test_prompts_of_several_requests_and_rows_that_decode(folders: tuple[Path, Path], recorder: FakeRecorder) -> None:
    generator = random.Random(2)
    with harness_of(folders) as harness:
        asked = []
        for names in (["a", None, "b"], ["b", "b", None, None, "a"]):
            for name in {*names} - {None}:
                assert name is not None
                harness.warm(name)
            for name in names:
                prompt = make_prompt(generator, 40)
                asked.append((harness.submit(prompt, name, max_tokens=NEW_TOKENS), name, prompt))
                harness.step()
            harness.run(timeout_seconds=150)
        compare(harness, folders, asked)
        assert {1, 2, 16} < set(recorder.recorded)


def test_a_large_batch_of_prompts(folders: tuple[Path, Path], recorder: FakeRecorder) -> None:
    generator = random.Random(3)
    with harness_of(folders) as harness:
        harness.warm("b")
        prompts = [[generator.randrange(3, 256) for _ in range(count)] for count in (45, 50, 40)]
        names = ["b", None, "b"]
        numbers = [
            harness.submit(prompt, name, max_tokens=NEW_TOKENS) for name, prompt in zip(names, prompts, strict=True)
        ]
        harness.run(timeout_seconds=150)
        compare(harness, folders, list(zip(numbers, names, prompts, strict=True)))
        assert max(recorder.replays) == MAX_ROWS

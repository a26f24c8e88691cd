"""Batches that are recorded once and replayed with other requests in them, without a GPU: tokens are those of PEFT."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from tests.checkpoints import ALL_TARGETS, TinyModel
from tests.engine.fake_recording import FakeRecorder
from tests.engine.harness import EngineHarness
from tests.engine.interpreted import FakeCuda, small_world, without_gpu
from tests.engine.worlds import World

pytestmark = without_gpu

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
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    shape = TinyModel(layers=2, kv_heads=1)
    if request.param is not None:
        shape = replace(shape, family="mistral", extra={"sliding_window": request.param})
    return small_world(tmp_path_factory.mktemp("recorded"), shape, ADAPTERS, seed=5)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> FakeRecorder:
    """Engines in this test record their batches with it."""
    cuda = FakeCuda(
        max_rank=MAX_RANK,
        max_rows=MAX_ROWS,
        table_rows=TABLE_ROWS,
        max_sequences=MAX_SEQUENCES,
        records_batches=True,
    )
    cuda.install(monkeypatch)
    return cuda.batch_recorder


def harness_of(world: World) -> EngineHarness:
    limits = {"budget_tokens": MAX_ROWS, "max_running": MAX_SEQUENCES, "max_lora_rank": MAX_RANK, "chunk_tokens": 16}
    return EngineHarness(world.model_dir, world.adapters_dir, cpu_workers=0, prefix_cache=False, **limits)


def compare(harness: EngineHarness, world: World, asked: list[tuple[int, str | None, list[int]]]) -> None:
    for number, name, prompt in asked:
        world.compare(name, prompt, harness.answers[number], NEW_TOKENS)


def make_prompt(generator: random.Random, most: int) -> list[int]:
    return [generator.randrange(3, 256) for _ in range(generator.randint(1, most))]


def test_one_after_the_other_nothing_is_left_of_the_batch_before(world: World, recorder: FakeRecorder) -> None:
    """Adapters with other modules, and in rows of the tables that others had."""
    generator = random.Random(1)
    with harness_of(world) as harness:
        asked = []
        for name in ("b", "a", None, "c", "d", "a", "b", "c"):
            prompt = make_prompt(generator, 30)
            if name is not None:
                harness.warm(name)
            number = harness.submit(prompt, name, max_tokens=NEW_TOKENS, logprobs=0)
            harness.run(timeout_seconds=150)
            asked.append((number, name, prompt))
            if name is not None:
                harness.engine.versions.evict(harness.open(name))
        compare(harness, world, asked)
        assert len(recorder.replays) > len(recorder.recorded)


def test_prompts_of_several_requests_and_rows_that_decode(world: World, recorder: FakeRecorder) -> None:
    generator = random.Random(2)
    with harness_of(world) as harness:
        asked = []
        for names in (["a", None, "b"], ["b", "b", None, None, "a"]):
            for name in {*names} - {None}:
                assert name is not None
                harness.warm(name)
            for name in names:
                prompt = make_prompt(generator, 40)
                asked.append((harness.submit(prompt, name, max_tokens=NEW_TOKENS, logprobs=0), name, prompt))
                harness.step()
            harness.run(timeout_seconds=150)
        compare(harness, world, asked)
        assert {1, 2, 16} < set(recorder.recorded)


def test_a_large_batch_of_prompts(world: World, recorder: FakeRecorder) -> None:
    generator = random.Random(3)
    with harness_of(world) as harness:
        harness.warm("b")
        prompts = [[generator.randrange(3, 256) for _ in range(count)] for count in (45, 50, 40)]
        names = ["b", None, "b"]
        numbers = [
            harness.submit(prompt, name, max_tokens=NEW_TOKENS, logprobs=0)
            for name, prompt in zip(names, prompts, strict=True)
        ]
        harness.run(timeout_seconds=150)
        compare(harness, world, list(zip(numbers, names, prompts, strict=True)))
        assert max(recorder.replays) == MAX_ROWS

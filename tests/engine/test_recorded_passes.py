"""Passes of loading adapters whose layers are recorded, without a GPU: tokens are those of PEFT, wherever they go over
from layers by operations to layers by graphs."""

from __future__ import annotations

import os
import random
import signal
from typing import Any

import pytest

from segue.engine.config import HandoffConfig
from segue.engine.cuda.batch_shapes import pass_shapes
from segue.errors import AdapterRejectedError
from segue.types import FinishReason, LoraSource, Timing
from tests.checkpoints import ALL_TARGETS, TinyModel
from tests.engine.fake_recording import FakeRecorder
from tests.engine.harness import EngineHarness
from tests.engine.interpreted import FakeCuda, small_world, without_gpu
from tests.engine.worlds import World

pytestmark = without_gpu

LAYERS = 3
# The kernels are interpreted.
TIMEOUT_SECONDS = 150
NEW_TOKENS = 4
MAX_RANK = 16
MAX_ROWS, MAX_SEQUENCES = 64, 8
# Rows of the largest pass that is recorded.
PASS_ROWS = 32
# What is recorded of a pass besides its layers: what comes before and what comes behind them.
ENDS = 2
ADAPTERS: dict[str, dict[str, object]] = {
    "all": {"rank": 16, "targets": ALL_TARGETS},
    "some": {"rank": 3, "targets": ("q_proj", "v_proj", "down_proj")},
    "attention": {"rank": 8, "targets": ("k_proj", "o_proj")},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return small_world(tmp_path_factory.mktemp("passes"), TinyModel(layers=LAYERS, kv_heads=1), ADAPTERS, seed=8)


@pytest.fixture(scope="module")
def biased_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    shape = TinyModel(layers=LAYERS, kv_heads=1, extra={"attention_bias": True, "mlp_bias": True})
    return small_world(tmp_path_factory.mktemp("biased"), shape, ADAPTERS, seed=9)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """Engines in this test have streams, recorded batches, and two sets of recorded passes."""
    made = FakeCuda(
        max_rank=MAX_RANK,
        max_rows=MAX_ROWS,
        table_rows=4,
        max_sequences=MAX_SEQUENCES,
        records_batches=True,
        pass_shapes=pass_shapes(PASS_ROWS, MAX_SEQUENCES),
        pass_recorders=(FakeRecorder(), FakeRecorder()),
    )
    made.install(monkeypatch)
    made.install_streams(monkeypatch)
    return made


def harness_of(world: World, **config: Any) -> EngineHarness:
    settings: dict[str, Any] = {
        "budget_tokens": MAX_ROWS,
        "max_running": MAX_SEQUENCES,
        "max_lora_rank": MAX_RANK,
        "prefix_cache": False,
        "runs_ahead": True,
        "cpu_stall_seconds": 0.3,
    }
    return EngineHarness(world.model_dir, world.adapters_dir, **{**settings, **config})


def fixed(cpu_layers: int) -> HandoffConfig:
    return HandoffConfig(mode="fixed", cpu_layers=cpu_layers)


def make_prompt(tokens: int, seed: int = 0) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(3, 256) for _ in range(tokens)]


def timing_of(harness: EngineHarness, number: int) -> Timing:
    finished = harness.answers[number].finished
    assert finished is not None
    return finished.timing


@pytest.mark.parametrize("cpu_layers", range(LAYERS + 1))
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_handover_at_every_layer(world: World, cuda: FakeCuda, adapter: str, cpu_layers: int) -> None:
    """The layers that are handed over to the device, and only they, are replayed."""
    prompt = make_prompt(7)
    with harness_of(world, handoff=fixed(cpu_layers)) as harness:
        number = harness.submit(prompt, adapter, max_tokens=1, logprobs=0)
        harness.run(TIMEOUT_SECONDS)
        world.compare(adapter, prompt, harness.answers[number], 1)
        assert timing_of(harness, number).cpu_layers == cpu_layers
    used, idle = cuda.pass_recorders
    assert used.replays == [16] * (LAYERS - cpu_layers + ENDS)
    assert not idle.recorded


def test_layers_with_biases(biased_world: World, cuda: FakeCuda) -> None:
    prompt = make_prompt(7)
    with harness_of(biased_world, handoff=fixed(1)) as harness:
        number = harness.submit(prompt, "all", max_tokens=1, logprobs=0)
        harness.run(TIMEOUT_SECONDS)
        biased_world.compare("all", prompt, harness.answers[number], 1)
    assert cuda.pass_recorders[0].replays


def test_one_after_the_other_nothing_is_left_of_the_pass_before(world: World, cuda: FakeCuda) -> None:
    """Of other lengths, adapters and sources, in the same set."""
    with harness_of(world, handoff=fixed(1)) as harness:
        for seed, (adapter, tokens) in enumerate(
            [("all", 20), ("attention", 3), ("some", 17), ("all", 1), ("all", 30)]
        ):
            prompt = make_prompt(tokens, seed)
            number = harness.submit(prompt, adapter, max_tokens=NEW_TOKENS, logprobs=0)
            harness.run(TIMEOUT_SECONDS)
            world.compare(adapter, prompt, harness.answers[number], NEW_TOKENS)
            harness.engine.versions.evict(harness.open(adapter))
            harness.run_until(lambda: harness.instance.state(0).adapter_pages == 0)
    used, idle = cuda.pass_recorders
    assert len(used.replays) > len(used.recorded)
    assert not idle.recorded


def test_beside_batches_and_more_passes_than_sets(world: World, cuda: FakeCuda) -> None:
    """Over a slow link, so that each is on its way for long; the third pass waits for a set."""
    with harness_of(world, handoff=fixed(1), copy_bytes_per_second=4e6, layers_per_step=1) as harness:
        asked = []
        for seed, adapter in enumerate([None, "all", "some", "attention", "all", None]):
            prompt = make_prompt(5 + 3 * seed, seed)
            asked.append((harness.submit(prompt, adapter, max_tokens=6, logprobs=0), adapter, prompt))
            harness.step()
        assert len(harness.engine.passes) == 2
        while harness.engine.requests.admitted:
            harness.step()
            assert len(harness.engine.passes) <= 2
        for number, adapter, prompt in asked:
            world.compare(adapter, prompt, harness.answers[number], 6)
        sources = {layer.source for number, *_ in asked for layer in timing_of(harness, number).layers}
        assert sources == {LoraSource.CPU, LoraSource.DEVICE}
    assert all(recorder.replays for recorder in (*cuda.pass_recorders, cuda.batch_recorder))


def test_a_pass_that_no_shape_holds_runs_by_operations(world: World, cuda: FakeCuda) -> None:
    prompt = make_prompt(PASS_ROWS + 1)
    with harness_of(world, handoff=fixed(1)) as harness:
        number = harness.submit(prompt, "all", max_tokens=1, logprobs=0)
        harness.run(TIMEOUT_SECONDS)
        world.compare("all", prompt, harness.answers[number], 1)
    assert not any(recorder.recorded for recorder in cuda.pass_recorders)


def test_a_cancelled_pass_gives_its_set_back(world: World, cuda: FakeCuda) -> None:
    with harness_of(world, handoff=HandoffConfig(mode="stream"), copy_bytes_per_second=1e4) as harness:
        for _ in range(2 * len(cuda.pass_recorders)):
            number = harness.submit(make_prompt(9), "all", max_tokens=1)
            harness.run_until(lambda: len(harness.engine.passes) == 1)
            harness.step()
            harness.engine.cancel(number)
            harness.run_until(lambda: not harness.engine.passes)
            finished = harness.answers[number].finished
            assert finished is not None
            assert finished.reason is FinishReason.CANCELLED
    used, idle = cuda.pass_recorders
    assert used.recorded
    assert not idle.recorded


def test_a_worker_lost_between_recorded_layers(world: World, cuda: FakeCuda) -> None:
    """What was computed with garbage is computed again."""
    jobs = 0
    prompt = make_prompt(7)
    with harness_of(world, handoff=fixed(1)) as harness:

        def stop_workers() -> None:
            nonlocal jobs
            jobs += 1
            for pid in harness.instance.workers.worker_pids if jobs == 2 else ():
                os.kill(pid, signal.SIGSTOP)

        cuda.flags[0].on_write = stop_workers
        number = harness.submit(prompt, "all", max_tokens=NEW_TOKENS, logprobs=0)
        harness.run(TIMEOUT_SECONDS)
        world.compare("all", prompt, harness.answers[number], NEW_TOKENS)
        assert timing_of(harness, number).prefill_attempts == 2


def test_all_kinds_are_recorded_ahead(world: World, cuda: FakeCuda) -> None:
    """Then nothing is recorded while requests wait."""
    with harness_of(world, handoff=fixed(0)) as harness:
        passes = harness.instance.engine._runner._passes
        assert passes is not None
        told: list[tuple[int, int]] = []
        passes.record_all(lambda done, total: told.append((done, total)))  # type: ignore[attr-defined]
        assert told[0][0] == 0
        assert told[-1][0] == told[-1][1]
        recorded = [list(recorder.recorded) for recorder in cuda.pass_recorders]
        assert recorded[0] == recorded[1] != []
        assert len(recorded[0]) % (LAYERS + ENDS) == 0
        for seed, adapter in enumerate(ADAPTERS):
            prompt = make_prompt(6 + 10 * seed, seed)
            number = harness.submit(prompt, adapter, max_tokens=NEW_TOKENS, logprobs=0)
            harness.run(TIMEOUT_SECONDS)
            world.compare(adapter, prompt, harness.answers[number], NEW_TOKENS)
        assert [list(recorder.recorded) for recorder in cuda.pass_recorders] == recorded


@pytest.mark.parametrize("cpu_layers", range(LAYERS + 1))
def test_several_adapters_in_one_pass(world: World, cuda: FakeCuda, cpu_layers: int) -> None:
    """All of them in host memory; the pass has graphs for several adapters as for one."""
    asked = [(name, make_prompt(4 + 2 * seed, seed)) for seed, name in enumerate([*ADAPTERS, "some"])]
    with harness_of(world, handoff=fixed(cpu_layers), merged_rows=PASS_ROWS) as harness:
        harness.bring_to_host(ADAPTERS)
        numbers = [harness.submit(prompt, name, max_tokens=NEW_TOKENS, logprobs=0) for name, prompt in asked]
        harness.step()
        (only,) = harness.engine.passes
        assert len(only.rows) == len(asked)
        harness.run(TIMEOUT_SECONDS)
        for number, (name, prompt) in zip(numbers, asked, strict=True):
            world.compare(name, prompt, harness.answers[number], NEW_TOKENS)
            assert timing_of(harness, number).cpu_layers == cpu_layers
    if cpu_layers < LAYERS:
        assert cuda.pass_recorders[0].replays


def test_a_version_that_fails_holds_up_nobody_in_its_pass(world: World, cuda: FakeCuda) -> None:
    """The pass waits for its weights; what it had of the others is computed again."""
    prompt = make_prompt(5)
    settings: dict[str, Any] = {"handoff": HandoffConfig(mode="stream"), "copy_bytes_per_second": 1e6}
    with harness_of(world, merged_rows=PASS_ROWS, **settings) as harness:
        harness.bring_to_host(["all", "some"])
        failing, other = (harness.submit(prompt, name, max_tokens=1, logprobs=0) for name in ("all", "some"))
        harness.step()
        (only,) = harness.engine.passes
        assert len(only.rows) == 2
        harness.engine._fail_version(harness.open("all"), AdapterRejectedError("it is gone"))
        harness.run(TIMEOUT_SECONDS)
        assert harness.answers[failing].failed is not None
        world.compare("some", prompt, harness.answers[other], 1)
    assert cuda.pass_recorders[0].replays

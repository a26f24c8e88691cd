"""A cold prefill as on CUDA, without a GPU: rows through the kernels in Triton's interpreter, lanes that are late."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from segue.engine.config import HandoffConfig
from segue.types import FinishReason, Timing
from tests.checkpoints import ALL_TARGETS, TinyModel
from tests.engine.fake_flags import FakeFlags
from tests.engine.harness import EngineHarness
from tests.engine.interpreted import FakeCuda, small_world, without_gpu
from tests.engine.worlds import World

pytestmark = without_gpu

LAYERS = 3
NEW_TOKENS = 4
PROMPT = [9, 77, 201, 4, 31, 150, 12]
# LoRA points at which each adapter has modules.
POINTS = {"all": 4, "some": 2}


ADAPTERS: dict[str, dict[str, object]] = {
    "all": {"rank": 16, "targets": ALL_TARGETS},
    "some": {"rank": 3, "targets": ("q_proj", "v_proj", "down_proj")},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return small_world(tmp_path_factory.mktemp("stream"), TinyModel(layers=LAYERS, kv_heads=1), ADAPTERS, seed=8)


@pytest.fixture
def made_flags(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FakeFlags]]:
    """Engines in this test have streams; their flags."""
    cuda = FakeCuda(max_rank=16, max_rows=64, table_rows=2)
    cuda.install_streams(monkeypatch)
    yield cuda.flags
    assert len(cuda.flags) == 1


def harness_of(world: World, **config: Any) -> EngineHarness:
    settings: dict[str, Any] = {"handoff": HandoffConfig(mode="fixed", cpu_layers=LAYERS), "cpu_stall_seconds": 0.3}
    return EngineHarness(world.model_dir, world.adapters_dir, **{**settings, **config})


def compare(world: World, harness: EngineHarness, number: int, adapter: str) -> Timing:
    answer = harness.answers[number]
    world.compare(adapter, PROMPT, answer, NEW_TOKENS)
    assert answer.finished is not None
    return answer.finished.timing


@pytest.mark.parametrize("slots", [1, 16])
@pytest.mark.parametrize("cpu_layers", range(LAYERS + 1))
@pytest.mark.parametrize("adapter", POINTS)
def test_handover_anywhere(
    world: World, made_flags: list[FakeFlags], adapter: str, cpu_layers: int, slots: int
) -> None:
    handoff = HandoffConfig(mode="fixed", cpu_layers=cpu_layers)
    with harness_of(world, handoff=handoff, cpu_slots=slots) as harness:
        number = harness.submit(PROMPT, adapter, max_tokens=NEW_TOKENS, logprobs=0)
        harness.run()
        assert compare(world, harness, number, adapter).cpu_layers == cpu_layers
        harness.run_until(lambda: harness.instance.bridge.orphans == 0)
    assert len(made_flags) == 1


@pytest.mark.usefixtures("made_flags")
def test_several_at_once_over_a_slow_link(world: World) -> None:
    with harness_of(world, handoff=HandoffConfig(), copy_bytes_per_second=1e6, runs_ahead=True) as harness:
        numbers = {
            harness.submit(PROMPT, name, max_tokens=NEW_TOKENS, logprobs=0): name for name in ("all", "some", "all")
        }
        harness.run()
        timings = [compare(world, harness, number, name) for number, name in numbers.items()]
        assert any(timing.cpu_layers > 0 for timing in timings)


@pytest.mark.parametrize("place", ["first", "last of a layer", "last"])
def test_a_worker_lost_while_the_pass_goes_on(world: World, made_flags: list[FakeFlags], place: str) -> None:
    """The pass has enqueued more before it turns out; in float32 no token changes."""
    job = {"first": 1, "last of a layer": POINTS["all"], "last": LAYERS * POINTS["all"]}[place]
    jobs = 0
    with harness_of(world) as harness:

        def stop_workers() -> None:
            nonlocal jobs
            jobs += 1
            for pid in harness.instance.workers.worker_pids if jobs == job else ():
                os.kill(pid, signal.SIGSTOP)

        made_flags[0].on_write = stop_workers
        number = harness.submit(PROMPT, "all", max_tokens=NEW_TOKENS, logprobs=0)
        harness.run()
        assert jobs >= job
        assert compare(world, harness, number, "all").prefill_attempts == 2
        harness.run_until(lambda: harness.instance.bridge.orphans == 0)
        assert harness.instance.workers.slot_table.free_slots() == harness.config.cpu_slots


def test_a_cancelled_pass_leaves_its_jobs_to_the_device(world: World, made_flags: list[FakeFlags]) -> None:
    with harness_of(world, copy_bytes_per_second=1e4) as harness:
        flags = made_flags[0]
        flags.is_late = True
        host_free_bytes = harness.instance.state(0).host_free_bytes
        number = harness.submit(PROMPT, "all", max_tokens=NEW_TOKENS, logprobs=0)
        harness.run_until(lambda: harness.instance.bridge.orphans > POINTS["all"])
        harness.engine.cancel(number)
        harness.run_until(lambda: not harness.engine.passes)
        finished = harness.answers[number].finished
        assert finished is not None
        assert finished.reason is FinishReason.CANCELLED
        harness.engine.versions.evict(harness.open("all"))
        for _ in range(5):
            harness.step()
        assert harness.instance.bridge.orphans > POINTS["all"]
        assert harness.instance.state(0).host_free_bytes < host_free_bytes
        flags.is_late = False
        harness.run_until(lambda: harness.instance.state(0).host_free_bytes == host_free_bytes)
        assert harness.instance.bridge.orphans == 0

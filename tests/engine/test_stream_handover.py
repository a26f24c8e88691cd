"""A cold prefill as on CUDA, without a GPU: rows through the kernels in Triton's interpreter, lanes that are late."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from segue.cpu_lora import JobRing
from segue.engine.config import HandoffConfig
from segue.engine.cuda.bridge import StreamTransport
from segue.engine.instance import EngineInstance
from segue.engine.lanes import Lanes
from segue.engine.lora.bridge import RowTransport
from segue.types import FinishReason, Timing
from tests.checkpoints import (
    ALL_TARGETS,
    TinyModel,
    load_reference,
    reference_greedy,
    write_random_adapter,
    write_random_model,
)
from tests.engine.fake_flags import FakeFlags
from tests.engine.fake_lanes import FakeLateLane
from tests.engine.harness import EngineHarness

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled where there is a GPU")

LAYERS = 3
NEW_TOKENS = 4
PROMPT = [9, 77, 201, 4, 31, 150, 12]
# LoRA points at which each adapter has modules.
POINTS = {"all": 4, "some": 2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("stream")
    model_dir = write_random_model(root / "model", TinyModel(layers=LAYERS, kv_heads=1), seed=8)
    write_random_adapter(root / "adapters" / "all", model_dir, rank=16, targets=ALL_TARGETS, seed=1)
    write_random_adapter(
        root / "adapters" / "some", model_dir, rank=3, targets=("q_proj", "v_proj", "down_proj"), seed=2
    )
    return model_dir, root / "adapters"


@pytest.fixture
def made_flags(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FakeFlags]]:
    """Engines in this test have streams; their flags."""
    flags: list[FakeFlags] = []

    def transport(instance: EngineInstance, ring: JobRing, _device: torch.device) -> RowTransport:
        flags.append(FakeFlags(instance._memory))
        return StreamTransport(ring, flags[-1])

    def on(_device: torch.device) -> Lanes:
        return Lanes(FakeLateLane)

    monkeypatch.setattr(EngineInstance, "_transport", transport)
    monkeypatch.setattr(Lanes, "on", on)
    yield flags
    assert len(flags) == 1


def harness_of(folders: tuple[Path, Path], **config: Any) -> EngineHarness:
    settings: dict[str, Any] = {"handoff": HandoffConfig(mode="fixed", cpu_layers=LAYERS), "cpu_stall_seconds": 0.3}
    return EngineHarness(*folders, **{**settings, **config})


def compare(folders: tuple[Path, Path], harness: EngineHarness, number: int, adapter: str) -> Timing:
    answer = harness.answers[number]
    expected = reference_greedy(load_reference(folders[0], folders[1] / adapter), PROMPT, NEW_TOKENS)
    assert tuple(answer.tokens) == expected
    assert answer.finished is not None
    return answer.finished.timing


@pytest.mark.parametrize("slots", [1, 16])
@pytest.mark.parametrize("cpu_layers", range(LAYERS + 1))
@pytest.mark.parametrize("adapter", POINTS)
def test_handover_anywhere(
    folders: tuple[Path, Path], made_flags: list[FakeFlags], adapter: str, cpu_layers: int, slots: int
) -> None:
    handoff = HandoffConfig(mode="fixed", cpu_layers=cpu_layers)
    with harness_of(folders, handoff=handoff, cpu_slots=slots) as harness:
        number = harness.submit(PROMPT, adapter, max_tokens=NEW_TOKENS)
        harness.run()
        assert compare(folders, harness, number, adapter).cpu_layers == cpu_layers
        harness.run_until(lambda: harness.instance.bridge.orphans == 0)
    assert len(made_flags) == 1


@pytest.mark.usefixtures("made_flags")
def test_several_at_once_over_a_slow_link(folders: tuple[Path, Path]) -> None:
    with harness_of(folders, handoff=HandoffConfig(), copy_bytes_per_second=1e6, runs_ahead=True) as harness:
        numbers = {harness.submit(PROMPT, name, max_tokens=NEW_TOKENS): name for name in ("all", "some", "all")}
        harness.run()
        timings = [compare(folders, harness, number, name) for number, name in numbers.items()]
        assert any(timing.cpu_layers > 0 for timing in timings)


@pytest.mark.parametrize("place", ["first", "last of a layer", "last"])
def test_a_worker_lost_while_the_pass_goes_on(
    folders: tuple[Path, Path], made_flags: list[FakeFlags], place: str
) -> None:
    """The pass has enqueued more before it turns out; in float32 no token changes."""
    job = {"first": 1, "last of a layer": POINTS["all"], "last": LAYERS * POINTS["all"]}[place]
    jobs = 0
    with harness_of(folders) as harness:

        def stop_workers() -> None:
            nonlocal jobs
            jobs += 1
            for pid in harness.instance.workers.worker_pids if jobs == job else ():
                os.kill(pid, signal.SIGSTOP)

        made_flags[0].on_write = stop_workers
        number = harness.submit(PROMPT, "all", max_tokens=NEW_TOKENS)
        harness.run()
        assert jobs >= job
        assert compare(folders, harness, number, "all").prefill_attempts == 2
        harness.run_until(lambda: harness.instance.bridge.orphans == 0)
        assert harness.instance.workers.slot_table.free_slots() == harness.config.cpu_slots


def test_a_cancelled_pass_leaves_its_jobs_to_the_device(
    folders: tuple[Path, Path], made_flags: list[FakeFlags]
) -> None:
    with harness_of(folders, copy_bytes_per_second=1e4) as harness:
        flags = made_flags[0]
        flags.is_late = True
        host_free_bytes = harness.instance.state(0).host_free_bytes
        number = harness.submit(PROMPT, "all", max_tokens=NEW_TOKENS)
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

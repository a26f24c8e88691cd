"""What the engine refuses, and what fails alone."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, cast

import pytest
from safetensors.torch import load_file, save_file

from segue.engine.forward_pass import ForwardPass, PassState
from segue.engine.lanes import LoopLane
from segue.engine.lora.apply import Blocked
from segue.errors import AdapterRejectedError, InvalidRequestError, OverloadedError
from tests.checkpoints import TinyModel, load_reference, reference_greedy, write_random_adapter, write_random_model
from tests.engine.harness import EngineHarness

PROMPT = [5, 6, 7, 8, 9]


class FakeBlockedApplier:
    """Of a pass that waits for a slot of the CPU workers."""

    blocked = Blocked.SLOT
    job = None


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("core")
    model = write_random_model(root / "model", TinyModel(layers=2), seed=1)
    for name in ("good", "overflowing"):
        write_random_adapter(root / "adapters" / name, model, rank=8, seed=3)
    write_random_adapter(root / "adapters" / "large", model, rank=64, seed=4)
    weights = root / "adapters" / "overflowing" / "adapter_model.safetensors"
    save_file({name: tensor * 1e30 for name, tensor in load_file(weights).items()}, weights)
    return model, root / "adapters"


def failure(harness: EngineHarness, number: int) -> tuple[str, str]:
    failed = harness.answers[number].failed
    assert failed is not None
    return failed.reason, failed.message


def test_an_adapter_whose_output_overflows_fails_alone(folders: tuple[Path, Path], device: str) -> None:
    model, adapters = folders
    with EngineHarness(model, adapters, device=device) as harness:
        asked = {name: harness.submit(PROMPT, name, max_tokens=16) for name in ("good", "overflowing")}
        base = harness.submit(PROMPT, max_tokens=16)
        harness.run()
        reason, message = failure(harness, asked["overflowing"])
        assert reason == AdapterRejectedError.reason
        assert "not finite" in message
        expected = reference_greedy(load_reference(model, adapters / "good"), PROMPT, 16)
        assert tuple(harness.answers[asked["good"]].tokens) == expected
        assert tuple(harness.answers[base].tokens) == reference_greedy(load_reference(model), PROMPT, 16)


def test_an_adapter_that_no_pool_page_count_can_hold_is_refused_when_it_is_opened(
    folders: tuple[Path, Path], device: str
) -> None:
    model, adapters = folders
    with EngineHarness(model, adapters, device=device, pages=24, cpu_workers=0) as harness:
        version_id = harness.open("large")
        harness.step()
        assert "pages" in harness.version_failures[version_id]
        number = harness.submit(PROMPT, "large", max_tokens=4)
        good = harness.submit(PROMPT, "good", max_tokens=4)
        harness.run()
        assert failure(harness, number)[0] == AdapterRejectedError.reason
        assert len(harness.answers[good].tokens) == 4


def test_a_request_that_an_empty_pool_could_not_hold_is_refused(folders: tuple[Path, Path], device: str) -> None:
    model, adapters = folders
    with EngineHarness(model, adapters, device=device, pages=8, cpu_workers=0) as harness:
        number = harness.submit(PROMPT, max_tokens=500)
        harness.run()
        assert failure(harness, number)[0] == InvalidRequestError.reason


def test_a_full_queue_refuses(folders: tuple[Path, Path], device: str) -> None:
    model, adapters = folders
    with EngineHarness(model, adapters, device=device, max_waiting=2, cpu_workers=0) as harness:
        numbers = [harness.submit(PROMPT, max_tokens=2) for _ in range(3)]
        harness.run()
        assert failure(harness, numbers[2])[0] == OverloadedError.reason
        assert all(len(harness.answers[number].tokens) == 2 for number in numbers[:2])


def test_a_pass_finds_the_pages_that_another_newcomer_was_to_bring(folders: tuple[Path, Path], device: str) -> None:
    """A flood's request is admitted first, and with it the adapter's pages; the pass has only another tenant's rows."""
    with EngineHarness(*folders, device=device, cpu_workers=0, budget_tokens=16, prefix_cache=False) as harness:
        flood = [harness.submit([5, *range(6, 26)], "good", level={"tenant": "flood"}, max_tokens=2) for _ in range(10)]
        small = harness.submit([9, *range(6, 26)], "good", level={"tenant": "small"}, max_tokens=2)
        harness.step()
        admitted = [request.number for request in harness.engine.requests.admitted]
        assert sorted(admitted) == [flood[0], small]
        harness.run()
        finished = [harness.answers[number].finished for number in (flood[0], small)]
        assert [item and item.timing.prefill_attempts for item in finished] == [1, 1]


def test_the_core_is_free_for_workers_while_a_pass_waits_for_a_slot(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    naps: list[float] = []
    with EngineHarness(*folders, cpu_workers=0, check_invariants=False) as harness:
        engine, applier = harness.engine, cast(Any, FakeBlockedApplier())
        blocked = ForwardPass((), applier, None, cast(Any, iter(())), LoopLane(), None, lambda: None)
        blocked.state = PassState.BLOCKED
        engine._passes.append(blocked)
        assert engine.must_look_again
        with monkeypatch.context() as patch:
            patch.setattr(time, "sleep", naps.append)
            engine.await_device(0.01)
        engine._passes.clear()
    assert len(naps) == 1
    assert naps[0] > 0

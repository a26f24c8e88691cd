"""A pass in a lane that the device is late with keeps its pages, and its tokens come, until the lane is quiet."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from segue.engine.config import HandoffConfig
from segue.engine.lanes import Lanes
from segue.engine.request import RequestState
from segue.types import FinishReason
from tests.checkpoints import TinyModel, load_reference, reference_greedy, write_random_adapter, write_random_model
from tests.engine.fake_lanes import QUERIES, FakeLateLane
from tests.engine.harness import EngineHarness

PROMPT = [7, 21, 90, 14, 33]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("lanes")
    model_dir = write_random_model(root / "model", TinyModel(layers=3), seed=6)
    for seed, name in enumerate(("a", "b", "c")):
        write_random_adapter(root / "adapters" / name, model_dir, rank=8, seed=seed)
    return model_dir, root / "adapters"


@pytest.fixture
def late_lanes(monkeypatch: pytest.MonkeyPatch) -> list[FakeLateLane]:
    """All lanes that engines have made."""
    lanes: list[FakeLateLane] = []

    def make() -> FakeLateLane:
        lanes.append(FakeLateLane())
        return lanes[-1]

    def on(device: torch.device) -> Lanes:
        assert device.type == "cpu"
        return Lanes(make)

    monkeypatch.setattr(Lanes, "on", on)
    return lanes


@pytest.mark.usefixtures("late_lanes")
@pytest.mark.parametrize("mode", ["auto", "stream"])
def test_answers_are_those_of_peft(folders: tuple[Path, Path], mode: str) -> None:
    handoff = HandoffConfig(mode=mode)
    with EngineHarness(*folders, handoff=handoff, copy_bytes_per_second=5e6, runs_ahead=True) as harness:
        asked = [(name, [*PROMPT, place]) for place, name in enumerate(["a", "b", None, "c", "a", "b"])]
        numbers = [harness.submit(prompt, name, max_tokens=6) for name, prompt in asked]
        harness.run()
        for number, (name, prompt) in zip(numbers, asked, strict=True):
            reference = load_reference(folders[0], None if name is None else folders[1] / name)
            assert tuple(harness.answers[number].tokens) == reference_greedy(reference, prompt, 6)


@pytest.mark.usefixtures("late_lanes")
def test_pages_of_one_that_was_cancelled_come_back_when_the_lane_is_quiet(folders: tuple[Path, Path]) -> None:
    with EngineHarness(*folders, copy_bytes_per_second=1e4, cpu_workers=0, prefix_cache=False) as harness:
        number = harness.submit(PROMPT, "a", max_tokens=6)
        harness.run_until(lambda: len(harness.engine.passes) == 1)
        request = harness.engine.requests.get(number)
        assert request is not None
        harness.engine.cancel(number)
        steps = 0
        while harness.engine.requests.get(number) is not None:
            assert request.state is RequestState.ENDING
            assert request.pages
            assert harness.engine.can_go_on or not steps, "nothing would wake it"
            harness.step()
            steps += 1
        assert steps == QUERIES
        finished = harness.answers[number].finished
        assert finished is not None
        assert finished.reason is FinishReason.CANCELLED
        assert not harness.engine.passes


@pytest.mark.parametrize("cpu_layers", [0, 3])
def test_a_cold_pass_is_at_most_two_layers_ahead(
    folders: tuple[Path, Path], late_lanes: list[FakeLateLane], cpu_layers: int
) -> None:
    handoff = HandoffConfig(mode="fixed", cpu_layers=cpu_layers)
    with EngineHarness(*folders, handoff=handoff, copy_bytes_per_second=4e4) as harness:
        number = harness.submit(PROMPT, "a", max_tokens=2)
        harness.run_until(lambda: bool(harness.answers[number].tokens))
        assert [lane.most_ahead for lane in late_lanes] == [2]

"""A pass in a lane that the device is late with keeps its pages, and its tokens come, until the lane is quiet."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import torch

from segue.engine.config import HandoffConfig
from segue.engine.lanes import Lanes
from segue.engine.request import RequestState
from segue.types import FinishReason
from tests.checkpoints import TinyModel, load_reference, reference_greedy, write_random_adapter, write_random_model
from tests.engine.harness import EngineHarness

PROMPT = [7, 21, 90, 14, 33]
QUERIES = 5


class FakeLateLane:
    """Computes at once, as the CPU does, and says so only when it has been asked several times."""

    def __init__(self) -> None:
        self.queries_left: int | None = None
        self.begun = False
        self.layers_ahead = 0
        self.is_late = False

    def begin(self) -> None:
        assert not self.begun, "another pass is in the lane"
        self.begun = True
        self.queries_left = None
        self.layers_ahead = 0

    def enter(self) -> AbstractContextManager[object]:
        assert self.begun
        assert self.queries_left is None, "the pass had ended"
        return nullcontext()

    def mark(self) -> None:
        self.layers_ahead += 1
        assert self.layers_ahead <= 2, "the pass is too far ahead"

    @property
    def is_close(self) -> bool:
        # A layer is done every other time that it is asked.
        self.is_late = not self.is_late
        if self.layers_ahead and not self.is_late:
            self.layers_ahead -= 1
        return self.layers_ahead < 2

    def end(self) -> None:
        self.queries_left = QUERIES

    @property
    def is_quiet(self) -> bool:
        if self.queries_left is None:
            return False
        self.queries_left = max(0, self.queries_left - 1)
        self.begun = self.queries_left > 0
        return not self.begun


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("lanes")
    model_dir = write_random_model(root / "model", TinyModel(layers=3), seed=6)
    for seed, name in enumerate(("a", "b", "c")):
        write_random_adapter(root / "adapters" / name, model_dir, rank=8, seed=seed)
    return model_dir, root / "adapters"


@pytest.fixture
def late_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    def on(device: torch.device) -> Lanes:
        assert device.type == "cpu"
        return Lanes(FakeLateLane)

    monkeypatch.setattr(Lanes, "on", on)


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

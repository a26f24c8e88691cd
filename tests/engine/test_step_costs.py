"""An engine tells the load and the time of its steps, and its profile learns from them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from segue.config import to_toml
from segue.scheduler.cost_fit import TimedStep
from segue.scheduler.cost_model import CostProfile, StepCoefficients, StepLoad
from tests.checkpoints import TinyModel, write_random_adapter, write_random_model
from tests.engine.harness import EngineHarness

# A step of the tiny model takes a millisecond or so: by this profile it takes ten seconds.
SLOW = CostProfile(
    name="far too slow",
    layers=3,
    decode=StepCoefficients(fixed_seconds=10.0),
    prefill=StepCoefficients(fixed_seconds=10.0, seconds_per_token=1e-3),
)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    model_dir = write_random_model(tmp_path / "model", TinyModel())
    write_random_adapter(tmp_path / "adapters" / "eight", model_dir, rank=8)
    write_random_adapter(tmp_path / "adapters" / "four", model_dir, rank=4)
    return model_dir, tmp_path / "adapters"


def test_each_steps_rows_are_told_by_kind(folders: tuple[Path, Path]) -> None:
    seen: list[TimedStep] = []
    with EngineHarness(*folders, cpu_workers=0, chunk_tokens=5) as harness:
        for name in ("eight", "four"):
            harness.warm(name)
        store = harness.instance.store
        costs = [store.cost(harness.open(name)) for name in ("eight", "four")]
        assert [cost.rank for cost in costs] == [8, 4]
        assert costs[0].weight_bytes == 2 * costs[1].weight_bytes > 0
        harness.engine.step_costs.listener = seen.append
        harness.submit(range(3, 10), "eight", max_tokens=8)
        harness.step()
        harness.submit(range(3, 9), "four", max_tokens=4)
        harness.submit(range(4, 11), None, max_tokens=4)
        harness.step()
        harness.run()
    both = costs[0].weight_bytes + costs[1].weight_bytes
    assert seen[0].decodes == StepLoad()
    eight_bytes = costs[0].weight_bytes
    assert seen[0].prompts == StepLoad(
        tokens=7, context_tokens=28, adapters=1, adapter_bytes=eight_bytes, max_rank=8, rank_tokens=56
    )
    # One decodes, and five rows of the second prompt ride.
    assert seen[1].decodes == StepLoad(
        tokens=1, context_tokens=8, adapters=1, adapter_bytes=eight_bytes, max_rank=8, rank_tokens=8
    )
    assert (seen[1].prompts.tokens, seen[1].prompts.context_tokens, seen[1].prompts.rank_tokens) == (5, 15, 20)
    three = [step.decodes for step in seen if step.decodes.tokens == 3]
    assert three
    assert {(load.adapters, load.adapter_bytes, load.max_rank, load.rank_tokens) for load in three} == {
        (2, both, 8, 12)
    }
    assert all(step.seconds > 0 for step in seen)


def test_the_profile_follows_what_is_measured(folders: tuple[Path, Path]) -> None:
    path = folders[0].parent / "profile.toml"
    path.write_text(to_toml(SLOW))
    with EngineHarness(*folders, cpu_workers=0, profile_path=str(path)) as harness:
        before = harness.instance.state(0).costs
        assert before is not None
        assert before.profile == SLOW
        assert (before.decode.steps, before.prefill.steps) == (0, 0)
        for _ in range(4):
            harness.submit(range(3, 10), max_tokens=40)
        harness.run()
        after = harness.instance.state(1).costs
        assert after is not None
        assert harness.engine.step_costs.profile == after.profile
    assert (after.decode.steps, after.prefill.steps) == (39, 1)
    # The error is nearly all of the prediction, and the scale has come down to its bound.
    assert 0.9 < after.decode.mean_error <= 1.0
    assert after.decode.scales[0] == 0.5
    assert after.profile.decode == StepCoefficients(fixed_seconds=5.0)
    assert after.profile.prefill.fixed_seconds < 10.0
    assert dataclasses.replace(after.profile, decode=SLOW.decode, prefill=SLOW.prefill) == SLOW


def test_steps_beside_a_pass_teach_nothing(folders: tuple[Path, Path]) -> None:
    """A pass of a loading adapter takes the device's time as well."""
    seen: list[TimedStep] = []
    with EngineHarness(*folders, cpu_workers=0, copy_bytes_per_second=2e5) as harness:
        harness.engine.step_costs.listener = seen.append
        harness.submit(range(3, 10), "eight", max_tokens=2)
        harness.run_until(lambda: bool(harness.engine.passes))
        seen.clear()
        harness.submit(range(3, 10), max_tokens=64)
        beside = 0
        while harness.engine.passes and not harness.answers[2].ended:
            harness.step()
            beside += 1
            assert not seen or not harness.engine.passes
        assert beside > 2
        harness.run()
        assert seen


def test_without_a_profile_there_is_nothing_to_tell(folders: tuple[Path, Path]) -> None:
    with EngineHarness(*folders, cpu_workers=0) as harness:
        harness.submit(range(3, 10), max_tokens=4)
        harness.run()
        assert harness.instance.state(0).costs is None
        assert harness.engine.step_costs.profile is None

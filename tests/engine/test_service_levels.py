"""What a request is promised, in a real engine: who goes first, who is refused, and what the state says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from segue.config import ConfigError
from segue.engine.config import EngineConfig
from segue.scheduler.cost_model import CostProfile, StepCoefficients
from tests.checkpoints import TinyModel, write_random_model
from tests.engine.harness import EngineHarness

# Slower than any machine, so that what it refuses does not depend on the machine.
PROFILE = CostProfile(
    name="slow",
    layers=2,
    decode=StepCoefficients(fixed_seconds=10.0),
    prefill=StepCoefficients(fixed_seconds=10.0, seconds_per_token=1.0),
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("levels")
    (root / "adapters").mkdir()
    return write_random_model(root / "model", TinyModel(layers=2), seed=3), root / "adapters"


def engine(folders: tuple[Path, Path], **config: Any) -> EngineHarness:
    return EngineHarness(*folders, **{"cpu_workers": 0, **config})


def order_of_first_tokens(harness: EngineHarness, numbers: list[int]) -> list[int]:
    came: list[int] = []
    while len(came) < len(numbers):
        harness.step()
        came += [number for number in numbers if harness.answers[number].tokens and number not in came]
    return came


@pytest.mark.parametrize(("policy", "expected"), [("slo", [3, 4, 2]), ("fcfs", [2, 3, 4])])
def test_who_has_a_target_goes_first_unless_it_is_first_come_first_served(
    folders: tuple[Path, Path], policy: str, expected: list[int]
) -> None:
    with engine(folders, policy=policy, max_running=1) as harness:
        harness.submit([5, 6], max_tokens=4)
        harness.step()
        harness.submit([5, 7], max_tokens=2)
        harness.submit([5, 8], max_tokens=2, level={"ttft_seconds": 9.0})
        harness.submit([5, 9], max_tokens=2, level={"ttft_seconds": 9.5})
        assert order_of_first_tokens(harness, [2, 3, 4]) == expected


def test_a_tenants_flood_does_not_keep_another_waiting(folders: tuple[Path, Path]) -> None:
    with engine(folders, max_running=2) as harness:
        flood = [harness.submit([5, 6, number], level={"tenant": "flood"}, max_tokens=40) for number in range(7, 27)]
        shares = harness.engine.requests.waiting.shares
        shares.credit_tokens = 100
        harness.run_until(lambda: shares.counters["flood"] > 300)
        waiting = len(harness.engine.requests.queue)
        assert waiting > 5
        small = harness.submit([9, 9], level={"tenant": "small"}, max_tokens=2)
        harness.run_until(lambda: harness.answers[small].ended)
        assert sum(not harness.answers[number].ended for number in flood) >= waiting - 3
        harness.run()


def test_a_target_is_refused_for_good_or_for_now_by_the_profile(folders: tuple[Path, Path]) -> None:
    with engine(folders, profile=PROFILE, max_running=1) as harness:
        never = harness.submit([5, 6], level={"ttft_seconds": 11.0, "reject_on_miss": True})
        harness.step()
        failed = harness.answers[never].failed
        assert failed is not None
        assert (failed.reason, failed.retry_after_seconds) == ("SLO_INFEASIBLE", None)
        taken = harness.submit([5, 6], max_tokens=3, level={"ttft_seconds": 13.0, "reject_on_miss": True})
        harness.step()
        now = harness.submit([5, 6], max_tokens=3, level={"ttft_seconds": 13.0, "reject_on_miss": True})
        best_effort = harness.submit([5, 6], max_tokens=3, level={"ttft_seconds": 0.001})
        harness.run()
        failed = harness.answers[now].failed
        assert failed is not None
        assert failed.reason == "OVERLOADED"
        assert failed.retry_after_seconds is not None
        # Two tokens of the one that runs are left, each of ten seconds.
        assert 18.0 <= failed.retry_after_seconds <= 22.0
        for number in (taken, best_effort):
            assert harness.answers[number].finished is not None
        assert harness.instance.state(1).refusals == {"SLO_INFEASIBLE": 1, "OVERLOADED": 1}


def test_nothing_is_refused_for_its_target_before_anything_was_measured(folders: tuple[Path, Path]) -> None:
    with engine(folders) as harness:
        first = harness.submit([5, 6], max_tokens=4, level={"tpot_seconds": 1e-9, "reject_on_miss": True})
        harness.run()
        assert harness.answers[first].finished is not None
        second = harness.submit([5, 6], max_tokens=4, level={"tpot_seconds": 1e-9, "reject_on_miss": True})
        harness.run()
        failed = harness.answers[second].failed
        assert failed is not None
        assert failed.reason == "SLO_INFEASIBLE"


def test_a_tenant_has_its_part_of_the_queue_and_no_more(folders: tuple[Path, Path]) -> None:
    with engine(folders, max_waiting=8, tenant_queue_share=0.5) as harness:
        numbers = [harness.submit([5, 6], max_tokens=2, level={"tenant": "a"}) for _ in range(5)]
        other = harness.submit([5, 6], max_tokens=2, level={"tenant": "b"})
        harness.run()
        failed = [harness.answers[number].failed for number in (*numbers, other)]
        assert [item is not None for item in failed] == [False] * 4 + [True, False]
        assert failed[4] is not None
        assert "quota" in failed[4].message


def test_a_full_queue_still_takes_those_that_have_little_of_it(folders: tuple[Path, Path]) -> None:
    with engine(folders, max_waiting=4) as harness:
        numbers = [harness.submit([5, 6], max_tokens=2, level={"tenant": "a"}) for _ in range(5)]
        others = [harness.submit([5, 6], max_tokens=2, level={"tenant": "b"}) for _ in range(3)]
        harness.run()
        failed = [harness.answers[number].failed is not None for number in (*numbers, *others)]
        assert failed == [False, False, False, False, True, False, False, True]


@pytest.mark.parametrize(
    ("field", "value"),
    [("policy", "lifo"), ("tenant_queue_share", 0.0), ("tenant_queue_share", 1.5), ("max_adapters", 0)],
)
def test_settings_that_make_no_sense_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=field):
        EngineConfig(model_dir="model", **{field: value})

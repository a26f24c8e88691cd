"""Plans of hand-overs carried out by an engine: sources as planned, right answers, and costs that learn."""

from __future__ import annotations

import dataclasses
import logging
import re
from typing import Any

import pytest

from segue.config import ConfigError
from segue.cpu_lora import Job, JobRing
from segue.engine.config import HandoffConfig
from segue.engine.lora.bridge import CpuBridge
from segue.engine.messages import Finished
from segue.scheduler.cost_model import CopyCoefficients, CostProfile, CpuCoefficients, StepCoefficients
from segue.scheduler.handoff_costs import MEASURED_LIMITS
from segue.types import LoraSource
from tests.checkpoints import ALL_TARGETS, TinyModel, write_random_adapter, write_random_model
from tests.engine.harness import EngineHarness
from tests.engine.worlds import World, prompts

LAYERS = 4
NEW_TOKENS = 6
# A layer of the adapter takes 0.3 s and more on this link, a row of it 2 ms.
SLOW_LINK = 1e6


def profile(cpu_seconds: float | None, layers: int = LAYERS) -> CostProfile:
    """A machine whose CPU adds so much to each layer; None for one without CPU help."""
    step = StepCoefficients(fixed_seconds=1e-3)
    return CostProfile(
        name="a test's",
        layers=layers,
        decode=step,
        prefill=step,
        copy=CopyCoefficients(seconds_per_byte=1 / SLOW_LINK),
        cpu=None if cpu_seconds is None else CpuCoefficients(fixed_seconds=cpu_seconds),
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("planner")
    model_dir = write_random_model(root / "model", TinyModel(layers=LAYERS), seed=41)
    for seed, name in enumerate(("a", "b")):
        write_random_adapter(root / "adapters" / name, model_dir, rank=128, targets=ALL_TARGETS, seed=seed)
    return World(model_dir, root / "adapters", LAYERS)


def harness_with(world: World, cost: CostProfile | None, device: str, **config: object) -> EngineHarness:
    settings: dict[str, object] = {
        "device": device,
        "handoff": HandoffConfig(mode="planner"),
        "copy_bytes_per_second": SLOW_LINK,
        **config,
    }
    return EngineHarness(world.model_dir, world.adapters_dir, profile=cost, **settings)


def answer(world: World, harness: EngineHarness, name: str) -> Finished:
    """A right answer from an adapter that is in host memory."""
    store = harness.instance.store
    version_id = harness.open(name)
    store.start_load(version_id)
    harness.run_until(lambda: store.is_verified(version_id))
    (prompt,) = prompts(1, seed=9)
    number = harness.submit(prompt[:6], name, max_tokens=NEW_TOKENS, logprobs=0)
    harness.run()
    world.compare(name, prompt[:6], harness.answers[number], NEW_TOKENS)
    finished = harness.answers[number].finished
    assert finished is not None
    return finished


@pytest.mark.parametrize(
    ("cpu_seconds", "source"),
    [(1e-4, LoraSource.CPU), (10.0, LoraSource.DEVICE), (None, LoraSource.DEVICE)],
    ids=["a fast CPU", "a slow CPU", "no help"],
)
def test_layers_come_from_where_the_profile_says(
    world: World, device: str, cpu_seconds: float | None, source: LoraSource
) -> None:
    with harness_with(world, profile(cpu_seconds), device) as harness:
        timing = answer(world, harness, "a").timing
        assert [layer.source for layer in timing.layers] == [source] * LAYERS


@pytest.mark.parametrize(
    ("cpu", "shares"),
    [
        (CpuCoefficients(core_seconds_per_token_rank=1e-7), {2}),
        (CpuCoefficients(core_seconds_per_rank=1e-7), {1}),
        (CpuCoefficients(core_seconds_per_token_rank=1e-7, seconds_per_worker=1e-3), {1}),
    ],
    ids=["rows are dear", "weights are dear", "workers are dear"],
)
def test_as_many_workers_share_a_job_as_the_profile_says(
    world: World, device: str, monkeypatch: pytest.MonkeyPatch, cpu: CpuCoefficients, shares: set[int]
) -> None:
    """Six rows, of which each of two workers would have less than the default's least share."""
    found = []
    prepare = JobRing.prepare

    def watched(ring: JobRing, *args: Any) -> Job | None:
        job = prepare(ring, *args)
        if job is not None and job.rows.shape[0] == 6:
            found.append(len(job.shares))
        return job

    monkeypatch.setattr(JobRing, "prepare", watched)
    cost = dataclasses.replace(profile(0.0), cpu=cpu)
    with harness_with(world, cost, device, cpu_workers=2) as harness:
        assert harness.instance.workers.wait_ready(2, 60)
        answer(world, harness, "a")
        assert harness.instance.planner.shared_cores(None) == 2
    assert len(found) >= 4 * LAYERS
    assert set(found) == shares


def test_passes_with_layers_on_the_cpu_share_the_workers(world: World, device: str) -> None:
    cpu = CpuCoefficients(core_seconds_per_token_rank=1e-7)
    with harness_with(world, dataclasses.replace(profile(0.0), cpu=cpu), device, cpu_workers=2) as harness:
        assert harness.instance.workers.wait_ready(2, 60)
        planner, version_id = harness.instance.planner, harness.open("a")
        one, other = object(), object()
        assert planner.job_workers(one, 0, {version_id: 100}) == 2
        assert planner.job_workers(other, 0, {version_id: 100}) == 1
        assert planner.job_workers(one, 0, {version_id: 100}) == 1
        planner.leave_workers(other)
        assert planner.job_workers(one, 0, {version_id: 100}) == 2
        assert planner.job_workers(one, 0, {version_id: 1}) == 1


def test_without_a_profile_the_ring_shares_a_job(world: World, device: str) -> None:
    with harness_with(world, None, device) as harness:
        assert harness.instance.planner.job_workers(object(), 0, {harness.open("a"): 100}) is None


def test_workers_that_come_while_a_pass_waits_help_it(
    world: World, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan was made without them: nothing was to be chosen then, however late the weights."""
    with harness_with(world, profile(1e-4), device) as harness:
        with monkeypatch.context() as patch:
            patch.setattr(CpuBridge, "ready_workers", 0)
            store, version_id = harness.instance.store, harness.open("a")
            store.start_load(version_id)
            harness.run_until(lambda: store.is_verified(version_id))
            (prompt,) = prompts(1, seed=9)
            number = harness.submit(prompt[:6], "a", max_tokens=NEW_TOKENS, logprobs=0)
            harness.run_until(lambda: any(item.applier.awaited_seconds > 0 for item in harness.engine.passes))
        harness.run()
        world.compare("a", prompt[:6], harness.answers[number], NEW_TOKENS)
        finished = harness.answers[number].finished
        assert finished is not None
        assert finished.timing.cpu_layers > 0


def test_harm_to_others_keeps_the_cpu_out(world: World, device: str) -> None:
    """Another adapter loads: rows on the link would hold it up. Of two that arrive together only one may have help."""
    helped = []
    for weight in (0.0, 1e6):
        handoff = HandoffConfig(mode="planner", harm_weight=weight)
        with harness_with(world, profile(1e-4), device, handoff=handoff) as harness:
            for name in ("a", "b"):
                harness.instance.store.start_load(harness.open(name))
            harness.run_until(lambda: all(harness.instance.store.is_verified(harness.open(name)) for name in "ab"))
            (prompt,) = prompts(1, seed=9)
            numbers = [harness.submit(prompt[:6], name, max_tokens=1, logprobs=0) for name in ("a", "b")]
            harness.run()
            for number, name in zip(numbers, ("a", "b"), strict=True):
                world.compare(name, prompt[:6], harness.answers[number], 1)
            finished = [harness.answers[number].finished for number in numbers]
            helped.append([item.timing.cpu_layers for item in finished if item is not None])
    assert all(layers > 0 for layers in helped[0])
    assert helped[1][0] == 0


def test_what_happened_is_logged_and_learned(world: World, device: str, caplog: pytest.LogCaptureFixture) -> None:
    """Each prefill of a loading adapter leaves a line, with what was planned and what became of it."""
    with (
        caplog.at_level(logging.INFO, logger="segue.engine.lora.handover"),
        harness_with(world, profile(1e-4), device) as harness,
    ):
        planner = harness.instance.planner
        before = planner.costs.compute
        number = answer(world, harness, "a").number
        learned = planner.costs.compute
    lines = [record.getMessage() for record in caplog.records]
    match = re.match(
        rf"hand-over requests={number} version=\d+ rows=6 first_layer=0 planned=cpu:{LAYERS} happened=cpu:{LAYERS} "
        r"planned_seconds=(\S+) seconds=(\S+) ",
        lines[0],
    )
    assert match, lines
    assert float(match[1]) > 0 < float(match[2])
    assert learned.steps > before.steps
    assert learned.scales != before.scales
    learned.check()
    assert learned.limits == MEASURED_LIMITS


def test_without_a_profile_the_answers_are_right(world: World, device: str) -> None:
    with harness_with(world, None, device) as harness:
        for name in ("a", "b", "a"):
            answer(world, harness, name)


def test_a_profile_of_another_model_is_refused(world: World, device: str) -> None:
    with pytest.raises(ConfigError, match=r"profile: is of 5 layers, the model has 4"):
        harness_with(world, profile(1e-4, layers=5), device)


def test_what_a_harm_weight_may_be() -> None:
    for weight in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match=r"handoff\.harm_weight"):
            HandoffConfig(harm_weight=weight)

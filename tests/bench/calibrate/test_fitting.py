"""From timings with noise to a profile, judged by the steps that were held out."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable

import pytest

from segue.bench.calibrate.cases import CalibrationCase, calibration_cases, fixed_batches
from segue.bench.calibrate.config import CalibrateConfig
from segue.bench.calibrate.fitting import (
    NO_PADDING,
    CopyTiming,
    DeltaTiming,
    Padding,
    bends,
    fit_copies,
    fit_deltas,
    fit_jobs,
    fit_steps,
    judge_steps,
)
from segue.bench.calibrate.run import padding_of
from segue.bench.calibrate.steps import MeasuredStep
from segue.bench.cases import Measure
from segue.bench.driver import BenchmarkError
from segue.config import ConfigError
from segue.engine.config import EngineConfig
from segue.scheduler.cost_model import CostProfile, CpuCoefficients, StepCoefficients, StepLoad

CONFIG = CalibrateConfig(shape="tiny", cpu_workers=0)
RANK_BYTES = 1 << 20
DECODE = StepCoefficients(
    fixed_seconds=4e-3,
    seconds_per_token=1.5e-5,
    row_tokens=(1, 2, 16),
    row_seconds=(0.0, 5e-4, 6e-4),
    seconds_per_context_token=2e-8,
    seconds_with_adapters=3e-4,
    seconds_per_adapter=4e-6,
    seconds_per_adapter_byte=2.5e-12,
    seconds_per_rank=2e-7,
)
PREFILL = StepCoefficients(
    fixed_seconds=5e-3,
    seconds_per_token=6e-6,
    row_tokens=(128, 512),
    row_seconds=(0.0, 6e-3),
    seconds_per_context_token=1e-9,
    seconds_with_adapters=3e-4,
    seconds_per_adapter_byte=2.5e-12,
)
TRUTH = CostProfile(name="true", layers=4, decode=DECODE, prefill=PREFILL)


def loads(case: CalibrationCase) -> tuple[StepLoad, StepLoad]:
    """Those that an engine would run for a case."""
    ranks: dict[str, int] = {}
    tokens = context = rank_tokens = 0
    names = case.case.mix.adapter_names
    is_prompt = case.case.measure is Measure.FIRST_TOKEN
    for index in range(case.case.batch):
        prompt = case.case.prompt_of(index) or 0
        rows = prompt if is_prompt else 1
        tokens += rows
        context += prompt * (prompt + 1) // 2 if is_prompt else prompt
        name = case.case.adapter_of(index)
        if name is not None:
            ranks[name] = case.case.mix.ranks[names.index(name) % len(case.case.mix.ranks)]
            rank_tokens += rows * ranks[name]
    load = StepLoad(
        tokens=tokens,
        context_tokens=context,
        adapters=len(ranks),
        adapter_bytes=RANK_BYTES * sum(ranks.values()),
        max_rank=max(ranks.values(), default=0),
        rank_tokens=rank_tokens,
    )
    riding = StepLoad() if case.riding is None else StepLoad(tokens=case.riding, context_tokens=case.riding**2 // 2)
    return (StepLoad(), load) if is_prompt else (load, riding)


def measured(noise: float, seconds: Callable[[StepLoad, StepLoad], float] = TRUTH.step_seconds) -> list[MeasuredStep]:
    draw = random.Random(5)
    steps = []
    for case in calibration_cases(CONFIG):
        decodes, prompts = loads(case)
        times = [seconds(decodes, prompts) * draw.uniform(1 - noise, 1 + noise) for _ in range(8)]
        steps.append(MeasuredStep(case=case, decodes=decodes, prompts=prompts, seconds=times))
    return steps


def fitted(steps: list[MeasuredStep]) -> CostProfile:
    decode, prefill = fit_steps(steps)
    return dataclasses.replace(TRUTH, decode=decode, prefill=prefill)


@pytest.mark.parametrize("noise", [0.0, 0.04])
def test_steps_that_were_held_out_are_predicted(noise: float) -> None:
    steps = measured(noise)
    judged = judge_steps(fitted(steps), steps)
    assert set(judged.fixed) == {(batch, CONFIG.contexts[0]) for batch in fixed_batches(CONFIG)}
    for quality in (judged.decode, judged.prompts, judged.overall, *judged.fixed.values()):
        assert quality is not None
        assert quality.r_squared >= (0.98 if quality is judged.overall else 0.9)
        assert quality.mean_relative_error <= 0.02


def test_padded_batches_are_predicted_where_the_fit_knows_how_they_are_padded() -> None:
    padding = Padding(decodes=(1, 2, 4, 8, 16), prompts=(16, 32, 64, 128, 192, 256, 384, 512))
    truth = dataclasses.replace(
        TRUTH,
        decode=dataclasses.replace(DECODE, padded_tokens=padding.decodes),
        prefill=dataclasses.replace(PREFILL, padded_tokens=padding.prompts),
    )
    steps = measured(0.0, truth.step_seconds)
    # Of prompts alone rows and context grow together; batches of several short ones tell them apart.
    fill = next(step.case for step in steps if step.prompts_alone and not step.case.held_out)
    for tokens in padding.prompts:
        load = StepLoad(tokens=tokens, context_tokens=9 * tokens)
        steps.append(MeasuredStep(case=fill, decodes=StepLoad(), prompts=load, seconds=[truth.prefill_seconds(load)]))
    riding = []
    for known in (padding, NO_PADDING):
        decode, prefill = fit_steps(steps, known)
        assert (decode.padded_tokens, prefill.padded_tokens) == (known.decodes, known.prompts)
        quality = judge_steps(dataclasses.replace(TRUTH, decode=decode, prefill=prefill), steps).riding
        assert quality is not None
        riding.append(quality.mean_relative_error)
    assert riding[0] < 0.01 < 0.03 < riding[1]


@pytest.mark.parametrize(("device", "padded"), [("cpu", False), ("cuda", True)])
def test_only_graphs_pad_batches(device: str, padded: bool) -> None:
    engine = EngineConfig(model_dir=".", device=device, max_running=12, budget_tokens=100, chunk_tokens=40)
    found = padding_of(engine)
    assert found == (Padding(decodes=(1, 2, 4, 8, 12), prompts=(16, 32, 48, 64, 96, 100)) if padded else NO_PADDING)


def test_a_cost_that_the_model_does_not_have_is_seen_by_the_judgement() -> None:
    """Steps of mixed ranks that take half as long again: the fit has no term for it, and is told so."""

    def seconds(decodes: StepLoad, prompts: StepLoad) -> float:
        uniform = decodes.rank_tokens == decodes.max_rank * decodes.tokens
        return TRUTH.step_seconds(decodes, prompts) * (1.0 if uniform or prompts.tokens else 1.5)

    steps = measured(0.0, seconds)
    judged = judge_steps(fitted(steps), steps)
    assert judged.decode is not None
    assert judged.decode.max_relative_error > 0.1
    assert min(quality.r_squared for quality in judged.fixed.values()) < 0.9


def test_the_fit_sees_nothing_of_what_is_held_out() -> None:
    steps = measured(0.0)
    spoilt = [dataclasses.replace(step, seconds=[1e3]) if step.case.held_out else step for step in steps]
    assert fit_steps(spoilt) == fit_steps(steps)
    judged = judge_steps(fitted(steps), spoilt)
    assert judged.overall is not None
    assert judged.overall.mean_relative_error > 0.9


def test_too_few_steps_are_an_error() -> None:
    with pytest.raises(BenchmarkError, match="too little was measured: observations: at least"):
        fit_steps(measured(0.0)[:6])


def test_it_bends_at_few_numbers_of_rows_that_were_measured() -> None:
    assert bends([1, 2, 2, 1]) == ()
    assert bends([1, 4, 16]) == (1, 4, 16)
    rows = [1, 2, 3, 4, 6, 8, 12, 16, 32, 64, 128]
    found = bends(rows)
    assert (found[0], found[-1]) == (1, 128)
    assert len(found) == 7
    assert set(found) <= set(rows)


def test_the_cases_are_each_either_fitted_or_held_out() -> None:
    cases = calibration_cases(CONFIG)
    by_case: dict[object, set[bool]] = {}
    for case in cases:
        by_case.setdefault((case.case, case.riding), set()).add(case.held_out)
    assert all(len(kinds) == 1 for kinds in by_case.values())
    assert len(by_case) == len(cases)
    half = cases[: len(cases) // 2]
    for measure in (Measure.DECODE_STEP, Measure.FIRST_TOKEN):
        assert {case.held_out for case in half if case.case.measure is measure} == {True, False}
    assert all(case.held_out for case in cases if case.riding is not None)


def test_a_copys_fixed_part_and_rate_are_found() -> None:
    sizes = (1 << 20, 4 << 20, 64 << 20)
    found = fit_copies([CopyTiming(copy_bytes=size, seconds=2e-5 + size / 50e9) for size in sizes])
    assert (found.fixed_seconds, found.seconds_per_byte) == pytest.approx((2e-5, 1 / 50e9))


CPU = CpuCoefficients(
    fixed_seconds=2e-5, core_seconds_per_token=1e-7, seconds_per_worker=4e-6, core_seconds_per_rank=1e-6,
    core_seconds_per_token_rank=3e-8,
)  # fmt: skip


def deltas(handed_over: bool, model: CpuCoefficients, cores: tuple[int, ...]) -> list[DeltaTiming]:
    found = []
    for tokens, rank, count in itertools.product((8, 32, 128), (8, 64), cores):
        seconds = model.on_workers(tokens, rank, count)
        found.append(DeltaTiming(tokens=tokens, rank=rank, cores=count, seconds=seconds, handed_over=handed_over))
    return found


def test_the_workers_part_and_the_way_to_them_are_told_apart() -> None:
    whole = dataclasses.replace(CPU, fixed_seconds=7e-5, seconds_per_token=9e-7)
    timings = [*deltas(False, CPU, (1, 2, 4)), *deltas(True, whole, (4,))]
    jobs, found = fit_jobs(timings), fit_deltas(timings)
    assert jobs is not None
    assert found is not None
    assert dataclasses.astuple(jobs) == pytest.approx(dataclasses.astuple(CPU), rel=1e-6)
    assert dataclasses.astuple(found) == pytest.approx(dataclasses.astuple(whole), rel=1e-6)
    assert fit_deltas([]) is None
    assert fit_deltas(deltas(False, CPU, (1, 2))) == fit_jobs(deltas(False, CPU, (1, 2)))


def test_from_one_number_of_workers_nothing_is_said_of_what_one_costs() -> None:
    found = fit_jobs(deltas(False, CPU, (1,)))
    assert found is not None
    assert found.seconds_per_worker == 0
    assert found.fixed_seconds == pytest.approx(CPU.fixed_seconds + CPU.seconds_per_worker)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"shape": "huge"}, "shape: must be one of tiny"),
        ({"model_dir": "m"}, "shape: is 'tiny', but the model is the one in model_dir"),
        ({"dtype": "int8"}, "dtype: must be one of"),
        ({"device": "tpu"}, "device: must be 'cpu' or 'cuda', is 'tpu'"),
        ({"targets": "o"}, "targets: must be one of qkvo, all, is 'o'"),
        ({"ranks": (8,)}, "ranks: must be at least 2 numbers"),
        ({"ranks": (16, 8)}, "ranks: must be rising and from 1 on"),
        ({"batches": (0, 4, 8)}, "batches: must be rising and from 1 on"),
        ({"batches": (1, 2, 4)}, "batches: must reach 8"),
        ({"prompts": (8, 16)}, "prompts: must be at least 5 numbers"),
        ({"cpu_workers": 10_000}, "cpu_workers: must be 0 to "),
        ({"seconds": 0.0}, "seconds: must be greater than 0"),
        ({"rounds": 0}, "rounds: must be greater than 0"),
    ],
)
def test_what_cannot_be_calibrated_is_named(options: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        CalibrateConfig(**{"shape": "tiny", "cpu_workers": 0, **options})  # type: ignore[arg-type]
    assert str(caught.value).startswith(problem)


def test_numbers_of_cores_are_powers_of_two_and_all() -> None:
    config = dataclasses.replace(CONFIG)
    object.__setattr__(config, "cpu_workers", 12)
    assert config.cores == (1, 2, 4, 8, 12)
    assert CONFIG.cores == ()

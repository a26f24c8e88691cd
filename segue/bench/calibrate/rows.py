"""A calibration's measurements as rows of a report, each with what the profile says of it."""

from __future__ import annotations

from collections.abc import Sequence

from segue.bench.calibrate.fitting import CopyTiming, DeltaTiming, fit_jobs
from segue.bench.calibrate.steps import MeasuredStep
from segue.bench.report import Percentiles, Row
from segue.scheduler.cost_model import CostProfile, CpuCoefficients

_PROMPT_MEASURES = {True: "prompt_step_ms", False: "riding_step_ms"}


def report_rows(
    profile: CostProfile, steps: Sequence[MeasuredStep], copies: Sequence[CopyTiming], deltas: Sequence[DeltaTiming]
) -> list[Row]:
    """Steps in milliseconds, copies in milliseconds, deltas of a layer in microseconds."""
    jobs = fit_jobs(deltas)
    return [
        *(_step_row(profile, step) for step in steps),
        *(_copy_row(profile, timing) for timing in copies),
        *(_delta_row(profile.cpu if timing.handed_over else jobs, timing) for timing in deltas),
    ]


def _step_row(profile: CostProfile, step: MeasuredStep) -> Row:
    times = Percentiles.of([1e3 * seconds for seconds in step.seconds])
    mix, both = step.case.case.mix, step.decodes.joined(step.prompts)
    return Row(
        measure="decode_step_ms" if step.decodes_alone else _PROMPT_MEASURES[step.prompts_alone],
        batch=step.decodes.tokens,
        adapters=max(step.decodes.adapters, step.prompts.adapters),
        ranks=mix.distinct_ranks,
        targets=None if mix.targets is None else mix.targets.value,
        prompt=step.case.case.prompt,
        tokens=step.prompts.tokens or None,
        context_tokens=both.context_tokens,
        bytes=max(step.decodes.adapter_bytes, step.prompts.adapter_bytes),
        fit_value=1e3 * profile.step_seconds(step.decodes, step.prompts),
        held_out=step.case.held_out,
        median=times.median,
        p10=times.p10,
        p90=times.p90,
        runs=times.runs,
    )


def _copy_row(profile: CostProfile, timing: CopyTiming) -> Row:
    value = 1e3 * timing.seconds
    return Row(
        measure="copy_ms",
        batch=0,
        adapters=1,
        bytes=timing.copy_bytes,
        fit_value=1e3 * profile.copy_seconds(timing.copy_bytes),
        held_out=False,
        median=value,
        p10=value,
        p90=value,
        runs=1,
    )


def _delta_row(model: CpuCoefficients | None, timing: DeltaTiming) -> Row:
    value = 1e6 * timing.seconds
    return Row(
        measure="cpu_handover_us" if timing.handed_over else "cpu_jobs_us",
        batch=0,
        adapters=1,
        ranks=(timing.rank,),
        tokens=timing.tokens,
        cores=timing.cores,
        fit_value=None if model is None else 1e6 * model.on_workers(timing.tokens, timing.rank, timing.cores),
        held_out=False,
        median=value,
        p10=value,
        p90=value,
        runs=1,
    )

"""``segue bench simulate``: compare placements on a cluster that a cost model stands for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from segue.cli.bench_options import (
    JsonOption,
    changed,
    check_outputs,
    numbers,
    show_console,
    with_progress,
    write_outputs,
)
from segue.cli.common import UserError, one_line_errors

if TYPE_CHECKING:
    from segue.bench.report import Report
    from segue.bench.simulate.config import ReplicaConfig, SimulationConfig, Targets
    from segue.scheduler.cost_model import CostProfile


def simulate(
    preset: Annotated[
        str | None, typer.Option(metavar="NAME", help="caraserve: the cluster that CaraServe's authors simulate.")
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(metavar="NAME|FILE.toml", help="What steps cost: caraserve-bgmv, caraserve-mbgmv, or a file."),
    ] = None,
    replicas: Annotated[int | None, typer.Option(metavar="N", help="1 to 1000.")] = None,
    requests: Annotated[int | None, typer.Option(metavar="N", help="Requests to simulate.")] = None,
    rate: Annotated[float | None, typer.Option(metavar="R", help="Requests a second, of the whole cluster.")] = None,
    attain: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Find the rate at which --attain-with meets this share of its targets."),
    ] = None,
    attain_with: Annotated[str, typer.Option(metavar="PLACEMENT", help="Whose rate is found.")] = "most-idle",
    placements: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="rank-aware, most-idle, first-fit, random; default all.")
    ] = None,
    policy: Annotated[
        str | None, typer.Option(metavar="NAME", help="Who goes first on a replica: fcfs (the default) or slo.")
    ] = None,
    arrivals: Annotated[str | None, typer.Option(metavar="NAME", help="poisson, gamma or constant.")] = None,
    burstiness: Annotated[
        float | None, typer.Option(metavar="CV", help="Of gamma arrivals: standard deviation of a gap over its mean.")
    ] = None,
    popularity: Annotated[str | None, typer.Option(metavar="NAME", help="uniform, zipf or azure.")] = None,
    exponent: Annotated[float | None, typer.Option(metavar="S", help="Of Zipf's law.")] = None,
    adapters: Annotated[int | None, typer.Option(metavar="N", help="Adapters in all.")] = None,
    ranks: Annotated[str | None, typer.Option(metavar="N,...", help="The adapters' ranks, in turn.")] = None,
    base_share: Annotated[float | None, typer.Option(metavar="SHARE", help="Requests without an adapter.")] = None,
    prompt: Annotated[float | None, typer.Option(metavar="N", help="Mean tokens of a prompt.")] = None,
    output: Annotated[float | None, typer.Option(metavar="N", help="Mean tokens of an answer.")] = None,
    ttft_ms: Annotated[float | None, typer.Option(metavar="MS", help="Target: time to the first token.")] = None,
    tpot_ms: Annotated[float | None, typer.Option(metavar="MS", help="Target: time per token after the first.")] = None,
    time_per_token_ms: Annotated[
        float | None, typer.Option(metavar="MS", help="Target: time per token from the arrival on.")
    ] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Of all that is drawn.")] = None,
    json: JsonOption = None,
) -> None:
    """Compare how requests are placed on replicas, with a cost model in place of devices. Needs no GPU.

    All placements serve the same requests. Options that are left out are the preset's.
    """
    with one_line_errors():
        check_outputs(json, None)
        base = _preset(preset)
        workload = changed(
            base.workload,
            requests=requests, arrivals=arrivals, burstiness=burstiness, popularity=popularity, exponent=exponent,
            adapters=adapters, ranks=None if ranks is None else numbers("--ranks", ranks), base_share=base_share,
            prompt_mean=prompt, output_mean=output, seed=seed,
        )  # fmt: skip
        config = changed(
            base,
            replica=changed(_replica(base.replica, profile), policy=policy),
            workload=workload,
            targets=_targets(base.targets, ttft_ms, tpot_ms, time_per_token_ms),
            replicas=replicas,
            requests_per_second=rate,
            placements=None if placements is None else tuple(placements.split(",")),
        )
        report = with_progress(lambda progress: _report(config, _search(attain, attain_with, rate), progress))
        write_outputs(report, json, None)
    _show(report)


def _preset(name: str | None) -> SimulationConfig:
    from segue.bench.simulate.presets import DEFAULT, PRESETS

    if name is None:
        return DEFAULT
    if name not in PRESETS:
        raise UserError(f"--preset: must be one of {', '.join(PRESETS)}, is {name!r}")
    return PRESETS[name]


def _replica(base: ReplicaConfig, profile: str | None) -> ReplicaConfig:
    return base if profile is None else dataclasses.replace(base, profile=_profile(profile))


def _profile(name: str) -> CostProfile:
    from segue.bench.simulate.profiles import PROFILES
    from segue.config import from_table, read_toml
    from segue.scheduler.cost_model import CostProfile

    if name in PROFILES:
        return PROFILES[name]
    if not name.endswith(".toml"):
        raise UserError(f"--profile: must be one of {', '.join(PROFILES)} or a file that ends in .toml, is {name!r}")
    return from_table(CostProfile, read_toml(Path(name)), where="profile")


def _targets(base: Targets, *milliseconds: float | None) -> Targets:
    """The targets that are given, or else those of the preset."""
    from segue.bench.simulate.config import Targets

    if all(value is None for value in milliseconds):
        return base
    ttft, tpot, per_token = (math.inf if value is None else value / 1e3 for value in milliseconds)
    return Targets(ttft_seconds=ttft, tpot_seconds=tpot, time_per_token_seconds=per_token)


def _search(attain: float | None, attain_with: str, rate: float | None) -> tuple[str, float] | None:
    from segue.bench.simulate.config import Placement

    if attain is None:
        return None
    if rate is not None:
        raise UserError("give --rate or --attain, not both")
    if not 0 < attain < 1:
        raise UserError(f"--attain: must be above 0 and below 1, is {attain:g}")
    if attain_with not in tuple(Placement):
        raise UserError(f"--attain-with: must be one of {', '.join(Placement)}, is {attain_with!r}")
    return attain_with, attain


def _report(config: SimulationConfig, search: tuple[str, float] | None, progress: Any) -> Report:
    from segue.bench.simulate.replica import SimulationError
    from segue.bench.simulate.run import run_simulate_bench

    try:
        return run_simulate_bench(config, progress, search)
    except SimulationError as error:
        raise UserError(str(error)) from error


def _show(report: Report) -> None:
    from segue.bench.simulate.table import placement_table

    settings: Mapping[str, Any] = report.settings
    console = show_console()
    targets = ", ".join(
        f"{name.removesuffix('_seconds').replace('_', ' ')} {1e3 * value:.1f} ms"
        for name, value in settings["targets"].items()
    )
    console.print(
        f"{settings['replicas']} replicas of {settings['replica']['profile']['name']}, "
        f"{settings['requests_per_second']:.1f} requests/s; targets: {targets or 'none'}",
        highlight=False,
    )
    console.print(placement_table(report))

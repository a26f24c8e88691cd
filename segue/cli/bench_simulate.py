"""``segue bench simulate``: compare placements on a cluster that a cost model stands for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from segue.cli.bench_options import JsonOption, SeedOption, changed, numbers, preset_of
from segue.cli.bench_report import check_outputs, show_console, with_progress, write_outputs
from segue.cli.common import UserError, one_line_errors

if TYPE_CHECKING:
    from segue.bench.report import Report
    from segue.bench.simulate.config import SimulationConfig, Targets, WorkloadConfig
    from segue.scheduler.cost_model import CostProfile


PresetOption = Annotated[
    str | None, typer.Option(metavar="NAME", help="caraserve: the cluster that CaraServe's authors simulate.")
]
ProfileOption = Annotated[
    str | None,
    typer.Option(metavar="NAME|FILE.toml", help="What steps cost: caraserve-bgmv, caraserve-mbgmv, or a file."),
]
ReplicasOption = Annotated[int | None, typer.Option(metavar="N", help="1 to 1000.")]
RequestsOption = Annotated[int | None, typer.Option(metavar="N", help="Requests to simulate.")]
RateOption = Annotated[float | None, typer.Option(metavar="R", help="Requests a second, of the whole cluster.")]
AttainOption = Annotated[
    float | None,
    typer.Option(metavar="SHARE", help="Find the rate at which --attain-with meets this share of its targets."),
]
AttainWithOption = Annotated[str, typer.Option(metavar="PLACEMENT", help="Whose rate is found.")]
PlacementsOption = Annotated[
    str | None, typer.Option(metavar="NAME,...", help="rank-aware, most-idle, first-fit, random; default all.")
]
PolicyOption = Annotated[
    str | None, typer.Option(metavar="NAME", help="Who goes first on a replica: fcfs (the default) or slo.")
]
ArrivalsOption = Annotated[str | None, typer.Option(metavar="NAME", help="poisson, gamma or constant.")]
BurstinessOption = Annotated[
    float | None, typer.Option(metavar="CV", help="Of gamma arrivals: standard deviation of a gap over its mean.")
]
PopularityOption = Annotated[str | None, typer.Option(metavar="NAME", help="uniform, zipf or azure.")]
ExponentOption = Annotated[float | None, typer.Option(metavar="S", help="Of Zipf's law.")]
AdaptersOption = Annotated[int | None, typer.Option(metavar="N", help="Adapters in all.")]
RanksInTurnOption = Annotated[str | None, typer.Option(metavar="N,...", help="The adapters' ranks, in turn.")]
BaseShareOption = Annotated[float | None, typer.Option(metavar="SHARE", help="Requests without an adapter.")]
PromptOption = Annotated[float | None, typer.Option(metavar="N", help="Mean tokens of a prompt.")]
OutputOption = Annotated[float | None, typer.Option(metavar="N", help="Mean tokens of an answer.")]
TtftOption = Annotated[float | None, typer.Option(metavar="MS", help="Target: time to the first token.")]
TpotOption = Annotated[float | None, typer.Option(metavar="MS", help="Target: time per token after the first.")]
TimePerTokenOption = Annotated[
    float | None, typer.Option(metavar="MS", help="Target: time per token from the arrival on.")
]
AgainstOption = Annotated[
    str | None,
    typer.Option(
        metavar="SHAPE",
        help="Serve the requests with an engine of this random model as well, and compare; --profile is its.",
    ),
]
AgainstDtypeOption = Annotated[str, typer.Option(metavar="NAME", help="Of that engine.")]
AgainstDeviceOption = Annotated[str, typer.Option(metavar="NAME", help="Of that engine: cpu or cuda.")]
AgainstWorkersOption = Annotated[int, typer.Option(metavar="N", help="Of that engine.")]
EngineRunsOption = Annotated[
    int, typer.Option(metavar="N", help="How often that engine serves them, to compare its runs with each other.")
]


def simulate(
    preset: PresetOption = None,
    profile: ProfileOption = None,
    replicas: ReplicasOption = None,
    requests: RequestsOption = None,
    rate: RateOption = None,
    attain: AttainOption = None,
    attain_with: AttainWithOption = "most-idle",
    placements: PlacementsOption = None,
    policy: PolicyOption = None,
    arrivals: ArrivalsOption = None,
    burstiness: BurstinessOption = None,
    popularity: PopularityOption = None,
    exponent: ExponentOption = None,
    adapters: AdaptersOption = None,
    ranks: RanksInTurnOption = None,
    base_share: BaseShareOption = None,
    prompt: PromptOption = None,
    output: OutputOption = None,
    ttft_ms: TtftOption = None,
    tpot_ms: TpotOption = None,
    time_per_token_ms: TimePerTokenOption = None,
    seed: SeedOption = None,
    against: AgainstOption = None,
    dtype: AgainstDtypeOption = "float32",
    device: AgainstDeviceOption = "cpu",
    cpu_workers: AgainstWorkersOption = 0,
    engine_runs: EngineRunsOption = 2,
    json: JsonOption = None,
) -> None:
    """Compare how requests are placed on replicas, with a cost model in place of devices. Needs no GPU.

    All placements serve the same requests. Options that are left out are the preset's.
    """
    with one_line_errors():
        check_outputs(json, None)
        from segue.bench.simulate.run import run_simulate_bench

        base = _preset(preset)
        workload = changed(
            base.workload,
            requests=requests, arrivals=arrivals, burstiness=burstiness, popularity=popularity, exponent=exponent,
            adapters=adapters, ranks=None if ranks is None else numbers("--ranks", ranks), base_share=base_share,
            prompt_mean=prompt, output_mean=output, seed=seed,
        )  # fmt: skip
        if against is not None:
            _compare(
                against, dtype, device, cpu_workers, engine_runs,
                profile=profile, workload=workload, rate=rate, json=json,
            )  # fmt: skip
            return
        config = changed(
            base,
            replica=changed(base.replica, profile=None if profile is None else _profile(profile), policy=policy),
            workload=workload, targets=_targets(base.targets, ttft_ms, tpot_ms, time_per_token_ms), replicas=replicas,
            requests_per_second=rate, placements=None if placements is None else tuple(placements.split(",")),
        )  # fmt: skip
        search = _search(attain, attain_with, rate)
        report = with_progress(lambda progress: run_simulate_bench(config, progress, search))
        write_outputs(report, json, None)
    _show(report)


def _compare(
    shape: str,
    dtype: str,
    device: str,
    cpu_workers: int,
    engine_runs: int,
    *,
    profile: str | None,
    workload: WorkloadConfig,
    rate: float | None,
    json: Path | None,
) -> None:
    from segue.bench.simulate.against import AgainstConfig, run_against
    from segue.bench.simulate.table import comparison_table, placement_table

    if profile is None or rate is None:
        raise UserError("--against: needs --profile FILE.toml of segue calibrate, and --rate")
    config = AgainstConfig(
        profile=_profile(profile), workload=workload, requests_per_second=rate, shape=shape, dtype=dtype,
        device=device, cpu_workers=cpu_workers, engine_runs=engine_runs,
    )  # fmt: skip
    report = with_progress(lambda progress: run_against(config, progress))
    write_outputs(report, json, None)
    console = show_console()
    console.print(placement_table(report))
    console.print(comparison_table(report))


def _preset(name: str | None) -> SimulationConfig:
    from segue.bench.simulate.presets import DEFAULT, PRESETS

    return DEFAULT if name is None else preset_of(PRESETS, name)


def _profile(name: str) -> CostProfile:
    from segue.bench.simulate.profiles import PROFILES
    from segue.engine.profile import load_profile

    if name in PROFILES:
        return PROFILES[name]
    if not name.endswith(".toml"):
        raise UserError(f"--profile: must be one of {', '.join(PROFILES)} or a file that ends in .toml, is {name!r}")
    return load_profile(Path(name))


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

"""``segue bench slo``: the highest rate at which a server meets its targets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import typer

from segue.cli import bench_slo_options as options
from segue.cli.bench_report import check_commit, check_folders
from segue.cli.common import DEFAULT_SERVER, ServerOption, one_line_errors

_VOID_STATUS = 3


def slo(
    server: ServerOption = DEFAULT_SERVER,
    preset: options.PresetOption = None,
    start: options.StartOption = None,
    device: options.DeviceOption = None,
    dtype: options.DtypeOption = None,
    ranks: options.RanksOption = None,
    pin: options.PinOption = False,
    settings: options.SetOption = None,
    adapters: options.AdaptersOption = None,
    arrivals: options.ArrivalsOption = None,
    burstiness: options.BurstinessOption = None,
    ramp: options.RampOption = None,
    popularity: options.PopularityOption = None,
    rank_correlation: options.RankCorrelationOption = None,
    base_share: options.BaseShareOption = None,
    prompt: options.PromptOption = None,
    output: options.OutputOption = None,
    trace: options.TraceOption = None,
    function_trace: options.FunctionTraceOption = None,
    tenants: options.TenantsOption = None,
    churn: options.ChurnOption = None,
    seed: options.SeedOption = None,
    ttft_ms: options.TtftOption = None,
    tpot_ms: options.TpotOption = None,
    classes: options.ClassOption = None,
    attain: options.AttainOption = None,
    send_slo: options.SendSloOption = None,
    reject_on_miss: options.RejectOption = False,
    rate: options.RateOption = None,
    from_rate: options.FromRateOption = None,
    to_rate: options.ToRateOption = None,
    precision: options.PrecisionOption = None,
    repeats: options.RepeatsOption = None,
    seconds: options.SecondsOption = None,
    settle: options.SettleOption = None,
    duration: options.DurationOption = None,
    warmup: options.WarmupOption = None,
    cooldown: options.CooldownOption = None,
    clients: options.ClientsOption = None,
    timeout: options.TimeoutOption = None,
    max_lag_ms: options.LagOption = None,
    json: options.JsonOption = None,
    csv: options.CsvOption = None,
    html: options.HtmlOption = None,
) -> None:
    """Find the highest rate of requests at which a server meets their targets.

    Requests are sent when they are due, whatever became of those before, and times count from when they were due. All
    that were sent count: a refusal, an error or a timeout is a miss. Ends with status 3 if the clients lag behind their
    own schedule, which makes the result void.

    segue bench slo --server HOST:PORT --ttft-ms 200 --tpot-ms 30

    segue bench slo --start tiny --ttft-ms 500 --tpot-ms 100 --html report.html
    """
    given: Mapping[str, Any] = dict(locals())
    with one_line_errors():
        check_folders(json=json, csv=csv, html=html)
        check_commit()
        from segue.cli.bench_slo_run import run

        void = run(given)
    if void is not None:
        typer.echo(f"segue: void: {void}", err=True)
        raise typer.Exit(_VOID_STATUS)

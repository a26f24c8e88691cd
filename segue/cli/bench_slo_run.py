"""What the options of ``segue bench slo`` mean, and how its result is shown."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console

from segue.bench.driver import BenchmarkError
from segue.bench.slo.config import (
    ChurnConfig,
    SloBenchConfig,
    SloClass,
    WorkloadConfig,
    parse_tenants,
)
from segue.bench.slo.csv_file import write_csv
from segue.bench.slo.html_page import write_html
from segue.bench.slo.lengths import LengthConfig
from segue.bench.slo.live import LiveView
from segue.bench.slo.popularity import PopularityConfig
from segue.bench.slo.presets import DEFAULT, PRESETS, Preset
from segue.bench.slo.rows import slo_report
from segue.bench.slo.run import run_slo_bench
from segue.bench.slo.search import SearchError
from segue.bench.slo.start import StartConfig, started_server
from segue.bench.slo.table import show_result
from segue.bench.slo.target import ask_target
from segue.bench.slo.trace import NO_TRACE, Trace
from segue.bench.slo.trace_files import TraceError, read_function_trace, read_request_trace
from segue.cli.bench_options import changed, numbers, preset_of
from segue.cli.bench_report import show_console
from segue.cli.common import UserError
from segue.config import ConfigError

_MOST_CLIENTS = 4
_CORES_FOR_CLIENT = 4

Given = Mapping[str, Any]


def run(given: Given) -> str | None:
    """Measure, show and write what the options say; why the result is void, None if it is not.

    Raises UserError, ConfigError or SegueError.
    """
    preset = _preset(given["preset"])
    config = bench_config(preset.bench, given)
    config.check_targets()
    trace = _trace(config.workload, given)
    try:
        with _server(preset, given) as address, LiveView(Console(stderr=True), config) as view:
            result = run_slo_bench(config, ask_target(address), view, trace)
        show_result(show_console(), result)
        report = slo_report(result)
        if given["csv"] is not None:
            write_csv(result, given["csv"])
        if given["html"] is not None:
            write_html(result, report, given["html"])
        if given["json"] is not None:
            report.write(given["json"])
    except (BenchmarkError, SearchError, OSError) as error:
        raise UserError(str(error)) from error
    return result.void


def bench_config(base: SloBenchConfig, given: Given) -> SloBenchConfig:
    """The preset's configuration with what is given in its place. Raises ConfigError or UserError."""
    found: SloBenchConfig = changed(
        base,
        workload=_workload(base.workload, given),
        search=changed(
            base.search,
            **{key: given[key] for key in ("attain", "from_rate", "to_rate", "precision", "repeats", "seconds")},
        ),
        client=changed(
            base.client,
            processes=given["clients"] or default_clients(),
            timeout_seconds=given["timeout"],
            most_lag_ms=given["max_lag_ms"],
            send_slo=given["send_slo"],
            reject_on_miss=given["reject_on_miss"] or None,
        ),
        churn=_churn(base.churn, given["churn"]),
        rate=given["rate"],
        settle_seconds=given["settle"],
        warmup_seconds=given["warmup"],
        measured_seconds=given["duration"],
        cooldown_seconds=given["cooldown"],
    )
    return found


def default_clients() -> int:
    """One client process for four cores, at most four."""
    return max(1, min(_MOST_CLIENTS, len(os.sched_getaffinity(0)) // _CORES_FOR_CLIENT))


def _preset(name: str | None) -> Preset:
    return DEFAULT if name is None else preset_of(PRESETS, name)


def _workload(base: WorkloadConfig, given: Given) -> WorkloadConfig:
    arrivals, burstiness = given["arrivals"], given["burstiness"]
    if arrivals is None and burstiness is not None:
        arrivals = "gamma"
    if burstiness is not None and arrivals != "gamma":
        raise UserError(f"--burstiness is of gamma arrivals, not of {arrivals}")
    kind, parameter = (None, None) if given["popularity"] is None else PopularityConfig.parse_kind(given["popularity"])
    found: WorkloadConfig = changed(
        base,
        arrivals=changed(base.arrivals, kind=arrivals, burstiness=burstiness, ramp=_ramp(given["ramp"])),
        popularity=changed(
            base.popularity,
            kind=kind,
            parameter=parameter,
            base_share=given["base_share"],
            rank_correlation=given["rank_correlation"],
        ),
        adapters=given["adapters"],
        prompt=None if given["prompt"] is None else LengthConfig.parse("prompt", given["prompt"]),
        output=None if given["output"] is None else LengthConfig.parse("output", given["output"]),
        classes=_classes(given),
        tenants=None if given["tenants"] is None else parse_tenants(given["tenants"]),
        seed=given["seed"],
    )
    return found


def _classes(given: Given) -> tuple[SloClass, ...] | None:
    plain = given["ttft_ms"] is not None or given["tpot_ms"] is not None
    if given["classes"]:
        if plain:
            raise UserError("give --class, or --ttft-ms and --tpot-ms, not both")
        return tuple(SloClass.parse(text, place) for place, text in enumerate(given["classes"], start=1))
    return (SloClass(ttft_ms=given["ttft_ms"], tpot_ms=given["tpot_ms"]),) if plain else None


def _ramp(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        first, last = (float(part) for part in text.split(":"))
    except ValueError:
        raise UserError(f"--ramp: must be FROM:TO, is {text!r}") from None
    return first, last


def _churn(base: ChurnConfig, text: str | None) -> ChurnConfig:
    if text is None:
        return base
    kind, _, number = text.partition(":")
    try:
        return ChurnConfig(kind=kind, per_second=float(number))
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise UserError(f"--churn: must be NAME:RATE, is {text!r}") from None


def _trace(config: WorkloadConfig, given: Given) -> Trace:
    """What is told by the files that are named. Raises UserError for files without use, and uses without a file."""
    requests, functions = given["trace"], given["function_trace"]
    used = "trace" in (config.arrivals.kind, config.prompt.kind, config.output.kind)
    for option, path, is_used, how in (
        ("trace", requests, used, "--arrivals, --prompt or --output"),
        ("function-trace", functions, config.popularity.kind == "trace", "--popularity"),
    ):
        if is_used and path is None:
            raise UserError(f"{how} trace needs a file: --{option} FILE")
        if path is not None and not is_used:
            raise UserError(f"--{option} is not used: give {how} trace")
    try:
        trace = NO_TRACE if requests is None else read_request_trace(requests)
        counts = () if functions is None else read_function_trace(functions).function_counts
    except TraceError as error:
        raise UserError(str(error)) from error
    return dataclasses.replace(trace, function_counts=counts)


@contextmanager
def _server(preset: Preset, given: Given) -> Iterator[str]:
    """The address of the server that is measured."""
    if given["start"] is None:
        for name in ("device", "dtype", "ranks", "pin", "settings"):
            if given[name]:
                raise UserError(f"--{name.replace('settings', 'set')} is of a server that --start starts")
        yield given["server"]
        return
    start: StartConfig = changed(
        preset.start,
        shape=given["start"],
        device=given["device"],
        dtype=given["dtype"],
        ranks=None if given["ranks"] is None else numbers("--ranks", given["ranks"]),
        adapters=given["adapters"],
        pinned=given["pin"] or None,
        settings=(*preset.start.settings, *(given["settings"] or ())),
    )
    with Console(stderr=True).status("") as status, started_server(start, status.update) as address:
        status.stop()
        yield address

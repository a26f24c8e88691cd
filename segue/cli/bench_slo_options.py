"""The options of ``segue bench slo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

_SERVER, _LOAD, _TARGETS, _RUNS, _OUTPUT = (
    "A server of its own",
    "The load",
    "The targets",
    "The runs",
    "What is written",
)


def _option(panel: str, text: str, *names: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, metavar=metavar, help=text, rich_help_panel=panel)


PresetOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="goodput-8b: 64 adapters, Zipf, 128 tokens in, 64 out, 200 and 30 ms. three-classes: 256 adapters, three "
        "classes of targets, lengths as on Azure. Other options go before it.",
    ),
]

StartOption = Annotated[
    str | None,
    _option(
        _SERVER,
        "In place of --server: start one with random weights of this shape (tiny, small, medium, llama-3.1-8b) and "
        "random adapters.",
        metavar="SHAPE",
    ),
]
DeviceOption = Annotated[str | None, _option(_SERVER, "cpu (default) or cuda.", metavar="NAME")]
DtypeOption = Annotated[str | None, _option(_SERVER, "float32 (default), bfloat16 or float16.", metavar="NAME")]
RanksOption = Annotated[
    str | None, _option(_SERVER, "Ranks of the adapters, in turn; default 8,16,32,64.", metavar="N,...")
]
PinOption = Annotated[bool, _option(_SERVER, "All adapters stay on the device.", "--pin")]
SetOption = Annotated[
    list[str] | None,
    _option(
        _SERVER,
        "A key of the configuration file: --set engine.chunk_tokens=512. May be repeated.",
        "--set",
        metavar="KEY=VALUE",
    ),
]

AdaptersOption = Annotated[
    int | None, _option(_LOAD, "Use this many of the server's; default all, or 8 with --start.", metavar="N")
]
ArrivalsOption = Annotated[
    str | None, _option(_LOAD, "poisson (default), constant, gamma, or trace with --trace.", metavar="NAME")
]
BurstinessOption = Annotated[
    float | None, _option(_LOAD, "Of gamma arrivals: standard deviation of a gap over its mean.", metavar="CV")
]
RampOption = Annotated[
    str | None, _option(_LOAD, "Rates before and after, over their mean, such as 0.5:1.5.", metavar="FROM:TO")
]
PopularityOption = Annotated[
    str | None,
    _option(
        _LOAD,
        "Of adapters: zipf:EXPONENT (default zipf:1), uniform, geometric:PART, distinct (in turn), one (for all), "
        "azure, or trace with --function-trace.",
        metavar="NAME[:X]",
    ),
]
RankCorrelationOption = Annotated[
    float | None,
    _option(
        _LOAD,
        "1: popular adapters have large ranks, -1: small ones, 0: by chance. Default: ranks in turn.",
        metavar="R",
    ),
]
BaseShareOption = Annotated[float | None, _option(_LOAD, "Share of requests without an adapter.", metavar="SHARE")]
PromptOption = Annotated[
    str | None,
    _option(
        _LOAD,
        "Tokens of prompts: N (default 128), lognormal:MEAN:SIGMA[:MOST] with the standard deviation of the "
        "logarithm, or trace.",
        metavar="LENGTH",
    ),
]
OutputOption = Annotated[
    str | None, _option(_LOAD, "Tokens of answers, in the same way; default 64.", metavar="LENGTH")
]
TraceOption = Annotated[
    Path | None,
    _option(
        _LOAD,
        "For arrivals and lengths: Azure LLM inference 2023 or 2024 or BurstGPT (.csv), or Mooncake (.jsonl).",
        metavar="FILE",
    ),
]
FunctionTraceOption = Annotated[
    Path | None, _option(_LOAD, "For popularity: Azure Functions 2019 or 2021 (.csv).", metavar="FILE")
]
TenantsOption = Annotated[
    str | None, _option(_LOAD, "Callers, told to the server as x-tenant.", metavar="N|NAME=SHARE,...")
]
ChurnOption = Annotated[
    str | None,
    _option(
        _LOAD,
        "evict:2 drops the weights of two adapters a second, reload:2 unloads and loads them.",
        metavar="NAME:RATE",
    ),
]
SeedOption = Annotated[int | None, _option(_LOAD, "Of all that is drawn; default 0.", metavar="N")]

TtftOption = Annotated[
    float | None, _option(_TARGETS, "From a request's intended start to its first token.", metavar="MS")
]
TpotOption = Annotated[float | None, _option(_TARGETS, "Mean time per token after the first.", metavar="MS")]
ClassOption = Annotated[
    list[str] | None,
    _option(
        _TARGETS,
        "In place of both, a class of requests: ttft_ms=100,tpot_ms=20,share=0.3. May be repeated.",
        "--class",
        metavar="[NAME:]KEY=X,...",
    ),
]
AttainOption = Annotated[
    float | None,
    _option(_TARGETS, "Share of the requests sent that must meet all of their targets; default 0.95.", metavar="SHARE"),
]
SendSloOption = Annotated[
    str | None,
    _option(
        _TARGETS,
        "Requests tell the server their targets: none (default); fields of the message; or headers, x-slo-ttft-ms and "
        "x-slo-tpot-ms.",
        metavar="HOW",
    ),
]
RejectOption = Annotated[
    bool, _option(_TARGETS, "With --send-slo fields: the server is to refuse what would be late.", "--reject-on-miss")
]

RateOption = Annotated[
    float | None, _option(_RUNS, "Measure this rate alone, in requests a second; default: search.", metavar="R")
]
FromRateOption = Annotated[float | None, _option(_RUNS, "The search begins here; default 1.", metavar="R")]
ToRateOption = Annotated[float | None, _option(_RUNS, "It goes no higher; default 1024.", metavar="R")]
PrecisionOption = Annotated[
    float | None, _option(_RUNS, "It ends that near to a rate that misses; default 0.05.", metavar="PART")
]
RepeatsOption = Annotated[
    int | None, _option(_RUNS, "Runs at most of a rate too near to the border to tell; default 2.", metavar="N")
]
SecondsOption = Annotated[float | None, _option(_RUNS, "No run begins later than this; default 600.", metavar="LIMIT")]
SettleOption = Annotated[
    float | None, _option(_RUNS, "Load before the first run, at its rate, not measured; default 5.", metavar="SECONDS")
]
DurationOption = Annotated[float | None, _option(_RUNS, "What is measured of a run; default 10.", metavar="SECONDS")]
WarmupOption = Annotated[float | None, _option(_RUNS, "Load before it; default 2.", metavar="SECONDS")]
CooldownOption = Annotated[float | None, _option(_RUNS, "Load behind it; default 2.", metavar="SECONDS")]
ClientsOption = Annotated[
    int | None, _option(_RUNS, "Processes that send; default one for four cores, at most 4.", metavar="N")
]
TimeoutOption = Annotated[
    float | None, _option(_RUNS, "A request is given up after this; default 60.", metavar="SECONDS")
]
LagOption = Annotated[
    float | None, _option(_RUNS, "A run is void if its clients are later than this (p99); default 10.", metavar="MS")
]

JsonOption = Annotated[Path | None, _option(_OUTPUT, "The report.", "--json", metavar="FILE.json")]
CsvOption = Annotated[Path | None, _option(_OUTPUT, "Each request of the reported rate.", "--csv", metavar="FILE.csv")]
HtmlOption = Annotated[
    Path | None, _option(_OUTPUT, "A page with plots that needs no network.", "--html", metavar="FILE.html")
]

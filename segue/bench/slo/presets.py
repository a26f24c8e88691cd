"""Benchmarks with a name, and the one that options begin from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from segue.bench.slo.config import SearchConfig, SloBenchConfig, SloClass, WorkloadConfig
from segue.bench.slo.lengths import LengthConfig, Lengths
from segue.bench.slo.start import StartConfig

# Like the conversations in Azure's LLM inference trace of 2023: means of 1155 and 211 tokens, and spreads that give the
# published medians of 1020 and 129 (Patel et al., "Splitwise", ISCA 2024): sigma^2 = 2 log(mean / median).
_AZURE_PROMPT = LengthConfig(kind=Lengths.LOGNORMAL.value, mean=1155, sigma=0.5, most=4096)
_AZURE_OUTPUT = LengthConfig(kind=Lengths.LOGNORMAL.value, mean=211, sigma=0.99, most=1024)
# Prompts come faster than the default of 128 rows a step would compute them.
_PREFILL_SETTINGS = ("engine.budget_tokens=2048", "engine.chunk_tokens=512")


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """What is measured, and the server for it, if one is started."""

    bench: SloBenchConfig
    start: StartConfig = field(default_factory=lambda: StartConfig(shape="tiny"))


DEFAULT = Preset(bench=SloBenchConfig())

PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "goodput-8b": Preset(
            bench=SloBenchConfig(
                workload=WorkloadConfig(classes=(SloClass(ttft_ms=200, tpot_ms=30),)),
                search=SearchConfig(from_rate=16, to_rate=512),
            ),
            start=StartConfig(shape="tiny", adapters=64, settings=_PREFILL_SETTINGS),
        ),
        "three-classes": Preset(
            bench=SloBenchConfig(
                workload=WorkloadConfig(
                    prompt=_AZURE_PROMPT,
                    output=_AZURE_OUTPUT,
                    classes=(
                        SloClass(name="tight", ttft_ms=100, tpot_ms=20),
                        SloClass(name="usual", ttft_ms=200, tpot_ms=30),
                        SloClass(name="loose", ttft_ms=2000, tpot_ms=100),
                    ),
                ),
                search=SearchConfig(from_rate=2, to_rate=128),
                # Answers take five seconds in the mean, so that the load needs some time to build up.
                settle_seconds=10.0,
                warmup_seconds=10.0,
                measured_seconds=20.0,
                cooldown_seconds=5.0,
            ),
            start=StartConfig(shape="tiny", adapters=256, context_tokens=5120, settings=_PREFILL_SETTINGS),
        ),
    }
)

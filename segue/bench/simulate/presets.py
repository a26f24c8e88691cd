"""Simulations with a name, and the one that options begin from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

from segue.bench.simulate.config import Popularity, ReplicaConfig, SimulationConfig, Targets, WorkloadConfig
from segue.bench.simulate.profiles import CARASERVE_BGMV
from segue.scheduler.cost_model import CostProfile, StepLoad
from segue.scheduler.plan import SchedulerLimits

# An answer of CaraServe's own service without LoRA takes a token's time of which 1.5 times is the target (section 7.4).
_TARGET_FACTOR = 1.5
# Of a Llama2-7B in 16 bits: 0.5 MiB of KV a token, and on q, k and v 3 x 8192 elements a rank and layer.
_PAGE_TOKENS, _PAGE_BYTES = 16, 8 << 20
_LLAMA2_RANK_BYTES = 3 * 8192 * 2 * 32
# Llama-3.1-8B: 128 KiB of KV a token, and on q, k, v and o 8192 + 2 x 5120 + 8192 elements a rank and layer.
_LLAMA3_PAGE_BYTES = 2 << 20


def unloaded_time_per_token_seconds(profile: CostProfile, prompt_tokens: float, output_tokens: float) -> float:
    """A lone request's time per token without LoRA, from its arrival: prefill, then all tokens but the first."""
    # Of a mean, which need not be whole; published profiles have no knee.
    prompt = profile.prefill.fixed_seconds + profile.prefill.seconds_per_token * prompt_tokens
    step_seconds = profile.decode_seconds(StepLoad(tokens=1))
    return (prompt + (output_tokens - 1) * step_seconds) / output_tokens


def _caraserve() -> SimulationConfig:
    """CaraServe's simulated cluster: 60 instances of Llama2-7B, adapters as popular as the 40,000 functions of Azure's
    trace, of four ranks, and answers as long as those of LMSYS-Chat-1M (Zheng et al., 2024, table 1: means of 69.5 and
    214.5 tokens). How they spread is not published with the simulation: log-normal, with sigma 1.0 and 0.7."""
    workload = WorkloadConfig(
        popularity=Popularity.AZURE.value,
        adapters=40_000,
        rank_bytes=_LLAMA2_RANK_BYTES,
        prompt_mean=69.5,
        prompt_sigma=1.0,
        output_mean=214.5,
        output_sigma=0.7,
    )
    base_seconds = unloaded_time_per_token_seconds(CARASERVE_BGMV, workload.prompt_mean, workload.output_mean)
    return SimulationConfig(
        replica=ReplicaConfig(
            profile=CARASERVE_BGMV,
            limits=SchedulerLimits(
                page_tokens=_PAGE_TOKENS,
                max_running=256,
                max_passes=16,
                budget_tokens=4096,
                chunk_tokens=4096,
                layers_per_step=2,
            ),
            # 60 GB of an 80 GB device beside the model.
            pages=60_000_000_000 // _PAGE_BYTES,
            page_bytes=_PAGE_BYTES,
        ),
        workload=workload,
        targets=Targets(time_per_token_seconds=_TARGET_FACTOR * base_seconds),
        replicas=60,
        requests_per_second=180.0,
    )


CARASERVE = _caraserve()
DEFAULT = dataclasses.replace(
    CARASERVE,
    replica=dataclasses.replace(CARASERVE.replica, page_bytes=_LLAMA3_PAGE_BYTES, pages=30_000),
    workload=WorkloadConfig(requests=2_000),
    targets=Targets(ttft_seconds=1.0, tpot_seconds=0.05),
    replicas=4,
    requests_per_second=8.0,
)

PRESETS: Mapping[str, SimulationConfig] = MappingProxyType({"caraserve": CARASERVE})

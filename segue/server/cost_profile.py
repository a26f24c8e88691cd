"""An engine's cost profile as WatchState tells it."""

from __future__ import annotations

from segue.engine.messages import CorrectionState, CostState
from segue.v1 import server_pb2 as pb


def profile_to_proto(costs: CostState) -> pb.CostProfile:
    """The profile as it is now, and how it was corrected."""
    profile = costs.profile
    decode, prefill, cpu = profile.decode, profile.prefill, profile.cpu
    return pb.CostProfile(
        decode=pb.DecodeCost(
            base_seconds=decode.fixed_seconds,
            seconds_per_token=decode.seconds_per_token,
            seconds_per_context_token=decode.seconds_per_context_token,
            seconds_per_rank_byte=decode.seconds_per_adapter_byte,
            seconds_per_adapter=decode.seconds_per_adapter,
            row_tokens=decode.row_tokens,
            row_seconds=decode.row_seconds,
            padded_tokens=decode.padded_tokens,
            seconds_with_adapters=decode.seconds_with_adapters,
            seconds_per_rank=decode.seconds_per_rank,
        ),
        prefill=pb.PrefillCost(
            base_seconds=prefill.fixed_seconds,
            seconds_per_token=prefill.seconds_per_token,
            seconds_per_attended_token=prefill.seconds_per_context_token,
            seconds_per_rank_byte=prefill.seconds_per_adapter_byte,
            seconds_per_adapter=prefill.seconds_per_adapter,
            row_tokens=prefill.row_tokens,
            row_seconds=prefill.row_seconds,
            padded_tokens=prefill.padded_tokens,
            seconds_with_adapters=prefill.seconds_with_adapters,
            seconds_per_rank=prefill.seconds_per_rank,
        ),
        copy=pb.CopyCost(base_seconds=profile.copy.fixed_seconds, seconds_per_byte=profile.copy.seconds_per_byte),
        cpu_delta=None
        if cpu is None
        else pb.CpuDeltaCost(
            base_seconds=cpu.fixed_seconds,
            core_seconds_per_token_rank=cpu.core_seconds_per_token_rank,
            seconds_per_token=cpu.seconds_per_token,
            core_seconds_per_rank=cpu.core_seconds_per_rank,
            seconds_per_worker=cpu.seconds_per_worker,
            core_seconds_per_token=cpu.core_seconds_per_token,
        ),
        decode_correction=_correction(costs.decode),
        prefill_correction=_correction(costs.prefill),
    )


def _correction(found: CorrectionState) -> pb.CostCorrection:
    base, attention, lora = found.scales
    return pb.CostCorrection(
        steps=found.steps,
        base_scale=base,
        attention_scale=attention,
        lora_scale=lora,
        mean_relative_error=found.mean_error,
    )

"""What WatchState tells of an engine's profile: it travels whole, and each coefficient under its own name."""

from __future__ import annotations

import dataclasses

import msgspec

from segue.engine.messages import CorrectionState, CostState
from segue.scheduler.cost_model import CopyCoefficients, CostProfile, CpuCoefficients, StepCoefficients
from segue.server.cost_profile import profile_to_proto
from segue.v1 import server_pb2 as pb

COSTS = CostState(
    profile=CostProfile(
        name="a machine",
        layers=4,
        decode=StepCoefficients(
            fixed_seconds=1.0,
            seconds_per_token=2.0,
            seconds_per_context_token=3.0,
            seconds_per_adapter_byte=4.0,
            seconds_per_adapter=5.0,
            row_tokens=(6, 60),
            row_seconds=(7.0, 70.0),
            padded_tokens=(10, 100),
            seconds_with_adapters=8.0,
            seconds_per_rank=9.0,
        ),
        prefill=StepCoefficients(fixed_seconds=11.0, seconds_per_context_token=13.0, padded_tokens=(20,)),
        copy=CopyCoefficients(fixed_seconds=21.0, seconds_per_byte=22.0),
        cpu=CpuCoefficients(
            fixed_seconds=31.0,
            core_seconds_per_token_rank=32.0,
            seconds_per_token=33.0,
            core_seconds_per_rank=34.0,
            seconds_per_worker=35.0,
            core_seconds_per_token=36.0,
        ),
    ),
    decode=CorrectionState(steps=41, scales=(0.5, 1.5, 2.0), mean_error=0.25),
    prefill=CorrectionState(steps=42, scales=(1.0, 1.0, 1.0), mean_error=0.125),
)


def test_each_coefficient_is_told() -> None:
    told = profile_to_proto(COSTS)
    fields = [descriptor.name for descriptor in pb.DecodeCost.DESCRIPTOR.fields]
    assert [getattr(told.decode, name) for name in fields] == [1, 2, 3, 4, 5, [6, 60], [7, 70], 8, 9, [10, 100]]
    assert told.prefill == pb.PrefillCost(base_seconds=11, seconds_per_attended_token=13, padded_tokens=[20])
    assert told.copy == pb.CopyCost(base_seconds=21, seconds_per_byte=22)
    fields = [descriptor.name for descriptor in pb.CpuDeltaCost.DESCRIPTOR.fields]
    assert [getattr(told.cpu_delta, name) for name in fields] == [31, 32, 33, 34, 35, 36]
    assert told.decode_correction == pb.CostCorrection(
        steps=41, base_scale=0.5, attention_scale=1.5, lora_scale=2.0, mean_relative_error=0.25
    )
    assert (told.prefill_correction.steps, told.prefill_correction.mean_relative_error) == (42, 0.125)


def test_without_help_of_the_cpu_there_is_none_to_tell() -> None:
    without = msgspec.structs.replace(COSTS, profile=dataclasses.replace(COSTS.profile, cpu=None))
    assert not profile_to_proto(without).HasField("cpu_delta")


def test_the_engines_message_keeps_every_value() -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(COSTS), type=CostState) == COSTS

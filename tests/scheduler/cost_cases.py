"""Loads and profiles for tests of the cost model and of placement."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

from segue.scheduler.cost_model import (
    CopyCoefficients,
    CostProfile,
    CpuCoefficients,
    LoraForm,
    StepCoefficients,
    StepLoad,
)

RANK_BYTES = 1 << 20


def batch(ranks: Sequence[int], context: int = 100, rows: int = 1) -> StepLoad:
    """Requests with ``rows`` rows, each with an adapter of its own; rank 0 is the base model."""
    used = [rank for rank in ranks if rank]
    return StepLoad(
        tokens=rows * len(ranks),
        context_tokens=context * rows * len(ranks),
        adapters=len(used),
        adapter_bytes=RANK_BYTES * sum(used),
        max_rank=max(used, default=0),
        rank_tokens=rows * sum(used),
    )


COEFFICIENTS = {
    LoraForm.PRESENT_BYTES: StepCoefficients(
        fixed_seconds=5e-3,
        seconds_per_token=1e-5,
        seconds_per_context_token=2e-8,
        seconds_with_adapters=4e-4,
        seconds_per_adapter=4e-6,
        seconds_per_adapter_byte=4e-13,
        seconds_per_rank=2e-8,
    ),
    LoraForm.MAX_RANK: StepCoefficients(
        fixed_seconds=3e-2, seconds_per_token=1e-5, seconds_per_context_token=2e-8, seconds_per_padded_rank=4e-6
    ),
    LoraForm.SUM_OF_RANKS: StepCoefficients(
        fixed_seconds=3e-2, seconds_per_token=1e-5, seconds_per_context_token=2e-8, seconds_per_rank=3e-6
    ),
}

PROFILE = CostProfile(
    name="a machine",
    layers=32,
    decode=COEFFICIENTS[LoraForm.PRESENT_BYTES],
    prefill=StepCoefficients(fixed_seconds=4e-3, seconds_per_token=3e-5, seconds_per_adapter_byte=4e-13),
    copy=CopyCoefficients(fixed_seconds=1e-5, seconds_per_byte=2e-11),
    cpu=CpuCoefficients(
        fixed_seconds=5e-5, seconds_per_token=4e-7, core_seconds_per_rank=1e-7, core_seconds_per_token_rank=3e-8
    ),
)

ranks = st.lists(st.sampled_from((0, 8, 16, 24, 64)), min_size=1, max_size=64)

"""What a decode step is made of: spans of made-up kernels, whose times are known."""

from __future__ import annotations

import pytest

from segue.bench.step_parts import GAPS, OTHERS, DeviceSpan, part_of, split_by_part


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("nvjet_sm90_tst_128x8_64x12_2x1_v_bz_TNT", "GEMMs"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float>", "GEMMs"),
        ("shrink_kernel", "LoRA shrink"),
        ("expand_kernel", "LoRA expand"),
        ("void flashinfer::BatchPrefillWithPagedKVCacheKernel<flashinfer::KernelTraits<>>", "attention"),
        ("void flashinfer::PersistentVariableLengthMergeStatesKernel<8u, 16u>", "attention"),
        ("few_rows_linear_kernel", "GEMMs"),
        ("void flashinfer::norm::FusedAddRMSNormKernel<8u, __nv_bfloat16>", "norms"),
        ("rotate_and_store_kernel", "rotation, KV store"),
        ("void flashinfer::activation::act_and_mul_kernel<__nv_bfloat16>", "activation"),
        ("scan_kernel", "sampling"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("vectorized_add", OTHERS),
    ],
)
def test_kernels_have_their_parts(name: str, part: str) -> None:
    assert part_of(name) == part


def test_parts_and_gaps_add_up_to_the_time_from_first_to_last() -> None:
    spans = [
        DeviceSpan("shrink_kernel", 1_000.0, 3_000.0),
        # Begins under the one before, which has the time that they share.
        DeviceSpan("expand_kernel", 2_500.0, 4_000.0),
        DeviceSpan("nvjet", 5_000.0, 9_000.0),
        DeviceSpan("nvjet", 6_000.0, 7_000.0),
    ]
    parts = split_by_part(reversed(spans), steps=2)
    assert parts == {"LoRA shrink": 1.0, "LoRA expand": 0.5, "GEMMs": 2.0, GAPS: 0.5}
    assert sum(parts.values()) == (9_000.0 - 1_000.0) / 1e3 / 2


def test_no_spans_are_an_error() -> None:
    with pytest.raises(ValueError, match="spans: there must be at least one"):
        split_by_part([], steps=1)

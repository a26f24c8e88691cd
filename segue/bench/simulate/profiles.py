"""Cost profiles of CaraServe's machine, from what is published of it.

Source: Li et al., "Toppings: CPU-Assisted, Rank-Aware Adapter Serving for LLM Inference", USENIX ATC 2025 (CaraServe,
arXiv:2401.11240). Its equation 2 gives a decode's form; the coefficients are drawn in figure 11 and not printed. Those
here reproduce the latencies that are printed, of Llama2-7B with adapters on q, k and v:

- Section 2.3, figure 6: 24 requests of rank 32 decode in 34.8 ms and 16 of rank 64 in 35.8 ms with BGMV, in 35.3 and
  35.9 ms with MBGMV. For BGMV the line through the printed figures would break the 36 ms that one more rank-64 request
  is said to meet; this one differs from them by less than they are rounded.
- Section 7.3: 64 tokens are prefilled in 61 ms and 256 in 126 ms, with the adapter's deltas from the CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from segue.scheduler.cost_model import CopyCoefficients, CostProfile, StepCoefficients

_PREFILL = StepCoefficients(fixed_seconds=39.333e-3, seconds_per_token=0.33854e-3)
# A PCIe 4.0 link of 16 lanes. CaraServe's prefills above contain the load already, which the CPU's help hides.
_COPY = CopyCoefficients(seconds_per_byte=1 / 25e9)

CARASERVE_BGMV = CostProfile(
    name="CaraServe, Llama2-7B, BGMV",
    layers=32,
    decode=StepCoefficients(fixed_seconds=32.12e-3, seconds_per_padded_rank=3.55e-6),
    prefill=_PREFILL,
    copy=_COPY,
    prompts_ride=False,
)
CARASERVE_MBGMV = CostProfile(
    name="CaraServe, Llama2-7B, MBGMV",
    layers=32,
    decode=StepCoefficients(fixed_seconds=33.5e-3, seconds_per_rank=0.6e-3 / 256),
    prefill=_PREFILL,
    copy=_COPY,
    prompts_ride=False,
)

PROFILES: Mapping[str, CostProfile] = MappingProxyType(
    {"caraserve-bgmv": CARASERVE_BGMV, "caraserve-mbgmv": CARASERVE_MBGMV}
)

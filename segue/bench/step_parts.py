"""What the device does in a decode step, by kind of kernel: from CUPTI's records of every kernel, copy and fill."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

GAPS = "gaps"
OTHERS = "others"
# The first pattern that a kernel's name contains decides.
_PARTS = (
    ("LoRA shrink", r"shrink_kernel"),
    ("LoRA expand", r"expand_kernel"),
    ("attention", r"BatchPrefill|BatchDecode|MergeStates|VariableLength"),
    ("norms", r"RMSNorm|rms_norm"),
    ("rotation, KV store", r"rotate_and_store"),
    ("activation", r"act_and_mul"),
    ("sampling", r"^(edit|scan|choose|search|find_edge)\w*kernel"),
    ("GEMMs", r"gemm|nvjet|cutlass|gemv|splitK|cublas|few_rows_linear"),
    ("copies", r"[Mm]emcpy|[Mm]emset|copy|Copy|CatArray|index"),
)


@dataclass(frozen=True, slots=True)
class DeviceSpan:
    """One kernel, copy or fill on the device, in microseconds of one clock."""

    name: str
    start_us: float
    end_us: float


def part_of(kernel_name: str) -> str:
    """The part of a step that a kernel belongs to."""
    return next((part for part, pattern in _PARTS if re.search(pattern, kernel_name)), OTHERS)


def split_by_part(spans: Iterable[DeviceSpan], steps: int) -> dict[str, float]:
    """Milliseconds of each part in one of ``steps`` steps, and ``GAPS``, in which the device did nothing.

    Time in which several kernels ran counts for the one that began first, so that the parts add up to the whole.
    Raises ValueError when there is nothing.
    """
    ordered = sorted(spans, key=lambda span: span.start_us)
    if not ordered:
        raise ValueError("spans: there must be at least one")
    totals: defaultdict[str, float] = defaultdict(float)
    busy_until_us = ordered[0].start_us
    for span in ordered:
        totals[GAPS] += max(0.0, span.start_us - busy_until_us)
        totals[part_of(span.name)] += max(0.0, span.end_us - max(span.start_us, busy_until_us))
        busy_until_us = max(busy_until_us, span.end_us)
    return {part: total / 1e3 / steps for part, total in totals.items()}


def record_spans(run: Callable[[], object]) -> list[DeviceSpan]:
    """All that the device does in ``run``, whose end it waits for."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        run()
        torch.cuda.synchronize()
    results = recorded.profiler
    assert results is not None
    return [
        DeviceSpan(event.name(), event.start_ns() / 1e3, (event.start_ns() + event.duration_ns()) / 1e3)
        for event in results.kineto_results.events()
        if event.device_type() == torch._C._autograd.DeviceType.CUDA
    ]

"""Times on a CUDA device: replays of a graph, and the bandwidth of a copy."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from statistics import median

import torch

_WARM_UP_REPLAYS = 3
_COPY_ELEMS = 2**30
_COPIES = 12


def replay_seconds(step: Callable[[], None], runs: int) -> list[float]:
    """How long each of ``runs`` replays of a CUDA graph of ``step`` takes."""
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(_WARM_UP_REPLAYS):
        graph.replay()
    events = [_timing_event() for _ in range(runs + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) * 1e-3 for before, after in pairwise(events)]


def copy_bytes_per_second() -> float:
    """Bytes per second, read plus written, of a copy of 2 GiB on the device."""
    source = torch.randn(_COPY_ELEMS, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    seconds: list[float] = []
    for _ in range(_COPIES):
        start, stop = _timing_event(), _timing_event()
        start.record()
        target.copy_(source)
        stop.record()
        torch.cuda.synchronize()
        seconds.append(start.elapsed_time(stop) * 1e-3)
    return 2 * source.nbytes / median(seconds)


def _timing_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]

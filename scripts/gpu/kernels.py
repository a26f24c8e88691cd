"""Times the LoRA kernels on this machine's GPU: one layer of an 8B model (Llama 3.1), CUDA-graph replay.

Each graph calls one LoRA point of many layers in turn, so that weights, inputs and outputs come from memory and not
from the L2. Writes JSON and prints a table: microseconds per call, and the bytes of a call over the copy bandwidth.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import quantiles
from typing import Any

import numpy as np
import torch
import triton

from segue.gpu_kernels.land_layer import land_layer
from segue.gpu_kernels.lora import add_lora
from segue.gpu_kernels.lora_tiles import LoraTiles, PointShape, Regime, choose_tiles
from segue.gpu_kernels.lora_work import plan_capacity, plan_point

CHUNK_ELEMS, PAGE_ELEMS, DTYPE = 1024, 32768, torch.bfloat16
POINTS = {
    "qkv": PointShape(in_features=4096, out_features=(4096, 1024, 1024)),
    "o": PointShape(in_features=4096, out_features=(4096,)),
}
MIXED = (8, 16, 32, 64)
ROTATED_BYTES = 400e6


@dataclass(frozen=True)
class Case:
    """A batch: each segment's rows and its own adapter's rank."""

    name: str
    regime: Regime
    rows: tuple[int, ...]
    ranks: tuple[int, ...]


CASES = (
    Case("1 token, rank 64", Regime.FEW, (1,), (64,)),
    Case("8 distinct, mixed 8..64", Regime.FEW, (1,) * 8, MIXED * 2),
    Case("32 distinct, mixed", Regime.DECODE, (1,) * 32, MIXED * 8),
    Case("32 distinct, rank 64", Regime.DECODE, (1,) * 32, (64,) * 32),
    Case("128 distinct, mixed", Regime.DECODE, (1,) * 128, MIXED * 32),
    Case("128 tokens over 8 adapters, mixed", Regime.DECODE, (16,) * 8, MIXED * 2),
    Case("prefill 128, one adapter", Regime.PREFILL, (128,), (64,)),
    Case("prefill 512, one adapter", Regime.PREFILL, (512,), (64,)),
    Case("prefill 4 x 512, four adapters", Regime.PREFILL, (512,) * 4, (64,) * 4),
    Case("prefill 4092 over 6 adapters", Regime.PREFILL, (1365, 682, 512, 1024, 341, 168), (64,) * 6),
)


@dataclass(frozen=True)
class Layer:
    """One layer's weights and its input and output."""

    pool: torch.Tensor
    modules: torch.Tensor
    scales: torch.Tensor
    x: torch.Tensor
    out: torch.Tensor


def call_bytes(case: Case, shape: PointShape) -> int:
    """Bytes that one call must move: A and B of its adapters and x read once, out read and written once."""
    weights = sum(case.ranks) * (shape.modules * shape.in_features + sum(shape.out_features))
    return DTYPE.itemsize * (weights + sum(case.rows) * (shape.in_features + 2 * sum(shape.out_features)))


def make_layers(case: Case, shape: PointShape, count: int) -> tuple[list[Layer], torch.Tensor]:
    """``count`` layers with random weights, and the page tables that serve them all."""
    chunks = [rank * (shape.in_features + width) // CHUNK_ELEMS for rank in case.ranks for width in shape.out_features]
    modules = torch.zeros(len(case.ranks), shape.modules, 3, dtype=torch.int32)
    for slot, rank in enumerate(case.ranks):
        end = 0
        for module, width in enumerate(shape.out_features):
            b_start = end + rank * shape.in_features // CHUNK_ELEMS
            modules[slot, module] = torch.tensor((rank, end, b_start))
            end = b_start + rank * width // CHUNK_ELEMS
    page_chunks = PAGE_ELEMS // CHUNK_ELEMS
    per_slot = [sum(chunks[slot * shape.modules : (slot + 1) * shape.modules]) for slot in range(len(case.ranks))]
    pages = [-(-count_ // page_chunks) for count_ in per_slot]
    tables = torch.zeros(len(pages), max(pages), dtype=torch.int32)
    order = torch.randperm(sum(pages), generator=torch.Generator().manual_seed(0))
    for slot, ids in enumerate(torch.split(order, pages)):
        tables[slot, : len(ids)] = ids
    tokens = sum(case.rows)
    layers = [
        Layer(
            pool=torch.randn(sum(pages), PAGE_ELEMS, device="cuda", dtype=DTYPE) * 0.02,
            modules=modules.cuda(),
            scales=torch.ones(len(case.ranks), shape.modules, device="cuda"),
            x=torch.randn(tokens, shape.in_features, device="cuda", dtype=DTYPE),
            out=torch.randn(tokens, sum(shape.out_features), device="cuda", dtype=DTYPE),
        )
        for _ in range(count)
    ]
    return layers, tables.cuda()


def make_plan(case: Case, shape: PointShape, tiles: LoraTiles) -> tuple[torch.Tensor, torch.Tensor]:
    """The plan and the workspace on the device."""
    stops = np.cumsum(case.rows)
    segments = np.stack((stops - np.asarray(case.rows), stops, np.arange(len(stops))), axis=1).astype(np.int32)
    capacity = plan_capacity(shape, tiles, max_segments=len(stops), max_rows=sum(case.rows), max_rank=max(case.ranks))
    plan = np.zeros(capacity.words, dtype=np.int32)
    plan_point(
        segments,
        np.ones(len(stops), dtype=np.float32),
        np.repeat(np.asarray(case.ranks, dtype=np.int32)[:, None], shape.modules, axis=1),
        shape=shape,
        tiles=tiles,
        plan=plan,
        workspace_elems=capacity.workspace_elems,
    )
    return torch.from_numpy(plan).cuda(), torch.empty(capacity.workspace_elems, device="cuda")


def time_point(case: Case, shape: PointShape, tiles: LoraTiles, runs: int) -> list[float]:
    """Microseconds per call of each of ``runs`` replays."""
    count = int(min(max(ROTATED_BYTES / call_bytes(case, shape), 6), 128))
    layers, tables = make_layers(case, shape, count)
    plan, workspace = make_plan(case, shape, tiles)

    def step() -> None:
        for layer in layers:
            add_lora(
                layer.x,
                layer.out,
                pool_layer=layer.pool,
                page_tables=tables,
                modules=layer.modules,
                scales=layer.scales,
                plan=plan,
                workspace=workspace,
                shape=shape,
                tiles=tiles,
            )

    return [seconds * 1e6 / count for seconds in replay_seconds(step, runs)]


def time_landing(rank: int, runs: int) -> tuple[list[float], int]:
    """Microseconds to land one layer of q, k, v and o at ``rank``, and the bytes read and written."""
    widths = [(shape.in_features, width) for shape in POINTS.values() for width in shape.out_features]
    rows = []
    end = 0
    for columns, out in widths:
        middle = end + rank * columns
        rows.append((end, middle, rank, columns, out, end // CHUNK_ELEMS, middle // CHUNK_ELEMS))
        end = middle + rank * out
    table = torch.tensor(rows).cuda()
    pages = -(-end // PAGE_ELEMS)
    count = int(ROTATED_BYTES / (2 * end * DTYPE.itemsize))
    staging = [torch.randn(end, device="cuda", dtype=DTYPE) for _ in range(count)]
    pools = [torch.empty(pages, PAGE_ELEMS, device="cuda", dtype=DTYPE) for _ in range(count)]
    page_table = torch.randperm(pages).cuda()

    def step() -> None:
        for source, pool in zip(staging, pools, strict=True):
            land_layer(source, table, pool, page_table, CHUNK_ELEMS)

    return [seconds * 1e6 / count for seconds in replay_seconds(step, runs)], 2 * end * DTYPE.itemsize


def replay_seconds(step: Callable[[], None], runs: int) -> list[float]:
    """How long each of ``runs`` replays of a CUDA graph of ``step`` takes."""
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(3):
        graph.replay()
    events = [timing_event() for _ in range(runs + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) * 1e-3 for before, after in pairwise(events)]


def timing_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def copy_bandwidth() -> float:
    """Bytes per second, read plus written, of a large copy on the device."""
    source = torch.randn(2**30, device="cuda", dtype=DTYPE)
    target = torch.empty_like(source)
    seconds: list[float] = []
    for _ in range(12):
        start, stop = timing_event(), timing_event()
        start.record()
        target.copy_(source)
        stop.record()
        torch.cuda.synchronize()
        seconds.append(start.elapsed_time(stop) * 1e-3)
    return 2 * source.numel() * DTYPE.itemsize / sorted(seconds)[len(seconds) // 2]


def report_row(measure: str, case: str, point: str, times: list[float], size: int, bandwidth: float) -> dict[str, Any]:
    """One row of the report; ``times`` in microseconds."""
    deciles = quantiles(times, n=10)
    return {
        "measure": measure,
        "case": case,
        "point": point,
        "median": round(deciles[4], 2),
        "p10": round(deciles[0], 2),
        "p90": round(deciles[8], 2),
        "runs": len(times),
        "bytes": size,
        "bytes_over_bandwidth_us": round(size / bandwidth * 1e6, 2),
    }


def default_tiles(regime: Regime) -> LoraTiles:
    """The tiles that an engine would choose for this model on this device."""
    return choose_tiles(
        regime,
        chunk_elems=CHUNK_ELEMS,
        page_elems=PAGE_ELEMS,
        element_bytes=DTYPE.itemsize,
        multiprocessors=torch.cuda.get_device_properties(0).multi_processor_count,
    )


def main() -> None:
    """Measure every case at every point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="where the JSON goes")
    parser.add_argument("--commit", required=True, help="the version that is measured")
    parser.add_argument("--runs", type=int, default=50)
    options = parser.parse_args()
    bandwidth = copy_bandwidth()
    properties = torch.cuda.get_device_properties(0)
    machine = {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "copy_bytes_per_second": round(bandwidth),
    }
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
    }
    rows = []
    for case in CASES:
        tiles = default_tiles(case.regime)
        pair = [
            report_row(
                "lora_us",
                case.name,
                point,
                time_point(case, shape, tiles, options.runs),
                call_bytes(case, shape),
                bandwidth,
            )
            for point, shape in POINTS.items()
        ]
        rows += pair
        figures = " + ".join(f"{row['median']:6.1f}" for row in pair)
        floors = " + ".join(f"{row['bytes_over_bandwidth_us']:5.1f}" for row in pair)
        print(f"{case.name:36s} {figures} us   bytes {floors} us", flush=True)
    times, size = time_landing(64, options.runs)
    rows.append(report_row("land_us", "one layer, q, k, v and o, rank 64", "qkv+o", times, size, bandwidth))
    print(f"landing one layer, rank 64: {rows[-1]['median']} us   bytes {rows[-1]['bytes_over_bandwidth_us']} us")
    report = {"machine": machine, "versions": versions, "commit": options.commit, "rows": rows}
    options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

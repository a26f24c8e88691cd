"""Batches for the LoRA kernels, made of random data, with their exact results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from segue.engine.cuda.lora import architecture_of, regime_of
from segue.gpu_kernels.lora import add_lora
from segue.gpu_kernels.lora_tiles import LoraTiles, PointShape, choose_tiles
from segue.gpu_kernels.lora_work import plan_capacity, plan_point
from segue.gpu_kernels.paged_lora import read_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelModel:
    """What the kernels see of a model: the GEMMs that LoRA points add to, and the geometry of its pages."""

    points: Mapping[str, PointShape]
    chunk_elems: int
    page_elems: int


@dataclass(frozen=True, slots=True)
class KernelCase:
    """A batch: each segment's rows, and the rank of its own adapter. ``points`` are those of KernelModel to measure."""

    name: str
    rows: tuple[int, ...]
    ranks: tuple[int, ...]
    points: tuple[str, ...] = ("qkv", "o")


LLAMA_8B = KernelModel(
    points=MappingProxyType(
        {
            "qkv": PointShape(in_features=4096, out_features=(4096, 1024, 1024)),
            "o": PointShape(in_features=4096, out_features=(4096,)),
            "gate_up": PointShape(in_features=4096, out_features=(14336, 14336)),
            "down": PointShape(in_features=14336, out_features=(4096,)),
        }
    ),
    chunk_elems=1024,
    page_elems=32768,
)
_MIXED = (8, 16, 32, 64)
_ALL = ("qkv", "o", "gate_up", "down")
CASES_8B = (
    KernelCase("1 token, rank 64", (1,), (64,)),
    KernelCase("8 distinct, mixed 8..64", (1,) * 8, _MIXED * 2),
    KernelCase("32 distinct, mixed", (1,) * 32, _MIXED * 8),
    KernelCase("32 distinct, rank 64", (1,) * 32, (64,) * 32, _ALL),
    KernelCase("128 distinct, mixed", (1,) * 128, _MIXED * 32, _ALL),
    KernelCase("128 tokens over 8 adapters, mixed", (16,) * 8, _MIXED * 2),
    KernelCase("prefill 128, one adapter", (128,), (64,)),
    KernelCase("prefill 512, one adapter", (512,), (64,), _ALL),
    KernelCase("prefill 4 x 512, four adapters", (512,) * 4, (64,) * 4),
    KernelCase("prefill 4092 over 6 adapters", (1365, 682, 512, 1024, 341, 168), (64,) * 6),
)
# For the interpreter, which takes milliseconds for a tile.
SMALL = KernelModel(
    points=MappingProxyType(
        {
            "qkv": PointShape(in_features=64, out_features=(64, 32, 32)),
            "o": PointShape(in_features=64, out_features=(64,)),
            "gate_up": PointShape(in_features=64, out_features=(96, 96)),
            "down": PointShape(in_features=96, out_features=(64,)),
        }
    ),
    chunk_elems=32,
    page_elems=512,
)
SMALL_CASES = (
    KernelCase("1 token, rank 8", (1,), (8,), _ALL),
    KernelCase("20 distinct, mixed 4..16", (1,) * 20, (4, 8, 16, 5) * 5),
    KernelCase("prefill 70 over two adapters", (50, 20), (16, 8), _ALL),
)


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer's weights and its input and output."""

    pool: Tensor
    modules: Tensor
    scales: Tensor
    x: Tensor
    out: Tensor


class KernelBatch:
    """A case at one LoRA point: page tables, plan and workspace that serve any number of layers."""

    def __init__(
        self, model: KernelModel, case: KernelCase, point: str, dtype: torch.dtype, device: str, multiprocessors: int
    ) -> None:
        self.shape = model.points[point]
        self._model, self._case, self._dtype, self._device = model, case, dtype, device
        self._tiles = choose_tiles(
            regime_of(sum(case.rows), case.ranks),
            chunk_elems=model.chunk_elems,
            page_elems=model.page_elems,
            element_bytes=dtype.itemsize,
            multiprocessors=multiprocessors,
            architecture=architecture_of(torch.device(device)),
        )
        self._modules = _module_table(case.ranks, self.shape, model.chunk_elems)
        rank_elems = self.shape.modules * self.shape.in_features + sum(self.shape.out_features)
        pages = [-(-rank * rank_elems // model.page_elems) for rank in case.ranks]
        self._pages = sum(pages)
        tables = torch.zeros(len(pages), max(pages), dtype=torch.int32)
        order = torch.randperm(self._pages, generator=torch.Generator().manual_seed(0))
        for slot, ids in enumerate(torch.split(order, pages)):
            tables[slot, : len(ids)] = ids
        self._tables = tables.to(device)
        self._plan, self._workspace = _plan(case, self.shape, self._tiles, device)

    @property
    def call_bytes(self) -> int:
        """What a call must move: A and B of its adapters and x read once, out read and written once."""
        weights = sum(self._case.ranks) * (self.shape.modules * self.shape.in_features + sum(self.shape.out_features))
        row = self.shape.in_features + 2 * sum(self.shape.out_features)
        return self._dtype.itemsize * (weights + sum(self._case.rows) * row)

    def make_layer(self) -> Layer:
        """Random weights, input and output; deltas spread about as far as the output that they are added to."""
        spread = (self.shape.in_features * max(self._case.ranks)) ** -0.25
        tokens, dtype, device = sum(self._case.rows), self._dtype, self._device
        return Layer(
            pool=torch.randn(self._pages, self._model.page_elems, device=device, dtype=dtype) * spread,
            modules=self._modules.to(device),
            scales=torch.ones(len(self._case.ranks), self.shape.modules, device=device),
            x=torch.randn(tokens, self.shape.in_features, device=device, dtype=dtype),
            out=torch.randn(tokens, sum(self.shape.out_features), device=device, dtype=dtype),
        )

    def run(self, layer: Layer) -> None:
        """Add the deltas to the layer's output."""
        add_lora(
            layer.x,
            layer.out,
            pool_layer=layer.pool,
            page_tables=self._tables,
            modules=layer.modules,
            scales=layer.scales,
            plan=self._plan,
            workspace=self._workspace,
            shape=self.shape,
            tiles=self._tiles,
        )

    def max_relative_error(self, layer: Layer) -> float:
        """Run a layer; the largest error of an output against float64, over the largest output. NaN if any is NaN."""
        exact = layer.out.double()
        start = 0
        for slot, rows in enumerate(self._case.rows):
            self._add_exactly(layer, slot, exact[start : start + rows], layer.x[start : start + rows].double())
            start += rows
        self.run(layer)
        return float((layer.out.double() - exact).abs().max() / exact.abs().max())

    def _add_exactly(self, layer: Layer, slot: int, exact: Tensor, x: Tensor) -> None:
        table, chunk = self._tables[slot].long(), self._model.chunk_elems
        first = 0
        for module, width in enumerate(self.shape.out_features):
            rank, a_chunk, b_chunk = self._modules[slot, module].tolist()
            a = read_rows(layer.pool, table, a_chunk * chunk, rank, self.shape.in_features, chunk).double()
            b = read_rows(layer.pool, table, b_chunk * chunk, rank, width, chunk).double()
            exact[:, first : first + width] += x @ a.T @ b
            first += width


def _module_table(ranks: Sequence[int], shape: PointShape, chunk_elems: int) -> Tensor:
    """int32 [slots, modules, (rank, first chunk of A, first chunk of B)]; widths are whole chunks."""
    modules = torch.zeros(len(ranks), shape.modules, 3, dtype=torch.int32)
    for slot, rank in enumerate(ranks):
        end = 0
        for module, width in enumerate(shape.out_features):
            b_start = end + rank * shape.in_features // chunk_elems
            modules[slot, module] = torch.tensor((rank, end, b_start))
            end = b_start + rank * width // chunk_elems
    return modules


def _plan(case: KernelCase, shape: PointShape, tiles: LoraTiles, device: str) -> tuple[Tensor, Tensor]:
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
    return torch.from_numpy(plan).to(device), torch.empty(capacity.workspace_elems, device=device)

"""Random layers of adapters for the landing kernel."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from segue.bench.kernel_cases import KernelModel
from segue.gpu_kernels.land_layers import land_layers
from segue.gpu_kernels.landing import land_matrices


class Landing(NamedTuple):
    """A layer in checkpoint order, and the pages that it lands in."""

    staging: Tensor
    pool: Tensor


class LandingBatch:
    """One layer of q, k, v and o at one rank; widths are whole chunks."""

    def __init__(self, model: KernelModel, rank: int, dtype: torch.dtype, device: str) -> None:
        self.name = f"landing one layer, rank {rank}"
        self.rank = rank
        self._model, self._dtype, self._device = model, dtype, device
        shapes = (model.points["qkv"], model.points["o"])
        rows = []
        end = 0
        for columns, width in ((shape.in_features, width) for shape in shapes for width in shape.out_features):
            middle = end + rank * columns
            chunks = end // model.chunk_elems, middle // model.chunk_elems
            rows.append((end, middle, rank, columns, width, *chunks, 0))
            end = middle + rank * width
        self._elems = end
        self._table = torch.tensor(rows).to(device)
        self._page_table = torch.randperm(-(-end // model.page_elems)).to(device)

    @property
    def call_bytes(self) -> int:
        """Every element read once and written once."""
        return 2 * self._elems * self._dtype.itemsize

    def make_layer(self) -> Landing:
        """Random weights, and pages of NaN."""
        staging = torch.randn(self._elems, device=self._device, dtype=self._dtype)
        pages = 1, len(self._page_table), self._model.page_elems
        return Landing(staging, torch.full(pages, torch.nan, device=self._device, dtype=self._dtype))

    def run(self, layer: Landing) -> None:
        """Land the layer."""
        land_layers(layer.staging, 0, self._table, layer.pool, self._page_table, self._model.chunk_elems)

    def lands_exactly(self) -> bool:
        """Whether the kernel writes what the torch reference writes, bit for bit, and nothing else."""
        layer = self.make_layer()
        expected = layer.pool.clone()
        land_matrices(layer.staging, 0, self._table, expected, self._page_table, self._model.chunk_elems)
        self.run(layer)
        return torch.equal(layer.pool.nan_to_num(), expected.nan_to_num())

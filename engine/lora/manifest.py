"""What is known of an adapter version before its weights are read: which tensors it has and where they lie."""

from __future__ import annotations

from enum import Enum

import msgspec


class Projection(Enum):
    """The linear layers of a transformer layer that an adapter may target, by PEFT's names, in fixed order."""

    Q = "q_proj"
    K = "k_proj"
    V = "v_proj"
    O = "o_proj"  # noqa: E741
    GATE = "gate_proj"
    UP = "up_proj"
    DOWN = "down_proj"


class TensorSpan(msgspec.Struct, frozen=True, kw_only=True):
    """A row-major matrix [rows, columns] in the checkpoint file. ``dtype`` is the safetensors name: F32, F16, BF16."""

    file_offset: int
    rows: int
    columns: int
    dtype: str

    @property
    def elements(self) -> int:
        return self.rows * self.columns

    @property
    def nbytes(self) -> int:
        return self.elements * (4 if self.dtype == "F32" else 2)


class ModuleWeights(msgspec.Struct, frozen=True, kw_only=True):
    """One targeted projection: A [rank, in_features], B [out_features, rank], delta = scale * B (A x)."""

    projection: Projection
    rank: int
    scale: float
    a: TensorSpan
    b: TensorSpan

    @property
    def in_features(self) -> int:
        return self.a.columns

    @property
    def out_features(self) -> int:
        return self.b.rows


class AdapterManifest(msgspec.Struct, frozen=True, kw_only=True):
    """An adapter version. ``version_id`` numbers it within this server; ``version`` is what users see.

    ``layers[i]`` holds layer i's targeted projections in the order of Projection; it may be empty. ``identity`` is
    (device, inode, size, mtime_ns, ctime_ns) of the weights file when the version was opened.
    """

    version_id: int
    version: str
    name: str
    identity: tuple[int, int, int, int, int]
    layers: tuple[tuple[ModuleWeights, ...], ...]

    @property
    def weight_bytes(self) -> int:
        return sum(module.a.nbytes + module.b.nbytes for layer in self.layers for module in layer)

    @property
    def max_rank(self) -> int:
        return max((module.rank for layer in self.layers for module in layer), default=0)

"""Where LoRA meets a transformer layer: four points, each behind one merged GEMM of the base model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import Enum
from types import MappingProxyType
from typing import Protocol

from torch import Tensor

from segue.engine.lora.manifest import Projection


class LoraPoint(Enum):
    """A GEMM of a layer that adapters add to. Its output is the projections' outputs side by side in this order."""

    QKV = "qkv"  # [q | k | v]
    O = "o"  # noqa: E741
    GATE_UP = "gate_up"  # [gate | up]
    DOWN = "down"


POINT_PROJECTIONS: Mapping[LoraPoint, tuple[Projection, ...]] = MappingProxyType(
    {
        LoraPoint.QKV: (Projection.Q, Projection.K, Projection.V),
        LoraPoint.O: (Projection.O,),
        LoraPoint.GATE_UP: (Projection.GATE, Projection.UP),
        LoraPoint.DOWN: (Projection.DOWN,),
    }
)


class LoraHook(Protocol):
    """Adds the LoRA deltas of a batch's rows. A model's forward pass calls it once a layer and once a point.

    The iterators yield while something is not there yet; the forward pass yields with them and goes on with them when
    it is advanced again. Rows are those of the batch, in its order.
    """

    def enter_layer(self, layer: int, /) -> Iterator[None]:
        """Before anything of the layer runs. Yields while the layer's weights have no usable source."""
        ...

    def begin(self, layer: int, point: LoraPoint, x: Tensor, /) -> None:
        """Before the point's base GEMM; ``x`` [rows, in] is its input and stays unchanged until ``finish`` ends."""
        ...

    def finish(self, layer: int, point: LoraPoint, x: Tensor, out: Tensor, /) -> Iterator[None]:
        """After the base GEMM: adds the deltas into ``out`` [rows, merged out] in place. Yields until all are there."""
        ...

    def leave_layer(self, layer: int, /) -> None:
        """After the layer's last use of its weights."""
        ...


class NullLora:
    """The hook of a batch that runs the base model alone."""

    def enter_layer(self, _layer: int) -> Iterator[None]:
        return iter(())

    def begin(self, _layer: int, _point: LoraPoint, _x: Tensor) -> None:
        return None

    def finish(self, _layer: int, _point: LoraPoint, _x: Tensor, _out: Tensor) -> Iterator[None]:
        return iter(())

    def leave_layer(self, _layer: int) -> None:
        return None

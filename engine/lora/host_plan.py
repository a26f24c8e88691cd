"""Where an adapter's matrices lie in its host copy, and how they get there from the file. Sizes in bytes.

The host copy holds the matrices of the checkpoint as they are, without padding, in the dtype of the model: layer by
layer, in each layer module by module, A [rank, in_features] before B [out_features, rank], row-major.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from segue.engine.lora.manifest import AdapterManifest, ModuleWeights, Projection, TensorSpan

PLACE_LONGS = 5
"""A matrix of ``HostPlan.places``: its layer, where its bytes lie in the file, where they go relative to the beginning
of the host copy, how many there are in the file, and -1, or its place in ``PlannedLayer.tensors`` if it is converted.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedTensor:
    """One matrix: where it lies in the file and, relative to the host copy's beginning, in host memory."""

    label: str
    span: TensorSpan
    host_start: int
    host_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedModule:
    """One targeted projection's two matrices."""

    weights: ModuleWeights
    a: PlannedTensor
    b: PlannedTensor


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedLayer:
    """One layer's modules; its bytes are contiguous from ``host_start`` on."""

    modules: tuple[PlannedModule, ...]
    host_start: int
    host_bytes: int

    def tensors(self) -> Iterator[PlannedTensor]:
        """All matrices, in the order of the host copy."""
        for module in self.modules:
            yield from (module.a, module.b)


@dataclass(frozen=True, slots=True, kw_only=True)
class HostPlan:
    """The whole adapter in host memory."""

    layers: tuple[PlannedLayer, ...]
    host_bytes: int
    _places: dict[str, npt.NDArray[np.int64]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def of(cls, manifest: AdapterManifest, item_bytes: int) -> HostPlan:
        """The plan for a model whose dtype takes ``item_bytes`` bytes an element."""
        layers = []
        end = 0
        for index, modules in enumerate(manifest.layers):
            start = end
            planned = []
            for weights in modules:
                where = f"layer {index} {weights.projection.value}"
                a = _planned(f"{where} lora_A", weights.a, end, item_bytes)
                b = _planned(f"{where} lora_B", weights.b, end + a.host_bytes, item_bytes)
                planned.append(PlannedModule(weights=weights, a=a, b=b))
                end = b.host_start + b.host_bytes
            layers.append(PlannedLayer(modules=tuple(planned), host_start=start, host_bytes=end - start))
        return cls(layers=tuple(layers), host_bytes=end)

    def tensors(self) -> Iterator[PlannedTensor]:
        """All matrices, in the order of the host copy."""
        for layer in self.layers:
            yield from layer.tensors()

    def places(self, file_dtype: str) -> npt.NDArray[np.int64]:
        """All matrices, int64 [n * PLACE_LONGS], by layers and in each layer in the order of the file; made once.

        Those of another dtype than ``file_dtype``, as safetensors calls it, are converted.
        """
        found = self._places.get(file_dtype)
        if found is None:
            rows = [
                (
                    layer,
                    tensor.span.file_offset,
                    tensor.host_start,
                    tensor.span.nbytes,
                    -1 if tensor.span.dtype == file_dtype else index,
                )
                for layer, planned in enumerate(self.layers)
                for index, tensor in enumerate(planned.tensors())
            ]
            table = np.array(rows, dtype=np.int64).reshape(-1, PLACE_LONGS)
            order = np.lexsort((table[:, 1], table[:, 0]))
            found = self._places[file_dtype] = table[order].reshape(-1)
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class HostModule:
    """One projection in host memory: byte offsets from the start of the host store."""

    projection: Projection
    rank: int
    scale: float
    in_features: int
    out_features: int
    a_offset_bytes: int
    b_offset_bytes: int


def host_modules(layer: PlannedLayer, copy_offset: int) -> Iterator[HostModule]:
    """A layer's modules for a host copy that begins at ``copy_offset`` bytes of the host store."""
    for module in layer.modules:
        yield HostModule(
            projection=module.weights.projection,
            rank=module.weights.rank,
            scale=module.weights.scale,
            in_features=module.weights.in_features,
            out_features=module.weights.out_features,
            a_offset_bytes=copy_offset + module.a.host_start,
            b_offset_bytes=copy_offset + module.b.host_start,
        )


def _planned(label: str, span: TensorSpan, host_start: int, item_bytes: int) -> PlannedTensor:
    return PlannedTensor(label=label, span=span, host_start=host_start, host_bytes=span.elements * item_bytes)

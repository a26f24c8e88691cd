"""What one reader thread reads at a time: part of a layer, as runs of the file. Sizes in bytes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from segue.engine.lora.host_plan import PlannedLayer, PlannedTensor

# Parts are multiples of a cache line, but for the last of a layer.
_CUT_BYTES = 64


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReadPart:
    """``runs`` int64 [n * RUN_LONGS], whose places count from the beginning of the host copy.

    Where ``converted`` is not None the part is this matrix, whose file has another dtype than the model: its one run is
    read into memory of its own, from the beginning.
    """

    layer: int
    runs: npt.NDArray[np.int64]
    size_bytes: int
    converted: PlannedTensor | None = None


def parts_of(layer: int, planned: PlannedLayer, file_dtype: str, part_bytes: int) -> list[ReadPart]:
    """The parts of a layer, each of about ``part_bytes`` at most, in the order of the file; at least one.

    ``file_dtype`` is the dtype, as safetensors calls it, of matrices that are read into place.
    """
    tensors = sorted(
        (tensor for module in planned.modules for tensor in (module.a, module.b)),
        key=lambda tensor: tensor.span.file_offset,
    )
    in_place = [tensor for tensor in tensors if tensor.span.dtype == file_dtype]
    parts = _cut(layer, _merged(in_place), part_bytes)
    for tensor in tensors:
        if tensor.span.dtype != file_dtype:
            runs = np.array([tensor.span.file_offset, 0, tensor.span.nbytes], dtype=np.int64)
            parts.append(ReadPart(layer=layer, runs=runs, size_bytes=tensor.span.nbytes, converted=tensor))
    return parts or [ReadPart(layer=layer, runs=np.empty(0, dtype=np.int64), size_bytes=0)]


def _merged(tensors: list[PlannedTensor]) -> list[tuple[int, int, int]]:
    """Runs: matrices that follow one another in the file and in the host copy are one."""
    runs: list[tuple[int, int, int]] = []
    for tensor in tensors:
        source, target, size = tensor.span.file_offset, tensor.host_start, tensor.host_bytes
        if runs and runs[-1][0] + runs[-1][2] == source and runs[-1][1] + runs[-1][2] == target:
            runs[-1] = (runs[-1][0], runs[-1][1], runs[-1][2] + size)
        else:
            runs.append((source, target, size))
    return runs


def _cut(layer: int, runs: list[tuple[int, int, int]], part_bytes: int) -> list[ReadPart]:
    """Parts of about the same size."""
    total = sum(size for _, _, size in runs)
    count = -(-total // part_bytes)
    goal = -(-total // (count * _CUT_BYTES)) * _CUT_BYTES if count > 1 else total
    parts: list[ReadPart] = []
    taken: list[int] = []
    room = goal
    for source, target, size in runs:
        while size:
            piece = min(size, room)
            taken += [source, target, piece]
            source, target, size, room = source + piece, target + piece, size - piece, room - piece
            if room == 0:
                parts.append(_part(layer, taken))
                taken, room = [], goal
    if taken:
        parts.append(_part(layer, taken))
    return parts


def _part(layer: int, words: list[int]) -> ReadPart:
    return ReadPart(layer=layer, runs=np.array(words, dtype=np.int64), size_bytes=sum(words[2::3]))

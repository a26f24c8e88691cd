"""What reader threads read at a time: parts of an adapter's layers, as runs of its file. Sizes in bytes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from segue.compiled import INT, LONGS, compiled, types
from segue.engine.lora.file_runs import RUN_LONGS
from segue.engine.lora.host_plan import PLACE_LONGS, HostPlan, PlannedTensor

# Parts are multiples of a cache line, but for the last of a layer.
_CUT_BYTES = 64

PART_LONGS = 6
"""A part: its layer, its first run and the one behind its last, its bytes, the matrix that is to be converted, by its
place in ``PlannedLayer.tensors``, or -1, and how many parts the layer has."""


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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PartTable:
    """All parts of an adapter, layer by layer, in each layer in the order of the file; every layer has at least one.

    ``parts`` int64 [n * PART_LONGS], ``runs`` int64 [m * RUN_LONGS], ``layer_parts`` int64 [layers]: how many each has.
    """

    plan: HostPlan
    parts: npt.NDArray[np.int64]
    runs: npt.NDArray[np.int64]
    layer_parts: npt.NDArray[np.int64]

    @classmethod
    def of(cls, plan: HostPlan, file_dtype: str, part_bytes: int) -> PartTable:
        """Parts of about ``part_bytes`` at most, those of a layer of about the same size.

        ``file_dtype`` is the dtype, as safetensors calls it, of matrices that are read into place; each of the others
        is a part.
        """
        places = plan.places(file_dtype)
        layers = len(plan.layers)
        tensors = len(places) // PLACE_LONGS
        most_parts = int(places[3::PLACE_LONGS].sum()) // max(part_bytes, _CUT_BYTES) + 2 * layers + tensors
        parts = np.empty(most_parts * PART_LONGS, dtype=np.int64)
        runs = np.empty((most_parts + tensors) * RUN_LONGS, dtype=np.int64)
        layer_parts = np.zeros(layers, dtype=np.int64)
        run_count = _cut_layers(places, part_bytes, parts, runs, layer_parts)
        part_count = int(layer_parts.sum())
        return cls(
            plan=plan,
            parts=parts[: part_count * PART_LONGS],
            runs=runs[: run_count * RUN_LONGS],
            layer_parts=layer_parts,
        )

    def __len__(self) -> int:
        return len(self.parts) // PART_LONGS

    def part(self, index: int) -> ReadPart:
        layer, begin, end, size_bytes, tensor, _ = self.parts[index * PART_LONGS : (index + 1) * PART_LONGS].tolist()
        return ReadPart(
            layer=layer,
            runs=self.runs[begin * RUN_LONGS : end * RUN_LONGS],
            size_bytes=size_bytes,
            converted=None if tensor < 0 else tuple(self.plan.layers[layer].tensors())[tensor],
        )


@compiled(types.void(LONGS, INT, INT, INT, INT, INT, INT))
def _put_part(
    parts: npt.NDArray[np.int64], index: int, layer: int, begin: int, end: int, size_bytes: int, tensor: int
) -> None:
    start = index * PART_LONGS
    parts[start] = layer
    parts[start + 1] = begin
    parts[start + 2] = end
    parts[start + 3] = size_bytes
    parts[start + 4] = tensor


@compiled(INT(LONGS, INT, INT, LONGS))
def _merge_runs(places: npt.NDArray[np.int64], begin: int, end: int, merged: npt.NDArray[np.int64]) -> int:
    """Runs of the matrices [begin, end) that are read into place: what follows one another in the file and in the host
    copy is one. How many."""
    count = 0
    for index in range(begin, end):
        place = index * PLACE_LONGS
        if places[place + 4] >= 0:
            continue
        source, target, size = places[place + 1], places[place + 2], places[place + 3]
        last = (count - 1) * 3
        if count and merged[last] + merged[last + 2] == source and merged[last + 1] + merged[last + 2] == target:
            merged[last + 2] += size
        else:
            merged[count * 3], merged[count * 3 + 1], merged[count * 3 + 2] = source, target, size
            count += 1
    return count


@compiled(INT(LONGS, INT, LONGS, LONGS, LONGS), nogil=False)
def _cut_layers(
    places: npt.NDArray[np.int64],
    part_bytes: int,
    parts: npt.NDArray[np.int64],
    runs: npt.NDArray[np.int64],
    layer_parts: npt.NDArray[np.int64],
) -> int:
    """Fill ``parts``, ``runs`` and ``layer_parts`` from matrices in the order of layers and of the file. How many runs
    there are."""
    tensors = len(places) // PLACE_LONGS
    merged = np.empty(max(tensors, 1) * 3, dtype=np.int64)
    part, run, end = 0, 0, 0
    for layer in range(len(layer_parts)):
        begin = end
        while end < tensors and places[end * PLACE_LONGS] == layer:
            end += 1
        first_part, part_run = part, run
        pieces = _merge_runs(places, begin, end, merged)
        total = 0
        for piece in range(pieces):
            total += merged[piece * 3 + 2]
        count = -(-total // part_bytes)
        goal = -(-total // (count * _CUT_BYTES)) * _CUT_BYTES if count > 1 else total
        room = goal
        for piece in range(pieces):
            source, target, left = merged[piece * 3], merged[piece * 3 + 1], merged[piece * 3 + 2]
            while left > 0:
                size = min(left, room)
                runs[run * 3], runs[run * 3 + 1], runs[run * 3 + 2] = source, target, size
                run += 1
                source, target, left, room = source + size, target + size, left - size, room - size
                if room == 0:
                    _put_part(parts, part, layer, part_run, run, goal, -1)
                    part, part_run, room = part + 1, run, goal
        if run > part_run:
            _put_part(parts, part, layer, part_run, run, goal - room, -1)
            part += 1
        for index in range(begin, end):
            place = index * PLACE_LONGS
            if places[place + 4] >= 0:
                runs[run * 3], runs[run * 3 + 1], runs[run * 3 + 2] = places[place + 1], 0, places[place + 3]
                _put_part(parts, part, layer, run, run + 1, places[place + 3], places[place + 4])
                part, run = part + 1, run + 1
        if part == first_part:
            _put_part(parts, part, layer, run, run, 0, -1)
            part += 1
        layer_parts[layer] = part - first_part
        for index in range(first_part, part):
            parts[index * PART_LONGS + 5] = part - first_part
    return run

"""Which tensors a checkpoint folder has, and where in its safetensors files each one lies."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from segue.engine.models.fields import ModelError

# As safetensors names them; others hold no weights.
FLOAT_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}

_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_LENGTH_BYTES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A tensor in a file: its elements lie in row-major order from ``file_offset``, bytes from the file's beginning."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    file_offset: int

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of a tensor whose dtype is one of FLOAT_DTYPES."""
        return FLOAT_DTYPES[self.dtype]

    @property
    def size_bytes(self) -> int:
        return prod(self.shape) * self.torch_dtype.itemsize


def stored_tensors(model_dir: Path) -> Sequence[StoredTensor]:
    """The checkpoint's tensors, file by file in the order in which they lie there: one file's, or those of an index.

    Only headers are read. Raises ModelError, naming the file or tensor, for what is missing or malformed.
    """
    single, index = model_dir / _SINGLE_FILE, model_dir / _INDEX_FILE
    if single.exists():
        return _in_order(_read_header(single).values())
    if not index.exists():
        raise ModelError(f"{model_dir}: has neither {_SINGLE_FILE} nor {_INDEX_FILE}; other formats are not read")
    names_by_file: dict[str, list[str]] = {}
    for name, file_name in _weight_map(index).items():
        names_by_file.setdefault(file_name, []).append(name)
    found: list[StoredTensor] = []
    for file_name, names in sorted(names_by_file.items()):
        header = _read_header(model_dir / file_name)
        absent = sorted(name for name in names if name not in header)
        if absent:
            raise ModelError(f"{model_dir / file_name}: tensor {absent[0]} is missing")
        found += _in_order(header[name] for name in names)
    return found


def _in_order(tensors: Iterable[StoredTensor]) -> list[StoredTensor]:
    return sorted(tensors, key=lambda tensor: tensor.file_offset)


def _weight_map(index: Path) -> Mapping[str, str]:
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        pairs = {str(name): str(file_name) for name, file_name in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index}: is not an index with a weight_map: {error}") from error
    for file_name in pairs.values():
        if Path(file_name).name != file_name:
            raise ModelError(f"{index}: weight_map names {file_name!r}, which is not a file beside it")
    return pairs


def _read_header(path: Path) -> Mapping[str, StoredTensor]:
    """A file's tensors by name. The format: https://github.com/huggingface/safetensors#format."""
    try:
        # The library tells no offsets, but it verifies them: opening checks the whole header against the file's size.
        with safe_open(path, framework="np"), path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            header = json.loads(file.read(length))
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"{path}: is not a readable safetensors file: {error}") from error
    header.pop("__metadata__", None)
    data_start = _LENGTH_BYTES + length
    return {
        name: StoredTensor(
            path=path,
            name=name,
            dtype=entry["dtype"],
            shape=tuple(entry["shape"]),
            file_offset=data_start + entry["data_offsets"][0],
        )
        for name, entry in header.items()
    }

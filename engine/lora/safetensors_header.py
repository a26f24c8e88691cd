"""Reading the header of a safetensors file, trusting nothing in it.

The format (https://github.com/huggingface/safetensors#format): eight bytes with the header's length, the header as a
JSON object, then the tensors' bytes back to back. Only the header is read here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from segue.engine.lora.adapter_path import read_exactly
from segue.engine.lora.strict_json import parse_object, quoted
from segue.errors import AdapterRejectedError

MAX_HEADER_BYTES = 16 << 20
ITEM_BYTES: Mapping[str, int] = {"F32": 4, "F16": 2, "BF16": 2}

_LENGTH_BYTES = 8
_MAX_DIMENSIONS = 8
_MAX_SIZE = 1 << 62


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """A tensor of the file; ``file_offset`` counts bytes from the file's beginning."""

    dtype: str
    shape: tuple[int, ...]
    file_offset: int


def read_header(descriptor: int, file_bytes: int, file_name: str) -> Mapping[str, TensorEntry]:
    """The tensors of the open file of ``file_bytes`` bytes, by name.

    Raises AdapterRejectedError when the file is truncated or its header malformed: too long, not strict JSON, another
    dtype than F32, F16 and BF16, or tensors that do not fill the file back to back with shape x item size bytes each.
    """
    try:
        header, data_start = _read_json(descriptor, file_bytes)
        return _parse_entries(header, data_start, file_bytes)
    except ValueError as error:
        raise AdapterRejectedError(f"{file_name} {error}") from None


def _read_json(descriptor: int, file_bytes: int) -> tuple[dict[str, Any], int]:
    prefix = read_exactly(descriptor, _LENGTH_BYTES, 0)
    if len(prefix) < _LENGTH_BYTES:
        raise ValueError("is truncated: it ends within the header's length")
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"has a header of {length} bytes, more than the {MAX_HEADER_BYTES} allowed")
    if _LENGTH_BYTES + length > file_bytes:
        raise ValueError("is truncated: it ends within the header")
    data = read_exactly(descriptor, length, _LENGTH_BYTES)
    if len(data) < length:
        raise ValueError("is truncated: it ends within the header")
    try:
        return parse_object(data), _LENGTH_BYTES + length
    except ValueError as error:
        raise ValueError(f"has a malformed header: it {error}") from None


def _parse_entries(header: dict[str, Any], data_start: int, file_bytes: int) -> Mapping[str, TensorEntry]:
    header.pop("__metadata__", None)
    entries: dict[str, TensorEntry] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        dtype, shape, start, stop = _parse_entry(name, entry)
        entries[name] = TensorEntry(dtype=dtype, shape=shape, file_offset=data_start + start)
        spans.append((start, stop, name))
    end = 0
    for start, stop, name in sorted(spans):
        if start != end:
            problem = "overlaps the tensor before it" if start < end else "leaves a hole before it"
            raise ValueError(f"is malformed: tensor {quoted(name)} {problem}")
        end = stop
    if data_start + end > file_bytes:
        raise ValueError(f"is truncated: its tensors take {data_start + end} bytes, the file has {file_bytes}")
    if data_start + end < file_bytes:
        raise ValueError(f"has {file_bytes - data_start - end} bytes that belong to no tensor")
    return entries


def _parse_entry(name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"is malformed: tensor {quoted(name)} must have dtype, shape and data_offsets, nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise ValueError(f"has tensor {quoted(name)} of dtype {quoted(str(dtype))}; served are {', '.join(ITEM_BYTES)}")
    if not _are_sizes(shape) or len(shape) > _MAX_DIMENSIONS or not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"is malformed: the shape or offsets of tensor {quoted(name)} are not whole numbers")
    start, stop = offsets
    if stop - start != prod(shape) * ITEM_BYTES[dtype]:
        raise ValueError(f"is malformed: the offsets of tensor {quoted(name)} do not fit its shape and dtype")
    return dtype, tuple(shape), start, stop


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < _MAX_SIZE for value in values)

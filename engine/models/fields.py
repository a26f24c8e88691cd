"""Reading single fields of a checkpoint's JSON files. Every error names its field in one line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class ModelError(ValueError):
    """The checkpoint folder cannot be served. The message is one line that names what is wrong."""


class UnsupportedModelError(ModelError):
    """The checkpoint is sound but asks for something that is not implemented; the message names it."""


def positive_int(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """The integer at ``key``; ``default`` where it is absent or null. Raises ModelError."""
    return _int_at_least(1, config, key, default)


def non_negative_int(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """The same for integers that may be 0."""
    return _int_at_least(0, config, key, default)


def positive_float(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """The finite number at ``key``; ``default`` where it is absent or null. Raises ModelError."""
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ModelError(f"{key}: must be a number greater than 0, is {value!r}")
    return float(value)


def flag(config: Mapping[str, Any], key: str) -> bool:
    """The boolean at ``key``; False where it is absent or null. Raises ModelError."""
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise ModelError(f"{key}: must be true or false, is {value!r}")
    return bool(value)


def read_json(path: Path) -> Mapping[str, Any]:
    """The JSON object in the file. Raises ModelError."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ModelError(f"{path}: is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: must hold a JSON object")
    return content


def _int_at_least(minimum: int, config: Mapping[str, Any], key: str, default: int | None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ModelError(f"{key}: must be an integer greater than {minimum - 1}, is {value!r}")
    return value

"""What every configuration shares: checks that name the field, and dataclasses from TOML tables and back."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

_Config = TypeVar("_Config")


class ConfigError(ValueError):
    """A configuration value is unknown, missing or out of range. The message names the field."""


def require(condition: bool, field: str, problem: str) -> None:
    """Raise ConfigError ``"<field>: <problem>"`` unless ``condition`` holds."""
    if not condition:
        raise ConfigError(f"{field}: {problem}")


def require_positive(owner: object, *fields: str) -> None:
    """Each named field of ``owner`` must be greater than zero. Raises ConfigError."""
    for field in fields:
        value = getattr(owner, field)
        require(value > 0, field, f"must be greater than 0, is {value}")


def read_toml(path: Path) -> Mapping[str, Any]:
    """The tables of a TOML file. Raises ConfigError naming the file when it cannot be read or parsed."""
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: {error}") from error


def from_table(cls: type[_Config], table: Mapping[str, Any], *, where: str) -> _Config:
    """Build the dataclass ``cls`` from a TOML table; nested dataclasses are nested tables.

    Raises ConfigError for a key that ``cls`` does not have, one that is missing, or a value of another type; ``where``
    prefixes the field.
    """
    hints = get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in table.items():
        require(key in fields, f"{where}.{key}", f"unknown; known are {', '.join(sorted(fields))}")
        # A table that may be left out has the hint "Config | None".
        choices = (hints[key], *get_args(hints[key]))
        inner = next((each for each in choices if isinstance(each, type) and dataclasses.is_dataclass(each)), None)
        if inner is not None:
            require(isinstance(value, Mapping), f"{where}.{key}", "must be a table")
            values[key] = from_table(inner, value, where=f"{where}.{key}")
        elif isinstance(value, list):
            values[key] = tuple(value)
        else:
            values[key] = value
    for name, field in fields.items():
        optional = field.default is not MISSING or field.default_factory is not MISSING
        require(optional or name in table, f"{where}.{name}", "is missing")
    return cls(**values)


def to_toml(config: object) -> str:
    """A dataclass of texts, numbers, truth values, tuples of them and such dataclasses, as ``from_table`` reads it.

    Fields that are None are left out. Raises TypeError for a value of another type.
    """
    values = {item.name: getattr(config, item.name) for item in dataclasses.fields(config)}  # type: ignore[arg-type]
    tables = {name: value for name, value in values.items() if dataclasses.is_dataclass(value)}
    lines = [f"{name} = {_toml(value)}" for name, value in values.items() if name not in tables and value is not None]
    parts = ["\n".join(lines)]
    for name, value in tables.items():
        fields = dataclasses.fields(value)
        inner = [(item.name, getattr(value, item.name)) for item in fields]
        parts.append("\n".join([f"[{name}]", *(f"{key} = {_toml(each)}" for key, each in inner if each is not None)]))
    return "\n\n".join(part for part in parts if part) + "\n"


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, str):
        # JSON's escapes are among TOML's.
        return json.dumps(value)
    raise TypeError(f"cannot be written as TOML: {value!r}")

"""JSON from files that may be hostile: no duplicate keys, no NaN, no runaway nesting."""

from __future__ import annotations

import json
from typing import Any

_MAX_DIGITS = 400


def parse_object(data: bytes) -> dict[str, Any]:
    """The JSON object that ``data`` (UTF-8) holds. Raises ValueError saying what is wrong."""
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_without_duplicates,
            parse_constant=_refuse_constant,
            parse_int=_bounded_int,
        )
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error.msg} at character {error.pos}") from None
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("is not a JSON object")
    return value


def quoted(text: str, limit: int = 120) -> str:
    """``text`` for an error message: quoted, control characters escaped, shortened."""
    return repr(text if len(text) <= limit else text[:limit] + "...")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"has the key {quoted(key)} twice")
            seen.add(key)
    return result


def _bounded_int(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError("holds a number of too many digits")
    return int(digits)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"holds {name}, which is not JSON")

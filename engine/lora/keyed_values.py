"""rank_pattern and alpha_pattern: a value for the modules that a key means, by PEFT's own rules (``get_pattern_key``).

A key is a regular expression for a path's end, ``(.*\\.)?(KEY)$``, and the first in the file that means a path counts.
The keys that PEFT writes are plain names, and there may be one for each module: they are decided here, by look-up.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from segue.engine.lora.path_match import MAX_ENTRIES, Expression, Found, refused
from segue.engine.lora.strict_json import quoted

_LARGEST = sys.float_info.max
_PLAIN_KEY = re.compile(r"(\^?)([A-Za-z0-9_.]*)\$?")


@dataclass(frozen=True)
class _PlainKey:
    """A key of letters, digits, ``_`` and ``.`` alone: it means a path's end behind a dot, or the whole path."""

    place: int
    name: str
    anchored: bool

    @cached_property
    def _expression(self) -> re.Pattern[str]:
        return re.compile(self.name)

    def means(self, path: str, start: int) -> bool:
        return not (start and self.anchored) and self._expression.fullmatch(path, start) is not None


class KeyedValues:
    """The values of one option, by the place of their keys in the file."""

    def __init__(self, option: str, entries: Mapping[str, int | float]) -> None:
        self._values = tuple(entries.values())
        # A key can only mean paths that end with as many characters: so most keys are never compared.
        self._plain: dict[int, list[_PlainKey]] = {}
        self._places: dict[Expression, int] = {}
        for place, key in enumerate(entries):
            plain = _PLAIN_KEY.fullmatch(key)
            if plain is None:
                self._places[Expression(option=option, pattern=key, regex=rf"(.*\.)?({key})$")] = place
            else:
                self._plain.setdefault(len(plain[2]), []).append(_PlainKey(place, plain[2], bool(plain[1])))

    @classmethod
    def read(cls, config: Mapping[str, Any], option: str) -> KeyedValues:
        """Raises AdapterRejectedError where the option is no object with finite numbers."""
        entries = config.get(option)
        if entries is None:
            entries = {}
        if not isinstance(entries, dict):
            raise refused(f"{option} must be an object")
        if len(entries) > MAX_ENTRIES:
            raise refused(f"{option} has more than {MAX_ENTRIES} entries")
        return cls(option, {key: checked_number(value, f"{option}[{quoted(key)}]") for key, value in entries.items()})

    @property
    def expressions(self) -> list[Expression]:
        """The keys that are no plain names."""
        return list(self._places)

    def value_of(self, path: str, default: int | float, found: Found) -> int | float:
        """The value for a path, ``default`` if no key means it. ``found`` holds what the expressions match."""
        places = [place for expression, place in self._places.items() if path in found[expression]]
        for start in (0, *(index + 1 for index, mark in enumerate(path) if mark == ".")):
            keys = self._plain.get(len(path) - start, ())
            places.extend(key.place for key in keys if key.means(path, start))
        return self._values[min(places)] if places else default


def checked_number(value: Any, where: str) -> int | float:
    """``value`` if it is a finite number, else AdapterRejectedError naming ``where`` it is."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST:
        return value
    raise refused(f"{where} must be a finite number, is {quoted(str(value))}")

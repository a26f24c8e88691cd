"""Reads the traces that are published: arrivals and lengths of requests, and how often functions are invoked.

Files are told apart by their names' endings and their first lines. Columns are found by name; others are ignored.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from segue.bench.slo.trace import Trace

_AZURE_LLM = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_BURST_GPT = ("Timestamp", "Request tokens", "Response tokens")
_FUNCTIONS_2019 = ("HashOwner", "HashApp", "HashFunction", "Trigger")
_FUNCTIONS_2021 = ("app", "func", "end_timestamp", "duration")


class TraceError(Exception):
    """A trace that cannot be read. The message is one line, which names the file and the line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    seconds: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()


def read_request_trace(path: Path) -> Trace:
    """Arrivals and lengths, of Azure's LLM inference trace of 2023 or 2024, BurstGPT, or Mooncake (``.jsonl``).

    Requests that failed, whose answers BurstGPT gives no tokens, are left out. Raises TraceError.
    """
    try:
        requests = _mooncake(path) if path.suffix == ".jsonl" else _requests_of_csv(path)
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"{path}: {_reason(error)}") from error
    if len(requests) < 2:
        raise TraceError(f"{path}: has {len(requests)} requests, 2 are needed")
    requests.sort(key=lambda request: request.seconds)
    first = requests[0].seconds
    has_blocks = any(request.blocks for request in requests)
    return Trace(
        seconds=tuple(request.seconds - first for request in requests),
        prompt_tokens=tuple(request.prompt_tokens for request in requests),
        output_tokens=tuple(request.output_tokens for request in requests),
        blocks=tuple(request.blocks for request in requests) if has_blocks else (),
    )


def read_function_trace(path: Path) -> Trace:
    """The invocations of each function in Azure's trace of 2019 (a day's counts by minute) or 2021 (one a line).

    Raises TraceError.
    """
    counts: Counter[tuple[str, ...]] = Counter()
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = _Rows(path, file, (_FUNCTIONS_2019, _FUNCTIONS_2021))
            for row in rows:
                if rows.known is _FUNCTIONS_2019:
                    function = tuple(row[name] for name in _FUNCTIONS_2019[:3])
                    minutes = [row[name] for name in rows.columns if name.isdecimal()]
                    counts[function] += sum(rows.whole(text or "0") for text in minutes)
                else:
                    rows.number(row["end_timestamp"])
                    counts[row["app"], row["func"]] += 1
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"{path}: {_reason(error)}") from error
    found = sorted((count for count in counts.values() if count), reverse=True)
    if not found:
        raise TraceError(f"{path}: has no invocations")
    return Trace(function_counts=tuple(found))


def _requests_of_csv(path: Path) -> list[_Request]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = _Rows(path, file, (_AZURE_LLM, _BURST_GPT))
        requests: list[_Request] = []
        for row in rows:
            moment, prompt, output = (row[name] for name in rows.known)
            request = _Request(
                seconds=(rows.moment if rows.known is _AZURE_LLM else rows.number)(moment),
                prompt_tokens=rows.whole(prompt),
                output_tokens=rows.whole(output),
            )
            if request.output_tokens or rows.known is not _BURST_GPT:
                requests.append(request)
    return requests


def _mooncake(path: Path) -> list[_Request]:
    requests = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                table = json.loads(line)
                blocks = table.get("hash_ids", [])
                request = _Request(
                    seconds=_of_type(table["timestamp"], int, float) / 1e3,
                    prompt_tokens=_of_type(table["input_length"], int),
                    output_tokens=_of_type(table["output_length"], int),
                    blocks=tuple(_of_type(block, int) for block in blocks),
                )
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                problem = f"has no {error}" if isinstance(error, KeyError) else str(error)
                raise TraceError(f"{path}:{number}: {problem}") from error
            requests.append(request)
    return requests


def _of_type(value: Any, *kinds: type) -> Any:
    is_number = isinstance(value, kinds) and not isinstance(value, bool)
    if not is_number or not value >= 0:
        raise ValueError(f"{value!r} is no number from 0 on")
    return value


class _Rows:
    """The rows of a CSV file by the names of their columns. ``known`` are those that tell what the file is."""

    def __init__(self, path: Path, file: Any, known: Sequence[tuple[str, ...]]) -> None:
        self._path = path
        self._reader = csv.reader(file)
        self.columns = [name.strip().removeprefix("\ufeff") for name in self._next() or ()]
        found = next((names for names in known if set(names) <= set(self.columns)), None)
        if found is None:
            wanted = " or ".join(",".join(names) for names in known)
            raise TraceError(f"{path}:1: is no known trace: the first line must name the columns {wanted}")
        self.known = found

    def __iter__(self) -> Iterator[Mapping[str, str]]:
        while (values := self._next()) is not None:
            if not values:
                continue
            if len(values) != len(self.columns):
                raise self._error(f"has {len(values)} fields, the first line has {len(self.columns)}")
            yield dict(zip(self.columns, values, strict=True))

    def number(self, text: str) -> float:
        """A number of seconds."""
        try:
            return float(text)
        except ValueError:
            raise self._error(f"{text!r} is no number") from None

    def whole(self, text: str) -> int:
        """A whole number from 0 on."""
        try:
            value = int(text)
        except ValueError:
            raise self._error(f"{text!r} is no whole number") from None
        if value < 0:
            raise self._error(f"{value} is negative")
        return value

    def moment(self, text: str) -> float:
        """A date and time, of UTC if it does not say; in seconds."""
        try:
            moment = datetime.fromisoformat(text)
        except ValueError:
            raise self._error(f"{text!r} is no date and time") from None
        return (moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)).timestamp()

    def _next(self) -> list[str] | None:
        try:
            return next(self._reader)
        except StopIteration:
            return None
        except csv.Error as error:
            raise self._error(str(error)) from error

    def _error(self, problem: str) -> TraceError:
        return TraceError(f"{self._path}:{self._reader.line_num}: {problem}")


def _reason(error: OSError | UnicodeDecodeError) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "is no text"
    return error.strerror or str(error)

"""The process in which ``path_match`` evaluates the expressions of untrusted files: started by path, bounded, alone.

It reads one JSON object, ``{"expressions": [{"option": ..., "regex": ..., "whole": ...}, ...], "paths": [...]}``, and
answers each expression in turn with one line: ``{"found": {path: text of the group idx or null}}`` of the paths that it
is the first of its option to match, or ``{"error": why it is no valid expression}``. A process that ends before its
last line shows by the number of lines which expression it was at.
"""

from __future__ import annotations

import json
import re
import resource
import sys
from typing import TextIO

CPU_SECONDS = 2
ADDRESS_SPACE_BYTES = 1 << 30


def find_paths(regex: str, whole: bool, paths: list[str]) -> dict[str, str | None]:
    """The paths that the expression matches, ``whole`` or from their beginning, each with the text of its group idx."""
    expression = re.compile(regex)
    matches = expression.fullmatch if whole else expression.match
    found = {}
    for path in paths:
        match = matches(path)
        if match is not None:
            found[path] = match.groupdict().get("idx")
    return found


def answer(requests: TextIO, answers: TextIO) -> None:
    """Read the request and write a line for each of its expressions."""
    request = json.load(requests)
    # A path that an option's expression matches is not asked of those behind it: answers stay as small as the paths.
    unmatched: dict[str, list[str]] = {}
    for item in request["expressions"]:
        line: dict[str, object]
        paths = unmatched.get(item["option"], request["paths"])
        try:
            found = find_paths(item["regex"], item["whole"], paths)
            unmatched[item["option"]] = [path for path in paths if path not in found]
            line = {"found": found}
        except re.error as error:
            line = {"error": error.msg}
        except RecursionError:
            line = {"error": "its groups are nested too deeply"}
        except (OverflowError, ValueError) as error:
            line = {"error": str(error)}
        answers.write(json.dumps(line) + "\n")
        answers.flush()


def set_limit(kind: int, limit: int) -> None:
    """A hard limit for this process, unless a lower one holds already."""
    present = resource.getrlimit(kind)[1]
    limit = limit if present == resource.RLIM_INFINITY else min(limit, present)
    resource.setrlimit(kind, (limit, limit))


if __name__ == "__main__":
    set_limit(resource.RLIMIT_CPU, CPU_SECONDS)
    set_limit(resource.RLIMIT_AS, ADDRESS_SPACE_BYTES)
    answer(sys.stdin, sys.stdout)

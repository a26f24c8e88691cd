"""Matching module paths against regular expressions of untrusted files: by ``re`` itself, in a process that has bounds.

PEFT evaluates the expressions of an adapter with ``re``, so that only ``re`` gives them PEFT's meaning exactly. ``re``
holds the GIL while it works and cannot be interrupted, and a short pattern can keep it busy for years or take all
memory: hence it gets a process of its own (``pattern_child``) that the kernel ends at its bounds. The ``regex`` package
bounds matching but not compiling and reads some patterns otherwise; RE2 is fast on every pattern but knows neither
look-around nor backreferences.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from segue.engine.lora.strict_json import quoted
from segue.errors import AdapterRejectedError

MAX_PATTERN_CHARS = 16_384
# More than any model has projections, for each of which there may be a key.
MAX_ENTRIES = 2048
# The child bounds its own CPU time; this one is for a child that gets none.
WALL_SECONDS = 60.0

_CHILD = Path(__file__).with_name("pattern_child.py")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Expression:
    """``regex`` as ``re`` gets it, and the option and pattern of the configuration that it comes from.

    ``whole``: a path must match from beginning to end (``re.fullmatch``), otherwise its beginning must (``re.match``).
    """

    option: str
    pattern: str
    regex: str
    whole: bool = False


Found = Mapping[Expression, Mapping[str, str | None]]
"""For each expression the paths that it is the first of its option to match, each with the text of the group ``idx``
where there is one."""


def refused(problem: str) -> AdapterRejectedError:
    """The error for something in the configuration."""
    return AdapterRejectedError(f"adapter_config.json: {problem}")


def match_paths(expressions: Sequence[Expression], paths: Sequence[str], wall_seconds: float = WALL_SECONDS) -> Found:
    """What each expression matches of ``paths``, in the order given. Starts a process if there are expressions at all.

    Blocks without the GIL. Raises AdapterRejectedError naming the option and the pattern that is too long, no valid
    expression, or takes more time or memory than the bounds of ``pattern_child`` allow to all expressions together;
    OSError if no process can be started.
    """
    for expression in expressions:
        if len(expression.pattern) > MAX_PATTERN_CHARS:
            raise _refused(expression, f"is longer than {MAX_PATTERN_CHARS} characters")
    if not expressions:
        return {}
    request = {
        "expressions": [{"option": item.option, "regex": item.regex, "whole": item.whole} for item in expressions],
        "paths": list(paths),
    }
    lines, ending = _run_child(json.dumps(request).encode(), wall_seconds)
    found = {}
    for expression, line in zip(expressions, lines, strict=False):
        answer = json.loads(line)
        if "error" in answer:
            raise _refused(expression, f"is no valid regular expression: {quoted(answer['error'])[1:-1]}")
        found[expression] = answer["found"]
    if len(lines) < len(expressions):
        problem = f"takes too much time or memory to match (its process {ending})"
        raise _refused(expressions[len(lines)], problem)
    return found


def _run_child(request: bytes, wall_seconds: float) -> tuple[list[bytes], str]:
    """The complete lines of the child's answer, and how it ended."""
    try:
        # Isolated and without site: nothing of the environment or the working directory is imported.
        done = subprocess.run(
            [sys.executable, "-I", "-S", str(_CHILD)],
            input=request,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=wall_seconds,
            check=False,
        )
        output, ending = done.stdout, f"ended with status {done.returncode}"
    except subprocess.TimeoutExpired as error:
        output, ending = error.stdout or b"", f"had not ended after {wall_seconds:g} seconds"
    # What is behind the last line's end is nothing, or a line that was being written.
    return output.split(b"\n")[:-1], ending


def _refused(expression: Expression, problem: str) -> AdapterRejectedError:
    return refused(f"{expression.option}: the pattern {quoted(expression.pattern)} {problem}")

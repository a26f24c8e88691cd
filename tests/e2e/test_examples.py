"""Every script of examples/ runs against a real server as its README says."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from tests.e2e.live import ASSETS, LiveServer, live_server

EXAMPLES = Path(__file__).parents[2] / "examples"
ADAPTERS = ASSETS / "adapters"


def check_quickstart(lines: list[str]) -> None:
    *text, end, timing = lines
    assert "sea" in " ".join(text)
    assert " tokens, ended by " in end
    assert timing.startswith("adapter from ")
    assert ", first token after " in timing


def check_many_adapters(lines: list[str]) -> None:
    assert sorted(line.split()[0] for line in lines) == sorted(path.name for path in ADAPTERS.iterdir())
    assert all(" TTFT " in line and " ms from " in line for line in lines)
    assert len({line.partition("'")[2] for line in lines}) > len(lines) // 2


def check_chat(lines: list[str]) -> None:
    speakers = [line.partition(":")[0] for line in lines if line.startswith(("user:", "yoda:"))]
    assert speakers == ["user", "yoda"] * 2
    assert all(line.partition(": ")[2] for line in lines)


def check_errors(lines: list[str]) -> None:
    kinds = [line.partition(":")[0] for line in lines]
    assert kinds == ["invalid", "invalid", "unknown adapter", "too slow", "any error", "unreachable"]
    assert {line.split(": ")[1] for line in lines[:2]} == {"sampling.max_tokens", "sampling.temperature"}
    assert "pirate" in lines[2]
    assert lines[4] == "any error: INVALID_ARGUMENT INVALID_REQUEST of request errors-example"
    assert lines[5] == "unreachable: EngineUnavailableError, after EngineUnavailableError"


CHECKS: Mapping[str, Callable[[list[str]], None]] = {
    "chat": check_chat,
    "errors": check_errors,
    "many_adapters": check_many_adapters,
    "quickstart": check_quickstart,
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with live_server(tmp_path_factory.mktemp("examples") / "server", ADAPTERS) as running:
        yield running


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_runs(server: LiveServer, script: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-W", "error", str(script), "--server", server.address],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, ""), result.stdout
    CHECKS[script.stem](result.stdout.splitlines())

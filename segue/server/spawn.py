"""A server in a process of its own, for programs that need one for a while."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_POLL_SECONDS = 0.1
_STOP_SECONDS = 30.0
_LOG_TAIL = 2000


class SpawnError(Exception):
    """The server did not come up; the message has the end of its log."""


@contextmanager
def spawned_server(table: Mapping[str, Any], *, start_seconds: float) -> Iterator[str]:
    """``segue serve`` as the configuration ``table`` says, on a free port of this machine; gives its address.

    The server is stopped at the end. Raises SpawnError.
    """
    with tempfile.TemporaryDirectory(prefix="segue-serve-") as folder:
        config, log, address = (Path(folder) / name for name in ("segue.toml", "server.log", "address"))
        config.write_text(to_toml({**table, "listen": "127.0.0.1:0"}))
        command = [sys.executable, "-m", "segue", "serve", "--config", str(config), "--address-file", str(address)]
        with log.open("w") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        try:
            yield _wait(process, address, log, start_seconds)
        finally:
            process.terminate()
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def to_toml(table: Mapping[str, Any], name: str = "") -> str:
    """A configuration file of strings, numbers, lists of them, and tables, which may be dataclasses; without None."""
    lines = [f"[{name}]"] if name else []
    tables: list[tuple[str, Mapping[str, Any]]] = []
    for key, value in table.items():
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            tables.append((key, {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}))
        elif isinstance(value, Mapping):
            tables.append((key, value))
        elif value is not None:
            # What JSON writes of these is TOML as well.
            lines.append(f"{key} = {json.dumps(value)}")
    lines += [to_toml(value, f"{name}.{key}" if name else key) for key, value in tables]
    return "\n".join(lines) + "\n"


def _wait(process: subprocess.Popen[bytes], address: Path, log: Path, start_seconds: float) -> str:
    """The address, once the server serves."""
    deadline = time.monotonic() + start_seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise SpawnError(f"the server ended early:\n{log.read_text()[-_LOG_TAIL:]}")
        if address.exists():
            return address.read_text().strip()
        time.sleep(_POLL_SECONDS)
    raise SpawnError(f"the server does not serve after {start_seconds:g} s:\n{log.read_text()[-_LOG_TAIL:]}")

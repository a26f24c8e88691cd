from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from segue.config import from_table
from segue.engine.config import EngineConfig, HandoffConfig
from segue.server.config import ServerConfig
from segue.server.spawn import SpawnError, spawned_server, to_toml


def test_a_configuration_is_written_as_it_is_read() -> None:
    config = ServerConfig(
        engine=EngineConfig(
            model_dir='a "folder"\\x', copy_bytes_per_second=4e6, cpu_cores=(1, 2), handoff=HandoffConfig(mode="stream")
        ),
        adapters_dir="größe",
        pinned_adapters=("a", "b"),
    )
    (table,) = (tomllib.loads(to_toml({"server": config})).values(),)
    assert [from_table(ServerConfig, item, where="server") for item in table] == [config]


def test_a_server_that_does_not_come_up_says_why(tmp_path: Path) -> None:
    table = {"adapters_dir": str(tmp_path), "engine": {"model_dir": str(tmp_path / "none")}}
    with (
        pytest.raises(SpawnError, match=r"(?s)ended early:\n.*none.config\.json"),
        spawned_server(table, start_seconds=60),
    ):
        pass

"""The server that is started is the one that was asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from segue.bench.slo.start import StartConfig, parse_settings
from segue.config import ConfigError


def test_settings_are_as_in_the_configuration_file() -> None:
    texts = (
        "drain_seconds=2.5",
        "engine.chunk_tokens=512",
        'engine.handoff.mode="stream"',
        "engine.prefix_cache=false",
    )
    top, engine = parse_settings(texts)
    assert top == {"drain_seconds": 2.5}
    assert engine == {"chunk_tokens": 512, "handoff": {"mode": "stream"}, "prefix_cache": False}


@pytest.mark.parametrize("text", ["", "=1", "engine.chunk_tokens", "drain_seconds=", "model_name=unquoted"])
def test_another_form_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match="set: must be KEY=VALUE"):
        parse_settings([text])


def test_settings_go_before_what_is_chosen() -> None:
    config = StartConfig(
        shape="tiny", ranks=(8, 32), adapters=3, settings=("engine.max_running=7", "prepare_threads=2")
    )
    table = config.server_table(Path("m"), Path("a"), ["x"], 1000)
    assert (table["engine"].max_running, table["engine"].max_lora_rank, table["prepare_threads"]) == (7, 32, 2)
    assert table["pinned_adapters"] == []
    pinned = StartConfig(shape="tiny", pinned=True).server_table(Path("m"), Path("a"), ["x"], 1000)
    assert pinned["pinned_adapters"] == ["x"]


def test_an_adapter_has_the_rank_of_its_turn() -> None:
    mix = StartConfig(shape="tiny", ranks=(8, 32), adapters=3).mix
    assert mix.adapter_names == ("qkvo-rank-8-0", "qkvo-rank-32-0", "qkvo-rank-8-1")
    assert StartConfig(shape="tiny", adapters=0).mix.adapter_names == ()

"""Adapters that the configuration pins: what the engine is told of them, and what operators may do with them."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from segue import Client, EngineUnavailableError, Tier
from segue.config import ConfigError
from segue.errors import AdapterNotFoundError, AdapterPinnedError, StatusCode
from segue.server.app import ServerStartError
from tests.server.fake_engine import NEVER_LANDS_RANK, TOO_WIDE_TO_PIN, Command
from tests.server.rig import LoopThread, Rig, running_server, server_config, wait_until, write_adapter


@pytest.fixture
def pinning(loop: LoopThread, tmp_path: Path) -> Iterator[Rig]:
    with running_server(loop, tmp_path, pinned_adapters=("beta",)) as rig:
        yield rig


def opened(rig: Rig) -> list[tuple[str, bool]]:
    """The versions that the engines were told of, and whether as pinned."""
    return [(message["manifest"]["name"], message["pinned"]) for message in rig.messages("OpenVersion")]


def replace_adapter(rig: Rig, name: str, *, rank: int) -> None:
    shutil.rmtree(rig.adapters_dir / name)
    write_adapter(rig.adapters_dir / name, rank=rank)


def lose_engine(client: Client) -> None:
    with pytest.raises(EngineUnavailableError):
        client.generate([Command.DIE])


def test_pinned_adapters_are_handed_over_before_the_server_serves(pinning: Rig) -> None:
    assert opened(pinning) == [("beta", True)]
    client = pinning.client()
    alpha, beta = client.adapters.list()
    assert (alpha.pinned, alpha.tier) == (False, Tier.DISK)
    assert (beta.pinned, beta.tier) == (True, Tier.DEVICE)
    for name in ("alpha", "beta"):
        client.generate([10], adapter=name, max_tokens=1)
    assert opened(pinning) == [("beta", True), ("alpha", False)]


def test_without_any_nothing_is_pinned(rig: Rig, client: Client) -> None:
    client.generate([10], adapter="beta", max_tokens=1)
    assert opened(rig) == [("beta", False)]
    assert not any(info.pinned for info in client.adapters.list())


def test_a_new_engine_is_told_again(pinning: Rig) -> None:
    lose_engine(pinning.client())
    pinning.wait_for("OpenVersion", 2)
    assert opened(pinning) == [("beta", True)] * 2


def test_new_content_is_pinned_and_the_old_goes_with_its_users(pinning: Rig) -> None:
    client = pinning.client()
    with client.generate([Command.SILENT], adapter="beta", stream=True):
        pinning.wait_for("Submit")
        replace_adapter(pinning, "beta", rank=8)
        client.generate([10], adapter="beta", max_tokens=1)
        assert opened(pinning) == [("beta", True)] * 2
        assert pinning.messages("CloseVersion") == []
    first = pinning.messages("OpenVersion")[0]["manifest"]["version_id"]
    assert pinning.wait_for("CloseVersion")[0]["version_id"] == first


def test_evict_is_refused(pinning: Rig) -> None:
    client = pinning.client()
    with pytest.raises(AdapterPinnedError, match="adapter 'beta' is pinned to the device") as caught:
        client.adapters.evict("beta")
    assert caught.value.code is StatusCode.FAILED_PRECONDITION
    assert pinning.messages("Evict") == []
    client.generate([10], adapter="alpha", max_tokens=1)
    client.adapters.evict("alpha")
    pinning.wait_for("Evict")


def test_unload_is_the_operators_word_and_load_pins_again(pinning: Rig) -> None:
    client = pinning.client()
    client.adapters.unload("beta")
    pinning.wait_for("CloseVersion")
    with pytest.raises(AdapterNotFoundError):
        client.adapters.evict("beta")
    assert client.adapters.load("beta").pinned
    client.generate([10], adapter="beta", max_tokens=1)
    assert opened(pinning) == [("beta", True)] * 2


def test_the_start_does_not_wait_for_ever(loop: LoopThread, tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapters" / "late", rank=NEVER_LANDS_RANK)
    with (
        pytest.raises(ServerStartError, match=r"^pinned_adapters: not all are on the device after 2 s$"),
        running_server(loop, tmp_path, pinned_adapters=("alpha", "late"), start_seconds=2.0),
    ):
        raise AssertionError("the server must not start")


@pytest.mark.parametrize(
    ("pinned", "message"),
    [
        (("alpha", "nobody"), r"^pinned_adapters: nobody: no adapter 'nobody'$"),
        (("../alpha",), r"^pinned_adapters: \.\./alpha: "),
        (("wide",), r"^pinned_adapters: wide: .*rank 65 is over the limit of 64"),
        (("alpha", "large", "nobody"), r"^pinned_adapters: large: the pinned adapters do not fit; nobody: no adapter"),
    ],
)
def test_an_adapter_that_cannot_be_pinned_ends_the_start(
    loop: LoopThread, tmp_path: Path, pinned: tuple[str, ...], message: str
) -> None:
    write_adapter(tmp_path / "adapters" / "wide", rank=65)
    write_adapter(tmp_path / "adapters" / "large", rank=TOO_WIDE_TO_PIN)
    with (
        pytest.raises(ServerStartError, match=message) as caught,
        running_server(loop, tmp_path, pinned_adapters=pinned),
    ):
        raise AssertionError("the server must not start")
    assert "\n" not in str(caught.value)


def test_after_a_restart_it_is_logged_and_the_server_serves(
    loop: LoopThread, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with running_server(loop, tmp_path, pinned_adapters=("alpha", "beta")) as rig:
        client = rig.client()
        shutil.rmtree(rig.adapters_dir / "alpha")
        with caplog.at_level(logging.ERROR):
            lose_engine(client)
            wait_until(lambda: "pinned_adapters: alpha: no adapter 'alpha'" in caplog.text, "the loss is logged")
        assert client.generate([10], max_tokens=1).token_ids == (10,)
        assert opened(rig)[2:] == [("beta", True)]


def test_a_version_that_fails_later_is_logged(
    loop: LoopThread, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with running_server(loop, tmp_path, pinned_adapters=("beta",)) as rig, caplog.at_level(logging.ERROR):
        replace_adapter(rig, "beta", rank=TOO_WIDE_TO_PIN)
        rig.client().generate([10], adapter="beta", max_tokens=1)
        wait_until(lambda: "pinned adapter 'beta' cannot be served" in caplog.text, "the failure is logged")


@pytest.mark.parametrize("pinned", ["alpha", ("",), (5,), ("alpha", "alpha")])
def test_a_wrong_list_is_a_config_error(tmp_path: Path, pinned: object) -> None:
    with pytest.raises(ConfigError, match=r"^pinned_adapters: must"):
        dataclasses.replace(server_config(tmp_path, tmp_path), pinned_adapters=pinned)  # type: ignore[arg-type]

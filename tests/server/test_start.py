"""How a server starts: what it tells of the engine's start, and a model folder without a tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest

from segue import Client, EngineUnavailableError, InvalidRequestError, Message
from segue.server.app import ServerStartError
from tests.server.fake_engine import LOADING, Command
from tests.server.rig import LoopThread, Rig, byte_level_tokenizer, running_server, wait_until


def test_every_start_of_an_engine_is_told(rig: Rig, client: Client) -> None:
    assert tuple(rig.progress) == LOADING
    with pytest.raises(EngineUnavailableError):
        client.generate([Command.DIE])
    wait_until(lambda: tuple(rig.progress) == LOADING + LOADING, "the second engine's start is told")


def test_random_weights_need_no_tokenizer(loop: LoopThread, tmp_path: Path) -> None:
    with running_server(loop, tmp_path, load_format="dummy", has_tokenizer=False) as rig:
        client = rig.client()
        reply = client.generate([10, 20, 30], max_tokens=3)
        assert (reply.token_ids, reply.text) == ((30, 20, 10), "")
        byte_level_tokenizer().save(str(rig.adapters_dir / "alpha" / "tokenizer.json"))
        assert client.generate([10, 20], adapter="alpha", max_tokens=1).token_ids == (20,)
        with pytest.raises(InvalidRequestError, match=r"^text: the model has no tokenizer: send token_ids"):
            client.generate("hello")
        with pytest.raises(InvalidRequestError, match=r"^chat: the model has no tokenizer: send token_ids"):
            client.generate([Message(role="user", content="hello")], adapter="alpha")
        with pytest.raises(InvalidRequestError, match=r"^sampling\.stop: the model has no tokenizer$"):
            client.generate([10], stop=["x"])


def test_random_weights_leave_a_tokenizer_that_is_there_in_use(loop: LoopThread, tmp_path: Path) -> None:
    with running_server(loop, tmp_path, load_format="dummy") as rig:
        ids = byte_level_tokenizer().encode("hello").ids
        assert rig.client().generate("hello", max_tokens=1).token_ids == (ids[-1],)


def test_weights_from_a_folder_need_a_tokenizer(loop: LoopThread, tmp_path: Path) -> None:
    with (
        pytest.raises(ServerStartError, match=r"has no tokenizer\.json$"),
        running_server(loop, tmp_path, has_tokenizer=False),
    ):
        raise AssertionError("the server must not start")

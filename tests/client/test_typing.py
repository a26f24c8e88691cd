"""What a type checker sees: mypy fails on a wrong ``assert_type`` and on an ignore that is not needed."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, assert_type

import pytest

from segue import AsyncClient, AsyncGenerateStream, Chunk, Client, GenerateStream, Reply
from tests.client.rig import fake_server


def test_the_synchronous_client() -> None:
    with fake_server() as server, Client(server.target) as client:
        reply = assert_type(client.generate("x"), Reply)
        assert isinstance(reply, Reply)
        with assert_type(client.generate("x", stream=True), GenerateStream) as stream:
            chunks = [assert_type(chunk, Chunk) for chunk in stream]
        assert len(chunks) == 3
        assert_type(stream.reply, Reply)
        with pytest.raises(TypeError, match="unknown option: max_token"):
            client.generate("x", max_token=5)  # type: ignore[call-overload]


def test_the_asynchronous_client(runner: asyncio.Runner) -> None:
    async def use(target: str) -> None:
        async with AsyncClient(target) as client:
            reply = assert_type(client.generate("x", stream=False), Coroutine[Any, Any, Reply])
            assert isinstance(assert_type(await reply, Reply), Reply)
            async with assert_type(client.generate("x", stream=True), AsyncGenerateStream) as stream:
                chunks = [assert_type(chunk, Chunk) async for chunk in stream]
            assert len(chunks) == 3
            assert_type(stream.reply, Reply)
            with pytest.raises(TypeError, match="can't be used in 'await' expression"):
                await client.generate("x", stream=True)  # type: ignore[misc]

    with fake_server() as server:
        runner.run(use(server.target))

"""The client for asyncio."""

from __future__ import annotations

import asyncio
import functools
import weakref
from collections.abc import Awaitable, Coroutine
from typing import Any, TypeVar

import grpc

from segue.client.answer import GenerateJob
from segue.client.async_stream import AsyncGenerateStream
from segue.client.base import BaseClient
from segue.client.rpcs import UnaryRpc
from segue.client.status import error_of_rpc
from segue.types import AdapterInfo, Reply, ServerInfo

_Result = TypeVar("_Result")


class AsyncClient(BaseClient[Coroutine[Any, Any, Reply], AsyncGenerateStream, Awaitable[object]]):
    """The same as Client for asyncio. Make it, use it and close it on one event loop; RuntimeError if none is running.

    ``generate`` is a plain method. ``await client.generate(...)`` gives the Reply; before the await nothing is sent and
    nothing refused. ``client.generate(..., stream=True)`` is sent at once and gives an AsyncGenerateStream, which is
    not awaited: ``async with client.generate(..., stream=True) as stream: async for chunk in stream: ...``. All other
    methods are coroutines. Cancelling the task that waits cancels the RPC, and asyncio.CancelledError passes through.
    """

    _default_sleep = staticmethod(asyncio.sleep)

    @functools.cached_property
    def _streams(self) -> weakref.WeakSet[AsyncGenerateStream]:
        return weakref.WeakSet()

    @property
    def adapters(self) -> AsyncAdapters:
        """The adapters of the server."""
        return AsyncAdapters(self)

    async def abort(self, request_id: str, *, timeout: float | None = None) -> None:
        """Stop a live request that was sent over this connection. Raises RequestNotFoundError if there is none."""
        await self._run(self._rpcs.abort(request_id), timeout)

    async def info(self, *, timeout: float | None = None) -> ServerInfo:
        """What the server is and holds."""
        return await self._run(self._rpcs.info(), timeout)

    async def close(self) -> None:
        """Close the connection; requests that still run are cancelled."""
        # Not every version of gRPC does this itself: 1.74 forgets calls that only wait for a response.
        for stream in list(self._streams):
            stream.disconnect()
        await self._channel.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @staticmethod
    def _grpc_module() -> Any:
        # Without a running loop gRPC would take one of its own choice, and every call would fail obscurely.
        asyncio.get_running_loop()
        return grpc.aio

    def _stream(self, job: GenerateJob) -> AsyncGenerateStream:
        stream = AsyncGenerateStream(job, self._rpcs.generate, self._sleep)
        self._streams.add(stream)
        return stream

    async def _whole(self, job: GenerateJob) -> Reply:
        async with self._stream(job) as stream:
            async for _ in stream:
                continue
            return stream.reply

    async def _run(self, rpc: UnaryRpc[_Result], timeout: float | None) -> _Result:
        attempts = self._attempts(timeout)
        while True:
            try:
                return rpc.result(await rpc.method(rpc.request, timeout=attempts.begin()))
            except grpc.RpcError as error:
                await self._sleep(attempts.pause_seconds(error_of_rpc(error), repeatable=rpc.repeatable))


class AsyncAdapters:
    """The adapters of a server: ``client.adapters``. The same as Adapters, as coroutines."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def list(self, *, timeout: float | None = None) -> tuple[AdapterInfo, ...]:
        """Every adapter, by name."""
        return await self._client._run(self._client._rpcs.list_adapters(), timeout)

    async def load(
        self, name: str, path: str = "", *, preload: bool = False, timeout: float | None = None
    ) -> AdapterInfo:
        """Make ``name`` stand for the folder ``path``; see Adapters.load."""
        return await self._client._run(self._client._rpcs.load_adapter(name, path, preload), timeout)

    async def unload(self, name: str, *, timeout: float | None = None) -> None:
        """Make ``name`` unknown until it is loaded again; see Adapters.unload."""
        await self._client._run(self._client._rpcs.unload_adapter(name), timeout)

    async def evict(self, name: str, *, timeout: float | None = None) -> None:
        """Drop the adapter's weights from memory once nothing uses them; see Adapters.evict."""
        await self._client._run(self._client._rpcs.evict_adapter(name), timeout)

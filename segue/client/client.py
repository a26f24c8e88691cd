"""The synchronous client."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any, TypeVar

import grpc

from segue.client.answer import GenerateJob
from segue.client.base import BaseClient
from segue.client.rpcs import UnaryRpc
from segue.client.status import error_of_rpc
from segue.client.stream import GenerateStream
from segue.types import AdapterInfo, Reply, ServerInfo

_Result = TypeVar("_Result")


class Client(BaseClient[Reply, GenerateStream, None]):
    """A connection to one server; safe for use by several threads. Close it, or use it in a ``with`` block.

    Every method raises a SegueError for what the server refuses, EngineUnavailableError when it cannot be reached, and
    DeadlineExceededError when ``timeout`` seconds have passed (None: no bound). After several attempts it is the error
    of the last one, with that of the attempt before as its ``__cause__``.
    """

    _default_sleep = staticmethod(time.sleep)

    @property
    def adapters(self) -> Adapters:
        """The adapters of the server."""
        return Adapters(self)

    def abort(self, request_id: str, *, timeout: float | None = None) -> None:
        """Stop a live request that was sent over this connection. Raises RequestNotFoundError if there is none."""
        self._run(self._rpcs.abort(request_id), timeout)

    def info(self, *, timeout: float | None = None) -> ServerInfo:
        """What the server is and holds."""
        return self._run(self._rpcs.info(), timeout)

    def close(self) -> None:
        """Close the connection; requests that still run are cancelled."""
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @staticmethod
    def _grpc_module() -> Any:
        return grpc

    def _stream(self, job: GenerateJob) -> GenerateStream:
        return GenerateStream(job, self._rpcs.generate, self._sleep)

    def _whole(self, job: GenerateJob) -> Reply:
        with self._stream(job) as stream:
            for _ in stream:
                continue
            return stream.reply

    def _run(self, rpc: UnaryRpc[_Result], timeout: float | None) -> _Result:
        attempts = self._attempts(timeout)
        while True:
            try:
                return rpc.result(rpc.method(rpc.request, timeout=attempts.begin()))
            except grpc.RpcError as error:
                self._sleep(attempts.pause_seconds(error_of_rpc(error), repeatable=rpc.repeatable))


class Adapters:
    """The adapters of a server: ``client.adapters``. Calls are made again by the client's RetryPolicy, save unload."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def list(self, *, timeout: float | None = None) -> tuple[AdapterInfo, ...]:
        """Every adapter, by name."""
        return self._client._run(self._client._rpcs.list_adapters(), timeout)

    def load(self, name: str, path: str = "", *, preload: bool = False, timeout: float | None = None) -> AdapterInfo:
        """Make ``name`` stand for the folder ``path``, relative to the server's adapters folder.

        Without a path it is the folder of that name. With ``preload`` the weights start for the device at once.
        """
        return self._client._run(self._client._rpcs.load_adapter(name, path, preload), timeout)

    def unload(self, name: str, *, timeout: float | None = None) -> None:
        """Make ``name`` unknown until it is loaded again or the server restarts; requests that use it end first."""
        self._client._run(self._client._rpcs.unload_adapter(name), timeout)

    def evict(self, name: str, *, timeout: float | None = None) -> None:
        """Drop the adapter's weights from device and host memory once nothing uses them; it stays known."""
        self._client._run(self._client._rpcs.evict_adapter(name), timeout)

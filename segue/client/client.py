"""The synchronous client."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Literal, Unpack, overload

import grpc

from segue.client.requests import (
    GenerateOptions,
    Prompt,
    ReplyBuilder,
    adapter_info,
    build_generate_request,
    server_info,
)
from segue.client.status import error_of_rpc
from segue.client.stream import GenerateStream
from segue.types import AdapterInfo, Reply, ServerInfo
from segue.v1 import (
    adapters_pb2,
    adapters_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
)

_CHANNEL_OPTIONS = (("grpc.max_receive_message_length", -1),)


class Client:
    """A connection to one server; safe for use by several threads. Close it, or use it in a ``with`` block.

    Every method raises a SegueError for what the server refuses, EngineUnavailableError when it cannot be reached, and
    DeadlineExceededError when ``timeout`` seconds have passed (None: no bound).
    """

    def __init__(
        self,
        target: str,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        channel_options: Sequence[tuple[str, Any]] = (),
    ) -> None:
        """``target`` is ``host:port``. Without ``credentials`` the connection is plain text."""
        options = (*_CHANNEL_OPTIONS, *channel_options)
        if credentials is None:
            self._channel = grpc.insecure_channel(target, options)
        else:
            self._channel = grpc.secure_channel(target, credentials, options)
        self._generation = generation_pb2_grpc.GenerationServiceStub(self._channel)
        self._server = server_pb2_grpc.ServerServiceStub(self._channel)
        self.adapters = Adapters(self._channel)

    @overload
    def generate(
        self,
        prompt: Prompt,
        *,
        stream: Literal[False] = False,
        timeout: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Reply: ...

    @overload
    def generate(
        self,
        prompt: Prompt,
        *,
        stream: Literal[True],
        timeout: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> GenerateStream: ...

    def generate(
        self,
        prompt: Prompt,
        *,
        stream: bool = False,
        timeout: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Reply | GenerateStream:
        """Generate an answer: the whole of it, or with ``stream=True`` piece by piece.

        ``prompt`` is text, token ids or chat messages. ``timeout`` bounds the whole answer in seconds.
        """
        request = build_generate_request(prompt, options)
        call = self._generation.Generate(request, timeout=timeout)
        answer = GenerateStream(iter(call), call.cancel, ReplyBuilder(request.request_id))
        if stream:
            return answer
        with answer:
            for _ in answer:
                continue
            return answer.reply

    def abort(self, request_id: str, *, timeout: float | None = None) -> None:
        """Stop a live request that was sent over this connection. Raises RequestNotFoundError if there is none."""
        with segue_errors():
            self._generation.Abort(generation_pb2.AbortRequest(request_id=request_id), timeout=timeout)

    def info(self, *, timeout: float | None = None) -> ServerInfo:
        """What the server is and holds."""
        with segue_errors():
            return server_info(self._server.GetInfo(server_pb2.GetInfoRequest(), timeout=timeout))

    def close(self) -> None:
        """Close the connection; requests that still run are cancelled."""
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Adapters:
    """The adapters of a server: ``client.adapters``."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._stub = adapters_pb2_grpc.AdapterServiceStub(channel)

    def list(self, *, timeout: float | None = None) -> tuple[AdapterInfo, ...]:
        """Every adapter, by name."""
        with segue_errors():
            response = self._stub.ListAdapters(adapters_pb2.ListAdaptersRequest(), timeout=timeout)
        return tuple(map(adapter_info, response.adapters))

    def load(self, name: str, path: str = "", *, preload: bool = False, timeout: float | None = None) -> AdapterInfo:
        """Make ``name`` stand for the folder ``path``, relative to the server's adapters folder.

        Without a path it is the folder of that name. With ``preload`` the weights start for the device at once.
        """
        request = adapters_pb2.LoadAdapterRequest(name=name, path=path, preload=preload)
        with segue_errors():
            return adapter_info(self._stub.LoadAdapter(request, timeout=timeout).adapter)

    def unload(self, name: str, *, timeout: float | None = None) -> None:
        """Make ``name`` unknown until it is loaded again or the server restarts; requests that use it end first."""
        with segue_errors():
            self._stub.UnloadAdapter(adapters_pb2.UnloadAdapterRequest(name=name), timeout=timeout)

    def evict(self, name: str, *, timeout: float | None = None) -> None:
        """Drop the adapter's weights from device and host memory once nothing uses them; it stays known."""
        with segue_errors():
            self._stub.EvictAdapter(adapters_pb2.EvictAdapterRequest(name=name), timeout=timeout)


@contextlib.contextmanager
def segue_errors() -> Iterator[None]:
    """Raise the SegueError of an RPC that fails in the block."""
    try:
        yield
    except grpc.RpcError as error:
        raise error_of_rpc(error) from None

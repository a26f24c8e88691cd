"""The server's methods: what each is sent, what its response means, and whether it may be called again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from google.protobuf.message import Message

from segue.client.requests import adapter_info, server_info
from segue.types import AdapterInfo, ServerInfo
from segue.v1 import (
    adapters_pb2,
    adapters_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
)

_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class UnaryRpc(Generic[_Result]):
    """A call with one response. ``repeatable``: done twice, it does and tells the same as done once."""

    method: Callable[..., Any]
    request: Message
    result: Callable[[Any], _Result]
    repeatable: bool = True


class Rpcs:
    """The methods of a server over one channel of gRPC, a synchronous or an asynchronous one."""

    def __init__(self, channel: Any) -> None:
        self._generation = generation_pb2_grpc.GenerationServiceStub(channel)
        self._server = server_pb2_grpc.ServerServiceStub(channel)
        self._adapters = adapters_pb2_grpc.AdapterServiceStub(channel)
        self.generate: Callable[..., Any] = self._generation.Generate

    def abort(self, request_id: str) -> UnaryRpc[None]:
        """Not repeatable: what the first call has stopped, the second would not find."""
        request = generation_pb2.AbortRequest(request_id=request_id)
        return UnaryRpc(method=self._generation.Abort, request=request, result=_nothing, repeatable=False)

    def info(self) -> UnaryRpc[ServerInfo]:
        return UnaryRpc(method=self._server.GetInfo, request=server_pb2.GetInfoRequest(), result=server_info)

    def list_adapters(self) -> UnaryRpc[tuple[AdapterInfo, ...]]:
        request = adapters_pb2.ListAdaptersRequest()
        return UnaryRpc(method=self._adapters.ListAdapters, request=request, result=_adapter_infos)

    def load_adapter(self, name: str, path: str, preload: bool) -> UnaryRpc[AdapterInfo]:
        request = adapters_pb2.LoadAdapterRequest(name=name, path=path, preload=preload)
        return UnaryRpc(method=self._adapters.LoadAdapter, request=request, result=_loaded)

    def unload_adapter(self, name: str) -> UnaryRpc[None]:
        """Not repeatable: the second call would not find what the first has made unknown."""
        request = adapters_pb2.UnloadAdapterRequest(name=name)
        return UnaryRpc(method=self._adapters.UnloadAdapter, request=request, result=_nothing, repeatable=False)

    def evict_adapter(self, name: str) -> UnaryRpc[None]:
        request = adapters_pb2.EvictAdapterRequest(name=name)
        return UnaryRpc(method=self._adapters.EvictAdapter, request=request, result=_nothing)


def _nothing(_: Message) -> None:
    return None


def _adapter_infos(response: adapters_pb2.ListAdaptersResponse) -> tuple[AdapterInfo, ...]:
    return tuple(map(adapter_info, response.adapters))


def _loaded(response: adapters_pb2.LoadAdapterResponse) -> AdapterInfo:
    return adapter_info(response.adapter)

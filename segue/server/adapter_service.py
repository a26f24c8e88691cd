"""AdapterService: adapters at run time."""

from __future__ import annotations

from typing import Any

import grpc.aio

from segue.server.adapters import AdapterDirectory
from segue.server.convert import adapter_to_proto
from segue.v1 import adapters_pb2 as pb
from segue.v1 import adapters_pb2_grpc

_Context = grpc.aio.ServicerContext[Any, Any]


class AdapterService(adapters_pb2_grpc.AdapterServiceServicer):
    """Translates between the protocol and the directory of adapters."""

    def __init__(self, directory: AdapterDirectory) -> None:
        self._directory = directory

    async def ListAdapters(  # noqa: N802
        self, _request: pb.ListAdaptersRequest, _context: _Context
    ) -> pb.ListAdaptersResponse:
        return pb.ListAdaptersResponse(adapters=map(adapter_to_proto, await self._directory.list_adapters()))

    async def LoadAdapter(  # noqa: N802
        self, request: pb.LoadAdapterRequest, _context: _Context
    ) -> pb.LoadAdapterResponse:
        info = await self._directory.load(request.name, request.path, preload=request.preload)
        return pb.LoadAdapterResponse(adapter=adapter_to_proto(info))

    async def UnloadAdapter(  # noqa: N802
        self, request: pb.UnloadAdapterRequest, _context: _Context
    ) -> pb.UnloadAdapterResponse:
        await self._directory.unload(request.name)
        return pb.UnloadAdapterResponse()

    async def EvictAdapter(  # noqa: N802
        self, request: pb.EvictAdapterRequest, _context: _Context
    ) -> pb.EvictAdapterResponse:
        await self._directory.evict(request.name)
        return pb.EvictAdapterResponse()

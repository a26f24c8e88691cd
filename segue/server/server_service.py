"""ServerService: what the server is, and what it is doing."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio

from segue.engine.config import EngineConfig
from segue.engine.messages import DeviceTime, State
from segue.errors import EngineUnavailableError, InvalidRequestError
from segue.server.adapters import AdapterDirectory
from segue.server.convert import tier_to_proto
from segue.server.cost_profile import profile_to_proto
from segue.server.engine_client import EngineClient, EngineStatus
from segue.v1 import server_pb2 as pb
from segue.v1 import server_pb2_grpc
from segue.version import segue_version

_Context = grpc.aio.ServicerContext[Any, Any]
_DEFAULT_INTERVAL_SECONDS = 1.0
_MIN_INTERVAL_SECONDS = 0.01


class ServerService(server_pb2_grpc.ServerServiceServicer):
    """``stopping`` is set when the server begins to shut down: it ends every WatchState."""

    def __init__(
        self,
        *,
        model_name: str,
        config: EngineConfig,
        engine: EngineClient,
        directory: AdapterDirectory,
        stopping: asyncio.Event,
    ) -> None:
        self._model_name = model_name
        self._config = config
        self._engine = engine
        self._directory = directory
        self._stopping = stopping

    async def GetInfo(self, _request: pb.GetInfoRequest, _context: _Context) -> pb.GetInfoResponse:  # noqa: N802
        life = self._engine.life
        ready, state = life.ready, await life.state()
        return pb.GetInfoResponse(
            model=self._model_name,
            device=ready.device,
            dtype=ready.dtype,
            version=segue_version(),
            layers=ready.layers,
            vocab_size=ready.vocab_size,
            context_tokens=ready.context_tokens,
            page_tokens=ready.page_tokens,
            pages=ready.pages,
            cpu_workers=ready.cpu_workers,
            copy_bytes_per_second=self._config.copy_bytes_per_second,
            max_lora_rank=self._config.max_lora_rank,
            cpu_workers_ready=state.cpu_workers_ready,
        )

    async def WatchState(  # noqa: N802
        self, request: pb.WatchStateRequest, _context: _Context
    ) -> AsyncIterator[pb.WatchStateResponse]:
        interval_seconds = _DEFAULT_INTERVAL_SECONDS
        if request.HasField("interval"):
            interval_seconds = request.interval.ToNanoseconds() / 1e9
        if interval_seconds < _MIN_INTERVAL_SECONDS:
            raise InvalidRequestError.of("interval", f"must be at least {_MIN_INTERVAL_SECONDS:g} s")
        while not self._stopping.is_set():
            yield await self._state()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), interval_seconds)
        yield pb.WatchStateResponse(status=pb.ENGINE_STATUS_STOPPING)

    async def _state(self) -> pb.WatchStateResponse:
        try:
            life = self._engine.life
            return self._snapshot(await life.state(), life.ready.pages)
        except EngineUnavailableError:
            stopping = self._engine.status is EngineStatus.STOPPING
            status = pb.ENGINE_STATUS_STOPPING if stopping else pb.ENGINE_STATUS_STARTING
            return pb.WatchStateResponse(status=status)

    def _snapshot(self, state: State, pages: int) -> pb.WatchStateResponse:
        residency = pb.Residency(host_free_bytes=state.host_free_bytes)
        for manifest, tier, users in self._directory.resident(state):
            residency.adapters.add(name=manifest.name, version=manifest.version, tier=tier_to_proto(tier), users=users)
        return pb.WatchStateResponse(
            status=pb.ENGINE_STATUS_SERVING,
            queue=pb.Queue(waiting=state.waiting, prefilling=state.prefills, decoding=state.running),
            pages=pb.Pages(
                total=pages,
                free=state.free_pages,
                kv=state.kv_pages,
                adapter=state.adapter_pages,
                cached=state.cached_pages,
            ),
            residency=residency,
            cpu_workers=pb.CpuWorkers(ready=state.cpu_workers_ready, restarts=state.worker_restarts),
            steps=state.steps,
            profile=None if state.costs is None else profile_to_proto(state.costs),
            refusals=state.refusals,
            device_time=None if state.device_time is None else _device_time(state.device_time),
        )


def _device_time(spent: DeviceTime) -> pb.DeviceTime:
    return pb.DeviceTime(batches=spent.batches, busy_seconds=spent.busy_seconds, idle_seconds=spent.idle_seconds)

"""A gRPC server that does what a test scripts, a clock that only sleeping moves, and both clients behind one face."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol

import grpc

from segue import AsyncClient, Client, Reply, RetryPolicy, SegueError, ServerInfo
from segue.errors import EngineUnavailableError, OverloadedError
from segue.server.status import grpc_code, status_details
from segue.v1 import adapters_pb2, adapters_pb2_grpc, generation_pb2, generation_pb2_grpc, server_pb2, server_pb2_grpc

UNAVAILABLE = EngineUnavailableError("the engine died")
TEXTS = ("one ", "two")
WAIT_SECONDS = 20.0


def overloaded(retry_after_seconds: float | None) -> OverloadedError:
    return OverloadedError("the queue is full", retry_after_seconds=retry_after_seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """An attempt that fails with ``error``, after ``started`` and so many chunks, or as soon as it has come."""

    error: SegueError
    accepted: bool = False
    chunks: int = 0


@dataclass
class FakeClock:
    """Time that passes only while somebody sleeps."""

    now: float = 1000.0
    pauses: list[float] = field(default_factory=list)
    oversleep_seconds: float = 0.0
    meanwhile: Callable[[], object] = lambda: None

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds + self.oversleep_seconds
        self.meanwhile()

    async def async_sleep(self, seconds: float) -> None:
        self.sleep(seconds)


class FakeServer(
    generation_pb2_grpc.GenerationServiceServicer,
    server_pb2_grpc.ServerServiceServicer,
    adapters_pb2_grpc.AdapterServiceServicer,
):
    """Fails as ``failures`` say, one for each call, and then answers. Keeps what it was sent."""

    def __init__(self, *failures: Failure) -> None:
        self.failures = list(failures)
        self.request_ids: list[str] = []
        self.bounds_seconds: list[float | None] = []
        self.calls: list[str] = []
        self.answers_forever = False
        self.began = threading.Event()
        self.ended = threading.Event()
        self.target = ""

    def Generate(  # noqa: N802
        self, request: generation_pb2.GenerateRequest, context: Any
    ) -> Iterator[generation_pb2.GenerateResponse]:
        self.request_ids.append(request.request_id)
        self.bounds_seconds.append(context.time_remaining())
        context.add_callback(self.ended.set)
        failure = self.failures.pop(0) if self.failures else None
        if failure is None or failure.accepted or failure.chunks:
            yield generation_pb2.GenerateResponse(
                started=generation_pb2.Started(request_id=request.request_id, adapter_version="v1")
            )
        for text in TEXTS if failure is None else TEXTS[: failure.chunks]:
            yield generation_pb2.GenerateResponse(chunk=generation_pb2.Chunk(text=text, token_ids=[1]))
        if failure is not None:
            _abort(context, failure.error)
        self.began.set()
        if self.answers_forever:
            self.ended.wait(WAIT_SECONDS)
            return
        timing = generation_pb2.Timing(tier=generation_pb2.TIER_NONE)
        yield generation_pb2.GenerateResponse(
            finished=generation_pb2.Finished(finish_reason=generation_pb2.FINISH_REASON_STOP, timing=timing)
        )

    def WatchState(self, request: object, context: object) -> NoReturn:  # noqa: N802
        raise NotImplementedError("no client calls this")

    def Abort(self, request: generation_pb2.AbortRequest, context: Any) -> generation_pb2.AbortResponse:  # noqa: N802
        self._unary(f"abort {request.request_id}", context)
        return generation_pb2.AbortResponse()

    def GetInfo(self, request: object, context: Any) -> server_pb2.GetInfoResponse:  # noqa: ARG002, N802
        self._unary("info", context)
        return server_pb2.GetInfoResponse(model="fake")

    def ListAdapters(self, request: object, context: Any) -> adapters_pb2.ListAdaptersResponse:  # noqa: ARG002, N802
        self._unary("list", context)
        return adapters_pb2.ListAdaptersResponse(adapters=[_adapter("a"), _adapter("b")])

    def LoadAdapter(  # noqa: N802
        self, request: adapters_pb2.LoadAdapterRequest, context: Any
    ) -> adapters_pb2.LoadAdapterResponse:
        self._unary(f"load {request.name} {request.path} {request.preload}", context)
        return adapters_pb2.LoadAdapterResponse(adapter=_adapter(request.name))

    def UnloadAdapter(  # noqa: N802
        self, request: adapters_pb2.UnloadAdapterRequest, context: Any
    ) -> adapters_pb2.UnloadAdapterResponse:
        self._unary(f"unload {request.name}", context)
        return adapters_pb2.UnloadAdapterResponse()

    def EvictAdapter(  # noqa: N802
        self, request: adapters_pb2.EvictAdapterRequest, context: Any
    ) -> adapters_pb2.EvictAdapterResponse:
        self._unary(f"evict {request.name}", context)
        return adapters_pb2.EvictAdapterResponse()

    def _unary(self, call: str, context: Any) -> None:
        self.calls.append(call)
        self.bounds_seconds.append(context.time_remaining())
        if self.failures:
            _abort(context, self.failures.pop(0).error)


def _adapter(name: str) -> adapters_pb2.Adapter:
    return adapters_pb2.Adapter(name=name, tier=generation_pb2.TIER_DISK)


def _abort(context: Any, error: SegueError) -> None:
    details = status_details(error, "")
    context.set_trailing_metadata((("grpc-status-details-bin", details),))
    context.abort(grpc_code(error.code), error.message)


@contextmanager
def fake_server(*failures: Failure, port: int = 0) -> Iterator[FakeServer]:
    """A FakeServer that listens on a port of this machine, by default a free one."""
    servicer = FakeServer(*failures)
    server = grpc.server(futures.ThreadPoolExecutor(4))
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(servicer, server)
    server_pb2_grpc.add_ServerServiceServicer_to_server(servicer, server)
    adapters_pb2_grpc.add_AdapterServiceServicer_to_server(servicer, server)
    servicer.target = f"127.0.0.1:{server.add_insecure_port(f'127.0.0.1:{port}')}"
    server.start()
    try:
        yield servicer
    finally:
        server.stop(None).wait(WAIT_SECONDS)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How a client is made. The FakeClock times it, and ``drawn`` is the only random number it gets."""

    retry: RetryPolicy = field(default_factory=RetryPolicy)
    drawn: float = 0.0
    clock: FakeClock = field(default_factory=FakeClock)

    def arguments(self) -> dict[str, Any]:
        return {
            "retry": self.retry,
            "clock": self.clock,
            "random": lambda: self.drawn,
            "channel_options": (("grpc.use_local_subchannel_pool", 1),),
        }


class Driver(Protocol):
    """One of the two clients. Each method makes a connection of its own and waits for the end."""

    def ask(self, target: str, setting: Setting, **options: Any) -> Reply: ...

    def stream(self, target: str, setting: Setting, received: list[str], **options: Any) -> Reply:
        """The texts of the chunks go to ``received`` as they come."""

    def leave_after_first_chunk(self, target: str, setting: Setting) -> None: ...

    def info(self, target: str, setting: Setting, **options: Any) -> ServerInfo: ...

    def adapters(self, target: str, setting: Setting, method: str, *arguments: Any, **options: Any) -> Any: ...

    def abort(self, target: str, setting: Setting, request_id: str) -> None: ...


class SyncDriver:
    """segue.Client."""

    def _client(self, target: str, setting: Setting) -> Client:
        return Client(target, sleep=setting.clock.sleep, **setting.arguments())

    def ask(self, target: str, setting: Setting, **options: Any) -> Reply:
        with self._client(target, setting) as client:
            reply: Reply = client.generate("x", **options)
            return reply

    def stream(self, target: str, setting: Setting, received: list[str], **options: Any) -> Reply:
        with self._client(target, setting) as client, client.generate("x", stream=True, **options) as stream:
            received.extend(chunk.text for chunk in stream if chunk.token_ids)
            return stream.reply

    def leave_after_first_chunk(self, target: str, setting: Setting) -> None:
        with self._client(target, setting) as client:
            with client.generate("x", stream=True) as stream:
                next(stream)
            assert list(stream) == []

    def info(self, target: str, setting: Setting, **options: Any) -> ServerInfo:
        with self._client(target, setting) as client:
            return client.info(**options)

    def adapters(self, target: str, setting: Setting, method: str, *arguments: Any, **options: Any) -> Any:
        with self._client(target, setting) as client:
            return getattr(client.adapters, method)(*arguments, **options)

    def abort(self, target: str, setting: Setting, request_id: str) -> None:
        with self._client(target, setting) as client:
            client.abort(request_id)


class AsyncDriver:
    """segue.AsyncClient, on one event loop: gRPC's asyncio side dislikes many."""

    def __init__(self, runner: asyncio.Runner) -> None:
        self._runner = runner

    def _run(self, target: str, setting: Setting, use: Callable[[AsyncClient], Any]) -> Any:
        async def run() -> Any:
            async with AsyncClient(target, sleep=setting.clock.async_sleep, **setting.arguments()) as client:
                return await use(client)

        return self._runner.run(run())

    def ask(self, target: str, setting: Setting, **options: Any) -> Any:
        return self._run(target, setting, lambda client: client.generate("x", **options))

    def stream(self, target: str, setting: Setting, received: list[str], **options: Any) -> Any:
        async def use(client: AsyncClient) -> Reply:
            async with client.generate("x", stream=True, **options) as stream:
                async for text in (chunk.text async for chunk in stream if chunk.token_ids):
                    received.append(text)  # noqa: PERF401 - what came before a failure counts
            return stream.reply

        return self._run(target, setting, use)

    def leave_after_first_chunk(self, target: str, setting: Setting) -> None:
        async def use(client: AsyncClient) -> None:
            async with client.generate("x", stream=True) as stream:
                await anext(stream)
            assert [chunk async for chunk in stream] == []

        self._run(target, setting, use)

    def info(self, target: str, setting: Setting, **options: Any) -> Any:
        return self._run(target, setting, lambda client: client.info(**options))

    def adapters(self, target: str, setting: Setting, method: str, *arguments: Any, **options: Any) -> Any:
        return self._run(target, setting, lambda client: getattr(client.adapters, method)(*arguments, **options))

    def abort(self, target: str, setting: Setting, request_id: str) -> None:
        self._run(target, setting, lambda client: client.abort(request_id))

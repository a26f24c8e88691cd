"""An answer as it is made, for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import grpc

from segue.client.answer import AnswerStream, GenerateJob
from segue.types import Chunk
from segue.v1 import generation_pb2

AsyncCall = grpc.aio.UnaryStreamCall[generation_pb2.GenerateRequest, generation_pb2.GenerateResponse]


class AsyncGenerateStream(AnswerStream[AsyncCall]):
    """Iterates over an answer's chunks with ``async for``.

    Leaving its ``async with`` block before the end cancels the request, and so does cancelling the task that waits for
    a chunk. A failed request raises its SegueError from the iteration; one that ``cancel`` has stopped just ends it.
    """

    def __init__(
        self, job: GenerateJob, open_call: Callable[..., AsyncCall], sleep: Callable[[float], Awaitable[object]]
    ) -> None:
        self._sleep = sleep
        super().__init__(job, open_call)

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        while not self._ended:
            try:
                response = await _read(self._call)
            except grpc.RpcError as error:
                await self._pause(self._failed(error))
                continue
            if response is None:
                self._ended = True
            elif (chunk := self._received(response)) is not None:
                return chunk
        raise StopAsyncIteration

    async def _pause(self, seconds: float | None) -> None:
        if seconds is not None:
            await self._sleep(seconds)
            self._begin()

    async def __aenter__(self) -> AsyncGenerateStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()


async def _read(call: AsyncCall) -> generation_pb2.GenerateResponse | None:
    """The next response, None at the end. Raises grpc.RpcError when the call fails."""
    try:
        response = await call.read()
    except asyncio.CancelledError:
        # gRPC raises this also when the call was cancelled, not the task: by cancel() or by closing the channel.
        if _task_is_being_cancelled():
            raise
        nothing = grpc.aio.Metadata()
        error = grpc.aio.AioRpcError(
            await call.code(), nothing, await call.trailing_metadata(), await call.details(), None
        )
        raise error from None
    return response if isinstance(response, generation_pb2.GenerateResponse) else None


def _task_is_being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0

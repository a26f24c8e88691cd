"""The interceptor when the client leaves between two messages of a stream."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from typing import Any

import grpc.aio
import pytest

from segue.server.interceptor import ErrorInterceptor
from segue.v1 import generation_pb2 as pb


class FakeContext:
    """A call that the client ends after the first message: gRPC's core refuses the next one."""

    def __init__(self) -> None:
        self.written: list[Any] = []
        self.aborted = False

    async def write(self, message: Any) -> None:
        if self.written:
            raise grpc.aio.InternalError('Failed "execute_batch"')
        self.written.append(message)

    async def abort(self, *_: Any) -> None:
        self.aborted = True


def test_a_client_that_leaves_between_two_messages_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    closed = []

    async def behaviour(_request: Any, _context: Any) -> AsyncGenerator[int, None]:
        try:
            for number in range(3):
                yield number
        finally:
            closed.append(True)

    async def continuation(_details: Any) -> Any:
        return grpc.unary_stream_rpc_method_handler(behaviour)

    class FakeDetails:
        method = "/segue.v1.GenerationService/Generate"

    context = FakeContext()

    async def call() -> None:
        handler: Any = await ErrorInterceptor().intercept_service(continuation, FakeDetails())  # type: ignore[arg-type]
        await handler.unary_stream(pb.GenerateRequest(request_id="a"), context)

    with caplog.at_level(logging.WARNING):
        asyncio.run(call())
    assert context.written == [0]
    assert closed == [True]
    assert not context.aborted
    assert caplog.records == []

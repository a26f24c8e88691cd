"""Every exception of every service, as a gRPC status. What is not foreseen is logged, and its text stays here."""

from __future__ import annotations

import contextlib
import functools
import logging
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, NoReturn

import grpc
import grpc.aio

from segue.errors import InternalError, SegueError
from segue.server.status import DETAILS_KEY, grpc_code, status_details, status_message

_LOG = logging.getLogger(__name__)
_OWN_SERVICES = "/segue."

_Context = grpc.aio.ServicerContext[Any, Any]
_Behaviour = Callable[..., Any]


class ErrorInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Wraps the handlers of Segue's services: unary ones are coroutines, streaming ones are async generators."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        handler = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith(_OWN_SERVICES):
            return handler
        if handler.unary_stream is not None:
            return grpc.unary_stream_rpc_method_handler(
                functools.partial(_serve_stream, handler.unary_stream),
                request_deserializer=handler.request_deserializer,
                response_serializer=handler.response_serializer,
            )
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(
                functools.partial(_serve_unary, handler.unary_unary),
                request_deserializer=handler.request_deserializer,
                response_serializer=handler.response_serializer,
            )
        raise TypeError(f"{handler_call_details.method} streams requests, which no service does")


async def _serve_unary(behaviour: _Behaviour, request: Any, context: _Context) -> Any:
    try:
        return await behaviour(request, context)
    except SegueError as error:
        await _abort(error, request, context)
    except Exception:  # noqa: BLE001
        await _abort_unforeseen(request, context)


async def _serve_stream(behaviour: _Behaviour, request: Any, context: _Context) -> None:
    generator: AsyncGenerator[Any, None] = behaviour(request, context)
    try:
        # Closed here, at once, also when it is a write to a client that has gone which is cancelled.
        async with contextlib.aclosing(generator) as messages:
            async for message in messages:
                await _write(message, context)
    except _ClientGoneError:
        _LOG.debug("the client left during request %s", getattr(request, "request_id", ""))
    except SegueError as error:
        await _abort(error, request, context)
    except Exception:  # noqa: BLE001
        await _abort_unforeseen(request, context)


class _ClientGoneError(Exception):
    """The call has ended on the client's side; nobody reads an answer or a status any more."""


async def _write(message: Any, context: _Context) -> None:
    try:
        await context.write(message)
    except grpc.aio.InternalError as error:
        # gRPC's core refuses to send on a call that has ended before the handler was cancelled for it.
        raise _ClientGoneError from error


async def _abort_unforeseen(request: Any, context: _Context) -> NoReturn:
    request_id = getattr(request, "request_id", "") or uuid.uuid4().hex
    _LOG.exception("unforeseen error in request %s", request_id)
    await _abort(InternalError("internal error", request_id=request_id), request, context)


async def _abort(error: SegueError, request: Any, context: _Context) -> NoReturn:
    request_id = error.request_id or getattr(request, "request_id", "")
    await context.abort(
        grpc_code(error.code), status_message(error), ((DETAILS_KEY, status_details(error, request_id)),)
    )

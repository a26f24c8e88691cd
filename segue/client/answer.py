"""An answer as it is made, whatever carries the messages."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

import grpc

from segue.client.requests import GenerateOptions, Prompt, ReplyBuilder, build_generate_request
from segue.client.retry import Attempts
from segue.client.status import error_of_rpc
from segue.errors import RequestCancelledError, SegueError
from segue.types import Chunk, Reply
from segue.v1 import generation_pb2


class Call(Protocol):
    """A running RPC."""

    def cancel(self) -> object: ...


_Call = TypeVar("_Call", bound=Call)


class GenerateJob:
    """What to ask for, and how often: nothing is sent yet."""

    def __init__(self, prompt: Prompt, options: GenerateOptions, attempts: Attempts) -> None:
        self.attempts = attempts
        self._prompt = prompt
        self._options = options
        self._first: generation_pb2.GenerateRequest | None = None

    def next_request(self) -> generation_pb2.GenerateRequest:
        """The request of one attempt. Raises as build_generate_request.

        Each has an id of its own, for the server may still be stopping the attempt before. An id of the caller's is
        kept: the caller knows the request by it and may abort it by it, and while an attempt before still runs it is
        what keeps the server from making the same answer twice.
        """
        if self._first is None:
            self._first = build_generate_request(self._prompt, self._options)
            return self._first
        request = generation_pb2.GenerateRequest()
        request.CopyFrom(self._first)
        if not self._options.get("request_id"):
            request.request_id = uuid.uuid4().hex
        return request


class AnswerStream(Generic[_Call]):
    """What both kinds of stream share: all but waiting for a response or for the next attempt."""

    def __init__(self, job: GenerateJob, open_call: Callable[..., _Call]) -> None:
        """``open_call`` takes a request and a ``timeout`` in seconds."""
        self._job = job
        self._open_call = open_call
        self._delivered = False
        self._cancelled = False
        self._disconnected = False
        self._ended = False
        self._error: SegueError | None = None
        self._begin()

    @property
    def request_id(self) -> str:
        """The id of the current attempt."""
        return self._builder.request_id

    @property
    def adapter_version(self) -> str:
        """The adapter's version that serves the request, from the first chunk on; empty for the base model."""
        return self._builder.adapter_version

    @property
    def reply(self) -> Reply:
        """The whole answer, once the iteration has ended. Raises the request's SegueError if it failed."""
        if self._error is not None:
            raise self._error
        if not self._ended:
            raise RuntimeError("the answer is not complete: iterate to its end first")
        return self._builder.reply()

    def cancel(self) -> None:
        """Stop the request. Does nothing after its end."""
        if not self._ended:
            self._cancelled = True
            self._call.cancel()

    def disconnect(self) -> None:
        """The connection is being closed: the iteration raises RequestCancelledError, unless it has ended."""
        self._disconnected = True
        self._call.cancel()

    def _begin(self) -> None:
        """Send the request, for the first time or again. Raises the error of the attempt before if time is out."""
        if self._cancelled or self._disconnected:
            self._ended, self._error = True, RequestCancelledError("cancelled before the next attempt")
            if self._disconnected:
                raise self._error
            return
        try:
            seconds = self._job.attempts.begin()
        except SegueError as error:
            self._ended, self._error = True, error
            raise
        request = self._job.next_request()
        self._builder = ReplyBuilder(request.request_id)
        self._call = self._open_call(request, timeout=seconds)
        # A cancel() on another thread may have met the call before this one.
        if self._cancelled:
            self._call.cancel()

    def _received(self, response: generation_pb2.GenerateResponse) -> Chunk | None:
        chunk = self._builder.add(response)
        self._delivered = self._delivered or chunk is not None
        return chunk

    def _failed(self, rpc_error: grpc.RpcError) -> float | None:
        """The pause in seconds before the next attempt, None if the caller has cancelled. Else raises the error.

        Once a chunk has been delivered there is no further attempt: it might not begin with the same one.
        """
        error = error_of_rpc(rpc_error)
        if self._cancelled and isinstance(error, RequestCancelledError):
            self._ended, self._error = True, error
            return None
        try:
            return self._job.attempts.pause_seconds(error, repeatable=not (self._delivered or self._cancelled))
        except SegueError:
            self._ended, self._error = True, error
            raise

"""An answer as it is made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import TracebackType

import grpc

from segue.client.requests import ReplyBuilder
from segue.client.status import error_of_rpc
from segue.errors import RequestCancelledError, SegueError
from segue.types import Chunk, Reply
from segue.v1 import generation_pb2


class GenerateStream:
    """Iterates over an answer's chunks. Leaving its ``with`` block before the end cancels the request.

    A failed request raises its SegueError from the iteration; a cancelled one just ends it.
    """

    def __init__(
        self,
        responses: Iterator[generation_pb2.GenerateResponse],
        cancel: Callable[[], object],
        builder: ReplyBuilder,
    ) -> None:
        """``responses`` raises grpc.RpcError when the call fails; ``cancel`` cancels the call."""
        self._responses = responses
        self._cancel_call = cancel
        self._builder = builder
        self._cancelled = False
        self._error: SegueError | None = None
        self._ended = False

    @property
    def request_id(self) -> str:
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
            self._cancel_call()

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        while not self._ended:
            try:
                chunk = self._builder.add(next(self._responses))
            except StopIteration:
                self._ended = True
            except grpc.RpcError as error:
                self._ended = True
                self._error = error_of_rpc(error)
                if not (self._cancelled and isinstance(self._error, RequestCancelledError)):
                    raise self._error from None
            else:
                if chunk is not None:
                    return chunk
        raise StopIteration

    def __enter__(self) -> GenerateStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

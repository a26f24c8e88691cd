"""An answer as it is made, for synchronous code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Protocol

import grpc

from segue.client.answer import AnswerStream, GenerateJob
from segue.types import Chunk
from segue.v1 import generation_pb2


class ResponseIterator(Protocol):
    """A running RPC; ``__next__`` raises grpc.RpcError when it fails."""

    def __next__(self) -> generation_pb2.GenerateResponse: ...

    def cancel(self) -> object: ...


class GenerateStream(AnswerStream[ResponseIterator]):
    """Iterates over an answer's chunks. Leaving its ``with`` block before the end cancels the request.

    A failed request raises its SegueError from the iteration; a cancelled one just ends it.
    """

    def __init__(
        self, job: GenerateJob, open_call: Callable[..., ResponseIterator], sleep: Callable[[float], object]
    ) -> None:
        self._sleep = sleep
        super().__init__(job, open_call)

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        while not self._ended:
            try:
                chunk = self._received(next(self._call))
            except StopIteration:
                self._ended = True
            except grpc.RpcError as error:
                pause = self._failed(error)
                if pause is not None:
                    self._sleep(pause)
                    self._begin()
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

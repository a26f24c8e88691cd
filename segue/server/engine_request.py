"""What arrives from an engine for the answers of one request, until its reader takes it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from segue.engine.messages import Finished, NewTokens
from segue.errors import SegueError
from segue.types import TokenLogprob


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What arrived of one answer since the last look; ``finished`` once nothing more will come."""

    token_ids: list[int]
    logprobs: list[TokenLogprob]
    finished: Finished | None


class EngineRequest:
    """One answer in an engine. Tokens that nobody has taken yet are put together."""

    def __init__(self, arrived: asyncio.Event, tell_cancel: Callable[[], None], forget: Callable[[], None]) -> None:
        """``arrived`` is set when there is something to take. ``tell_cancel`` sends Cancel if the request is live,
        after ``forget`` nothing more arrives.
        """
        self._arrived = arrived
        self._tell_cancel = tell_cancel
        self._forget = forget
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._finished: Finished | None = None
        self._error: SegueError | None = None

    @property
    def error(self) -> SegueError | None:
        """What the request ended in, apart from the tokens that came before."""
        return self._error

    def take(self) -> Progress | None:
        """What has arrived since the last time, None if nothing has."""
        if not self._token_ids and self._finished is None:
            return None
        progress = Progress(token_ids=self._token_ids, logprobs=self._logprobs, finished=self._finished)
        self._token_ids, self._logprobs, self._finished = [], [], None
        return progress

    def end_early(self) -> None:
        """Stop the request if it is live; its Finished still arrives."""
        self._tell_cancel()

    def cancel(self) -> None:
        """Stop the request if it is live; nothing more arrives."""
        self._tell_cancel()
        self._forget()

    def add_tokens(self, tokens: NewTokens) -> None:
        self._token_ids += tokens.token_ids
        self._logprobs += tokens.logprobs
        self._arrived.set()

    def finish(self, finished: Finished) -> None:
        self._finished = finished
        self._arrived.set()

    def fail(self, error: SegueError) -> None:
        """The reader gets ``error`` after the tokens that came before it."""
        self._error = error
        self._arrived.set()


class EngineRequests:
    """The answers of one request, in order. Has one reader."""

    def __init__(self, requests: Sequence[EngineRequest], arrived: asyncio.Event) -> None:
        """``arrived`` is the event of all ``requests``."""
        self._requests = tuple(requests)
        self._arrived = arrived

    def __iter__(self) -> Iterator[EngineRequest]:
        return iter(self._requests)

    async def read(self) -> list[tuple[int, Progress]]:
        """Wait until there is something new; what each answer has got, by its index.

        Raises the first SegueError that one of them ended in, after all that came before it.
        """
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            found = [(index, request.take()) for index, request in enumerate(self._requests)]
            progress = [(index, item) for index, item in found if item is not None]
            error = next((request.error for request in self._requests if request.error is not None), None)
            if progress:
                if error is not None:
                    self._arrived.set()
                return progress
            if error is not None:
                raise error

    def cancel(self) -> None:
        """Stop those that are live; nothing more arrives."""
        for request in self._requests:
            request.cancel()

    def abort(self, error: SegueError) -> None:
        """Stop those that are live, and let the reader meet ``error``."""
        self.cancel()
        for request in self._requests:
            request.fail(error)

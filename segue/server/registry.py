"""The live requests of each caller, so that a request_id names one request and only its caller can abort it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from segue.errors import DuplicateRequestError, RequestCancelledError, RequestNotFoundError
from segue.server.engine_request import EngineRequests


class LiveRequest:
    """A request between its arrival and its end. It can be aborted before it has reached the engine."""

    def __init__(self) -> None:
        self._aborted = False
        self._engine_requests: EngineRequests | None = None

    def attach(self, engine_requests: EngineRequests) -> None:
        """The request's answers are in the engine now. Raises RequestCancelledError if it was aborted before."""
        self._engine_requests = engine_requests
        if self._aborted:
            engine_requests.cancel()
            raise _aborted()

    def abort(self) -> None:
        """Stop all answers of the request; its reader meets RequestCancelledError."""
        self._aborted = True
        if self._engine_requests is not None:
            self._engine_requests.abort(_aborted())


class RequestRegistry:
    """Live requests by caller and request_id. Used on one event loop only."""

    def __init__(self) -> None:
        self._live: dict[tuple[str, str], LiveRequest] = {}

    def __len__(self) -> int:
        return len(self._live)

    @contextlib.contextmanager
    def enter(self, caller: str, request_id: str) -> Iterator[LiveRequest]:
        """Hold the id for as long as the block runs. Raises DuplicateRequestError if the caller holds it already."""
        key = (caller, request_id)
        if key in self._live:
            raise DuplicateRequestError(f"request_id {request_id!r} is in use by a live request of the same caller")
        self._live[key] = live = LiveRequest()
        try:
            yield live
        finally:
            del self._live[key]

    def abort(self, caller: str, request_id: str) -> None:
        """Abort the caller's request. Raises RequestNotFoundError if it has none with this id."""
        live = self._live.get((caller, request_id))
        if live is None:
            raise RequestNotFoundError(f"no live request of this caller has the request_id {request_id!r}")
        live.abort()


def _aborted() -> RequestCancelledError:
    return RequestCancelledError("the request was aborted")

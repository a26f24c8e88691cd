"""Every error that Segue reports, as one exception each. The server raises them, the interceptor turns them into a
gRPC status with google.rpc details, and the SDK turns that status back into the same class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar


class StatusCode(Enum):
    """The gRPC status codes that Segue uses, by their canonical numbers."""

    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldViolation:
    """One field of a request and what is wrong with it."""

    field: str
    description: str


class SegueError(Exception):
    """Base of all errors. ``reason`` is the stable name that travels in google.rpc.ErrorInfo.

    ``request_id`` is the request that failed, where there is one.
    """

    code: ClassVar[StatusCode] = StatusCode.UNKNOWN
    reason: ClassVar[str] = "UNKNOWN"

    def __init__(
        self,
        message: str,
        *,
        violations: Sequence[FieldViolation] = (),
        retry_after_seconds: float | None = None,
        request_id: str = "",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.violations = tuple(violations)
        self.retry_after_seconds = retry_after_seconds
        self.request_id = request_id


class InvalidRequestError(SegueError):
    """A request field is missing, out of range or malformed; ``violations`` names each."""

    code = StatusCode.INVALID_ARGUMENT
    reason = "INVALID_REQUEST"

    @classmethod
    def of(cls, field: str, description: str) -> InvalidRequestError:
        """The error for a single field."""
        violation = FieldViolation(field=field, description=description)
        return cls(f"{field}: {description}", violations=(violation,))


class UnsafePathError(InvalidRequestError):
    """An adapter's name or path leaves the adapters folder or is not an ordinary file or folder."""

    reason = "UNSAFE_PATH"


class AdapterNotFoundError(SegueError):
    """No adapter has this name, or this version of it is no longer known."""

    code = StatusCode.NOT_FOUND
    reason = "ADAPTER_NOT_FOUND"


class RequestNotFoundError(SegueError):
    """The caller has no live request with this request_id."""

    code = StatusCode.NOT_FOUND
    reason = "REQUEST_NOT_FOUND"


class AdapterRejectedError(SegueError):
    """The adapter's folder exists but cannot be served: corrupt, of another base model, too large, unsupported."""

    code = StatusCode.FAILED_PRECONDITION
    reason = "ADAPTER_REJECTED"


class AdapterPinnedError(SegueError):
    """The server's configuration keeps the adapter on the device, so it cannot be evicted."""

    code = StatusCode.FAILED_PRECONDITION
    reason = "ADAPTER_PINNED"


class SloInfeasibleError(SegueError):
    """The targets with ``on_miss = reject`` could not be met even by an idle server."""

    code = StatusCode.FAILED_PRECONDITION
    reason = "SLO_INFEASIBLE"


class OverloadedError(SegueError):
    """The queue is full or a quota is used up; ``retry_after_seconds`` says when to come again."""

    code = StatusCode.RESOURCE_EXHAUSTED
    reason = "OVERLOADED"


class DeadlineExceededError(SegueError):
    """The caller's deadline passed before the answer was complete."""

    code = StatusCode.DEADLINE_EXCEEDED
    reason = "DEADLINE_EXCEEDED"


class RequestCancelledError(SegueError):
    """The request was cancelled by its caller or by Abort."""

    code = StatusCode.CANCELLED
    reason = "CANCELLED"


class DuplicateRequestError(SegueError):
    """The caller already has a live request with this request_id."""

    code = StatusCode.ALREADY_EXISTS
    reason = "DUPLICATE_REQUEST"


class UnsupportedError(SegueError):
    """A named feature of the interface that this server does not serve."""

    code = StatusCode.UNIMPLEMENTED
    reason = "UNSUPPORTED"


class EngineUnavailableError(SegueError):
    """The server cannot be reached, its engine died or is still starting, or its disk does not answer."""

    code = StatusCode.UNAVAILABLE
    reason = "ENGINE_UNAVAILABLE"


class InternalError(SegueError):
    """Something unforeseen. The cause is in the server's log under ``request_id``, never in the message."""

    code = StatusCode.INTERNAL
    reason = "INTERNAL"


_ERRORS: tuple[type[SegueError], ...] = (
    InvalidRequestError,
    UnsafePathError,
    AdapterNotFoundError,
    RequestNotFoundError,
    AdapterRejectedError,
    AdapterPinnedError,
    SloInfeasibleError,
    OverloadedError,
    DeadlineExceededError,
    RequestCancelledError,
    DuplicateRequestError,
    UnsupportedError,
    EngineUnavailableError,
    InternalError,
)


def error_class(reason: str, code: StatusCode) -> type[SegueError]:
    """The class whose ``reason`` this is, else the first with this status code, else SegueError."""
    by_reason = next((cls for cls in _ERRORS if cls.reason == reason), None)
    by_code = next((cls for cls in _ERRORS if cls.code is code), None)
    return by_reason or by_code or SegueError

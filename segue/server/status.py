"""SegueError to a gRPC status with google.rpc details."""

from __future__ import annotations

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

from segue.errors import SegueError, StatusCode

DETAILS_KEY = "grpc-status-details-bin"
ERROR_DOMAIN = "segue"

# All of a status travels in the trailing metadata, of which a peer accepts 8 KiB.
_MAX_MESSAGE_BYTES = 1000
_MAX_VIOLATIONS = 16
_MAX_VIOLATION_BYTES = 120

_GRPC_CODES = {code.value[0]: code for code in grpc.StatusCode}


def grpc_code(code: StatusCode) -> grpc.StatusCode:
    """The same code as the gRPC library names it."""
    return _GRPC_CODES[code.value]


def status_message(error: SegueError) -> str:
    """The error's message, shortened to what a status can carry."""
    return _shortened(error.message, _MAX_MESSAGE_BYTES)


def status_details(error: SegueError, request_id: str) -> bytes:
    """A serialised google.rpc.Status: ErrorInfo, RequestInfo, and where they apply BadRequest and RetryInfo."""
    status = status_pb2.Status(code=error.code.value, message=status_message(error))
    _pack(status, error_details_pb2.ErrorInfo(reason=error.reason, domain=ERROR_DOMAIN))
    _pack(status, error_details_pb2.RequestInfo(request_id=_shortened(request_id, _MAX_VIOLATION_BYTES)))
    if error.violations:
        bad_request = error_details_pb2.BadRequest()
        for violation in error.violations[:_MAX_VIOLATIONS]:
            bad_request.field_violations.add(
                field=violation.field, description=_shortened(violation.description, _MAX_VIOLATION_BYTES)
            )
        _pack(status, bad_request)
    if error.retry_after_seconds is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(round(error.retry_after_seconds * 1e9))
        _pack(status, error_details_pb2.RetryInfo(retry_delay=delay))
    return bytes(status.SerializeToString())


def _pack(
    status: status_pb2.Status,
    detail: error_details_pb2.ErrorInfo
    | error_details_pb2.RequestInfo
    | error_details_pb2.BadRequest
    | error_details_pb2.RetryInfo,
) -> None:
    packed = any_pb2.Any()
    packed.Pack(detail)
    status.details.append(packed)


def _shortened(text: str, max_bytes: int) -> str:
    data = text.encode("utf-8", "replace")
    if len(data) <= max_bytes:
        return text
    return data[: max_bytes - 3].decode("utf-8", "ignore") + "..."

from __future__ import annotations

import subprocess
import sys

import grpc
import pytest

import segue
from segue import FieldViolation, SegueError
from segue.client.status import error_of_status
from segue.errors import StatusCode
from segue.server.status import grpc_code, status_details, status_message

ERRORS = [
    getattr(segue, name)
    for name in segue.__all__
    if isinstance(getattr(segue, name), type) and issubclass(getattr(segue, name), SegueError)
]


@pytest.mark.parametrize("cls", ERRORS, ids=lambda cls: cls.__name__)
def test_every_error_comes_back_as_itself(cls: type[SegueError]) -> None:
    violations = (FieldViolation(field="a.b", description="must be é"), FieldViolation(field="c", description="no"))
    sent = cls("what é is wrong", violations=violations, retry_after_seconds=1.25)
    code = grpc.StatusCode.UNKNOWN if cls is SegueError else grpc_code(cls.code)
    received = error_of_status(code, status_message(sent), status_details(sent, "abc"))
    assert type(received) is cls
    assert received.message == sent.message
    assert received.violations == violations
    assert received.retry_after_seconds == 1.25
    assert received.request_id == "abc"


@pytest.mark.parametrize(
    ("code", "name"),
    [
        (grpc.StatusCode.UNAVAILABLE, "EngineUnavailableError"),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "DeadlineExceededError"),
        (grpc.StatusCode.CANCELLED, "RequestCancelledError"),
        (grpc.StatusCode.UNIMPLEMENTED, "UnsupportedError"),
        (grpc.StatusCode.PERMISSION_DENIED, "SegueError"),
        (grpc.StatusCode.UNKNOWN, "SegueError"),
    ],
)
@pytest.mark.parametrize("details", [b"", b"\xff\xff broken", b"\x1a\x03\x0a\x01x"])
def test_without_readable_details_the_status_code_decides(code: grpc.StatusCode, name: str, details: bytes) -> None:
    error = error_of_status(code, "", details)
    assert type(error).__name__ == name
    assert error.message == code.name
    assert error.violations == ()
    assert error.retry_after_seconds is None


def test_every_status_code_is_one_of_grpc() -> None:
    assert {code.name for code in StatusCode} <= {code.name for code in grpc.StatusCode}
    assert all(grpc_code(code).name == code.name for code in StatusCode)


@pytest.mark.parametrize("order", ["segue first", "googleapis first", "without googleapis"])
def test_no_clash_with_googleapis(order: str) -> None:
    """Both describe google.rpc; whichever comes first, and also alone, the SDK reads the details."""
    details = status_details(segue.InvalidRequestError.of("text", "must not be empty"), "abc")
    read = (
        "import grpc; from segue.client.status import error_of_status\n"
        f"error = error_of_status(grpc.StatusCode.INVALID_ARGUMENT, 'x', {details!r})\n"
        "assert error.violations[0].field == 'text', error.violations\n"
    )
    googleapis = (
        "from google.rpc import error_details_pb2, status_pb2\n"
        f"assert len(status_pb2.Status.FromString({details!r}).details) == 3\n"
    )
    block = "import sys; sys.modules['google.rpc'] = None\n"
    code = {
        "segue first": read + googleapis,
        "googleapis first": googleapis + read,
        "without googleapis": block + read,
    }[order]
    assert subprocess.run([sys.executable, "-W", "error", "-c", code], check=False).returncode == 0

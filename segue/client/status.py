"""A failed RPC as the exception that the server raised.

google.rpc's messages are described here once more, by their field numbers alone, in a pool of their own: the SDK does
not depend on googleapis-common-protos, and does not clash with it where it is installed.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError, Message

from segue.errors import FieldViolation, SegueError, StatusCode, error_class

_DETAILS_KEY = "grpc-status-details-bin"
_PACKAGE = "segue.client.wire"
_Field = descriptor_pb2.FieldDescriptorProto

# message -> field -> (number, type or the name of a message, repeated)
_MESSAGES: Mapping[str, Mapping[str, tuple[int, int | str, bool]]] = {
    "Any": {"type_url": (1, _Field.TYPE_STRING, False), "value": (2, _Field.TYPE_BYTES, False)},
    "Status": {"details": (3, "Any", True)},
    "ErrorInfo": {"reason": (1, _Field.TYPE_STRING, False)},
    "RequestInfo": {"request_id": (1, _Field.TYPE_STRING, False)},
    "FieldViolation": {"field": (1, _Field.TYPE_STRING, False), "description": (2, _Field.TYPE_STRING, False)},
    "BadRequest": {"field_violations": (1, "FieldViolation", True)},
    "Duration": {"seconds": (1, _Field.TYPE_INT64, False), "nanos": (2, _Field.TYPE_INT32, False)},
    "RetryInfo": {"retry_delay": (1, "Duration", False)},
}
_DETAILS = ("ErrorInfo", "RequestInfo", "BadRequest", "RetryInfo")


def error_of_rpc(error: grpc.RpcError) -> SegueError:
    """The SegueError of a failed RPC, by the reason in its details, else by its status code."""
    if not isinstance(error, grpc.Call | grpc.aio.AioRpcError):
        return SegueError(str(error))
    return error_of_status(error.code(), error.details() or "", _details(error.trailing_metadata()))


def error_of_status(code: grpc.StatusCode, message: str, details: bytes) -> SegueError:
    """The SegueError of a status; ``details`` is a serialised google.rpc.Status, or empty."""
    found = _decode_details(details)
    number = code.value[0]
    known = next((item for item in StatusCode if item.value == number), StatusCode.UNKNOWN)
    violations = [
        FieldViolation(field=item.field, description=item.description)
        for item in getattr(found.get("BadRequest"), "field_violations", ())
    ]
    retry = found.get("RetryInfo")
    delay = None if retry is None else retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9
    return error_class(getattr(found.get("ErrorInfo"), "reason", ""), known)(
        message or code.name,
        violations=violations,
        retry_after_seconds=delay,
        request_id=getattr(found.get("RequestInfo"), "request_id", ""),
    )


def _details(metadata: Any) -> bytes:
    return next((bytes(value) for key, value in metadata or () if key == _DETAILS_KEY), b"")


def _decode_details(data: bytes) -> dict[str, Any]:
    """The details that are known, by message name. What cannot be decoded is left out: the status code remains."""
    found: dict[str, Any] = {}
    try:
        for packed in _parse("Status", data).details:
            name = packed.type_url.rpartition("/google.rpc.")[2]
            if name in _DETAILS:
                found[name] = _parse(name, packed.value)
    except DecodeError:
        return found
    return found


def _parse(name: str, data: bytes) -> Any:
    message = _classes()[name]()
    message.ParseFromString(data)
    return message


@functools.cache
def _classes() -> dict[str, type[Message]]:
    file = descriptor_pb2.FileDescriptorProto(name="segue/client/wire.proto", package=_PACKAGE, syntax="proto3")
    for message_name, fields in _MESSAGES.items():
        message = file.message_type.add(name=message_name)
        for name, (number, kind, repeated) in fields.items():
            field = message.field.add(name=name, number=number)
            field.label = _Field.LABEL_REPEATED if repeated else _Field.LABEL_OPTIONAL
            if isinstance(kind, str):
                field.type, field.type_name = _Field.TYPE_MESSAGE, f".{_PACKAGE}.{kind}"
            else:
                field.type = _Field.Type.ValueType(kind)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{name}")) for name in _MESSAGES
    }

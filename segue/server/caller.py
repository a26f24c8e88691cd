"""Who calls, on whose account, and until when: what a call says beside its message."""

from __future__ import annotations

import ipaddress
import math
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

import grpc.aio

from segue.errors import InvalidRequestError

TENANT_HEADER = "x-tenant"
MAX_TENANT_CHARACTERS = 128

_Context = grpc.aio.ServicerContext[Any, Any]


def caller(context: _Context) -> str:
    """Who calls: the authenticated identity, or without any the connection."""
    return _identity(context) or str(context.peer())


def tenant(context: _Context, headers: Mapping[str, str]) -> str:
    """On whose account a request is served: the authenticated identity.

    Where calls carry no credentials, one from this machine may name its tenant in ``x-tenant``; all others are one
    tenant, the empty one. Raises InvalidRequestError for a name that is not taken.
    """
    identity = _identity(context)
    named = headers.get(TENANT_HEADER)
    if identity or named is None:
        return identity
    if not is_loopback(str(context.peer())):
        raise InvalidRequestError.of(TENANT_HEADER, "is taken from callers on the server's own machine alone")
    if not (0 < len(named) <= MAX_TENANT_CHARACTERS and named.isascii() and named.isprintable()):
        raise InvalidRequestError.of(TENANT_HEADER, f"must be 1 to {MAX_TENANT_CHARACTERS} printable ASCII characters")
    return named


def headers_of(context: _Context) -> Mapping[str, str]:
    """The call's metadata that is text; of a key that is given twice the first."""
    headers: dict[str, str] = {}
    for key, value in context.invocation_metadata() or ():
        if isinstance(value, str):
            headers.setdefault(key, value)
    return headers


def deadline_seconds(context: _Context) -> float | None:
    """When the caller stops waiting, in monotonic seconds; None if it never does."""
    remaining = context.time_remaining()
    return None if remaining is None or not math.isfinite(remaining) else time.monotonic() + remaining


def is_loopback(peer: str) -> bool:
    """Whether a peer, as gRPC names it ("ipv4:127.0.0.1:4711", "ipv6:%5B::1%5D:4711", "unix:"), is on this machine."""
    kind, _, address = unquote(peer).partition(":")
    if kind == "unix":
        return True
    host = address.rpartition(":")[0].strip("[]")
    try:
        found = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(found, "ipv4_mapped", None)
    return (mapped or found).is_loopback


def _identity(context: _Context) -> str:
    identities = context.peer_identities()
    return repr(sorted(identities)) if identities else ""

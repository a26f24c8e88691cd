"""The Python SDK: needs only grpcio and protobuf."""

from __future__ import annotations

from segue.client.async_client import AsyncAdapters, AsyncClient
from segue.client.async_stream import AsyncGenerateStream
from segue.client.client import Adapters, Client
from segue.client.retry import RetryPolicy
from segue.client.stream import GenerateStream

__all__ = [
    "Adapters",
    "AsyncAdapters",
    "AsyncClient",
    "AsyncGenerateStream",
    "Client",
    "GenerateStream",
    "RetryPolicy",
]

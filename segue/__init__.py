"""Segue serves one base model and thousands of LoRA adapters from one GPU, without cold starts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from segue.errors import (
    AdapterNotFoundError,
    AdapterPinnedError,
    AdapterRejectedError,
    DeadlineExceededError,
    DuplicateRequestError,
    EngineUnavailableError,
    FieldViolation,
    InternalError,
    InvalidRequestError,
    OverloadedError,
    RequestCancelledError,
    RequestNotFoundError,
    SegueError,
    SloInfeasibleError,
    UnsafePathError,
    UnsupportedError,
)
from segue.types import (
    SLO,
    AdapterInfo,
    Chunk,
    FinishReason,
    LayerTiming,
    LoraSource,
    Message,
    Reply,
    ServerInfo,
    Tier,
    Timing,
    TokenLogprob,
    Usage,
)

if TYPE_CHECKING:
    from segue.client import AsyncClient, AsyncGenerateStream, Client, GenerateStream, RetryPolicy

__all__ = [
    "SLO",
    "AdapterInfo",
    "AdapterNotFoundError",
    "AdapterPinnedError",
    "AdapterRejectedError",
    "AsyncClient",
    "AsyncGenerateStream",
    "Chunk",
    "Client",
    "DeadlineExceededError",
    "DuplicateRequestError",
    "EngineUnavailableError",
    "FieldViolation",
    "FinishReason",
    "GenerateStream",
    "InternalError",
    "InvalidRequestError",
    "LayerTiming",
    "LoraSource",
    "Message",
    "OverloadedError",
    "Reply",
    "RequestCancelledError",
    "RequestNotFoundError",
    "RetryPolicy",
    "SegueError",
    "ServerInfo",
    "SloInfeasibleError",
    "Tier",
    "Timing",
    "TokenLogprob",
    "UnsafePathError",
    "UnsupportedError",
    "Usage",
]


def __getattr__(name: str) -> Any:
    """Load the client, and with it gRPC, at its first use: every process of Segue imports this package."""
    if name in ("AsyncClient", "AsyncGenerateStream", "Client", "GenerateStream", "RetryPolicy"):
        from segue import client

        return getattr(client, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""The server that is measured: what it says of itself, and when it has nothing left to do."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import grpc

from segue.bench.driver import BenchmarkError
from segue.client import Client
from segue.v1 import server_pb2, server_pb2_grpc

_IDLE_SECONDS = 60.0
_POLL_SECONDS = 0.05
_ANSWER_SECONDS = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A server. ``adapters`` are (name, rank) of those that it can serve."""

    address: str
    model: str
    device: str
    dtype: str
    vocab_size: int
    context_tokens: int
    adapters: Sequence[tuple[str, int]]


def ask_target(address: str) -> Target:
    """Raises SegueError for a server that cannot be reached or does not serve."""
    with Client(address) as client:
        info = client.info(timeout=_ANSWER_SECONDS)
        adapters = client.adapters.list(timeout=_ANSWER_SECONDS)
    return Target(
        address=address,
        model=info.model,
        device=info.device,
        dtype=info.dtype,
        vocab_size=info.vocab_size,
        context_tokens=info.context_tokens,
        adapters=[(adapter.name, adapter.rank) for adapter in adapters if not adapter.problem],
    )


def wait_until_idle(address: str) -> None:
    """Return once the server has no requests. Raises BenchmarkError if that takes too long or it cannot be asked."""
    deadline_seconds = time.monotonic() + _IDLE_SECONDS
    with grpc.insecure_channel(address) as channel:
        stub = server_pb2_grpc.ServerServiceStub(channel)
        while True:
            try:
                state = next(iter(stub.WatchState(server_pb2.WatchStateRequest(), timeout=_ANSWER_SECONDS)))
            except grpc.RpcError as error:
                raise BenchmarkError(f"the server does not tell its state: {error}") from error
            if state.queue == server_pb2.Queue():
                return
            if time.monotonic() > deadline_seconds:
                raise BenchmarkError(f"requests that were cancelled still run after {_IDLE_SECONDS:g} s")
            time.sleep(_POLL_SECONDS)

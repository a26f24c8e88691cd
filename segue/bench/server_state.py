"""The state of a running server, as it tells it."""

from __future__ import annotations

import time

import grpc

from segue.bench.driver import BenchmarkError
from segue.v1 import server_pb2, server_pb2_grpc

POLL_SECONDS = 0.05
_IDLE_SECONDS = 120.0
_ANSWER_SECONDS = 20.0


def server_state(address: str) -> server_pb2.WatchStateResponse:
    """The state now. Raises BenchmarkError for a server that does not tell it or whose engine has died."""
    with grpc.insecure_channel(address) as channel:
        stub = server_pb2_grpc.ServerServiceStub(channel)
        try:
            state = next(iter(stub.WatchState(server_pb2.WatchStateRequest(), timeout=_ANSWER_SECONDS)))
        except grpc.RpcError as error:
            raise BenchmarkError(f"the server does not tell its state: {error}") from error
    if state.status != server_pb2.ENGINE_STATUS_SERVING:
        raise BenchmarkError("the engine has died")
    return state


def wait_until_idle(address: str) -> None:
    """Return once the server has no requests. Raises BenchmarkError as ``server_state``, and if that takes too long."""
    deadline_seconds = time.monotonic() + _IDLE_SECONDS
    while server_state(address).queue != server_pb2.Queue():
        if time.monotonic() > deadline_seconds:
            raise BenchmarkError(f"streams that were cancelled still run after {_IDLE_SECONDS:g} s")
        time.sleep(POLL_SECONDS)

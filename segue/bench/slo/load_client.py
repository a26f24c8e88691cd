"""A client process of ``segue bench slo``: sends requests when they are due, whatever became of those before.

A process of its own, so that several share the work of reading answers. It imports the SDK alone. What it is told and
what it tells are lines of JSON on standard input and output: a plan; "ready"; the moment to begin; a record for each
request when it has ended; and, when all have or standard input has closed, a summary.
"""

from __future__ import annotations

import asyncio
import gc
import json
import math
import random
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import grpc

from segue.client.requests import build_generate_request
from segue.client.status import error_of_rpc
from segue.types import SLO
from segue.v1 import generation_pb2, generation_pb2_grpc

CUT = "CUT"
OK = "OK"
_LOOP_CHECK_SECONDS = 0.005
_CONNECT_SECONDS = 20.0
_CHANNEL_OPTIONS = (("grpc.enable_retries", 0), ("grpc.max_receive_message_length", -1))


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientRequest:
    """A request as a client is told it. ``at_seconds`` is when it is to start, from the run's beginning."""

    number: int
    at_seconds: float
    adapter: str | None
    prompt_tokens: int
    output_tokens: int
    prompt_seed: int
    blocks: tuple[int, ...] = ()
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    tenant: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientPlan:
    """What a client process does. ``block_tokens`` is the size of the blocks that requests name. ``slo_fields`` and
    ``slo_headers`` say how requests carry their targets."""

    address: str
    vocab_size: int
    block_tokens: int
    timeout_seconds: float
    slo_fields: bool
    slo_headers: bool
    reject_on_miss: bool
    requests: tuple[ClientRequest, ...]


@dataclass(slots=True, kw_only=True)
class ClientRecord:
    """What became of a request. Moments are in seconds of CLOCK_MONOTONIC; tokens are those that came.

    ``code`` is OK, the name of a gRPC status, or CUT for a request that was cut off at the end of the run; ``error`` is
    the name of the SDK's exception. ``tier`` and ``queue_seconds`` are what the reply's timing says.
    """

    number: int
    sent_seconds: float
    first_seconds: float | None = None
    last_seconds: float | None = None
    tokens: int = 0
    code: str = CUT
    error: str = ""
    message: str = ""
    tier: str | None = None
    queue_seconds: float | None = None


def prompt_ids(request: ClientRequest, vocab_size: int, block_tokens: int) -> list[int]:
    """The prompt's tokens: each block's from its own number, the rest from the request's seed."""
    ids: list[int] = []
    for block in request.blocks:
        if len(ids) >= request.prompt_tokens:
            break
        ids += random.Random(f"block {block}").choices(range(vocab_size), k=block_tokens)
    missing = request.prompt_tokens - len(ids)
    if missing > 0:
        ids += random.Random(request.prompt_seed).choices(range(vocab_size), k=missing)
    return ids[: request.prompt_tokens]


def build_message(plan: ClientPlan, request: ClientRequest) -> generation_pb2.GenerateRequest:
    """The request as it is sent: greedy, of exactly its output's tokens."""
    slo = None
    if plan.slo_fields:
        slo = SLO(ttft_ms=request.ttft_ms, tpot_ms=request.tpot_ms, reject_on_miss=plan.reject_on_miss)
    return build_generate_request(
        prompt_ids(request, plan.vocab_size, plan.block_tokens),
        {
            "adapter": request.adapter,
            "max_tokens": request.output_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "slo": slo,
        },
    )


def build_metadata(plan: ClientPlan, request: ClientRequest) -> tuple[tuple[str, str], ...]:
    """The tenant, and the targets where they go as headers."""
    found = [] if request.tenant is None else [("x-tenant", request.tenant)]
    if plan.slo_headers:
        targets = (("x-slo-ttft-ms", request.ttft_ms), ("x-slo-tpot-ms", request.tpot_ms))
        found += [(name, f"{value:g}") for name, value in targets if value is not None]
    return tuple(found)


class LoadClient:
    """Sends a plan's requests. ``generate`` is the stub's method; ``tell`` is given each line for standard output."""

    def __init__(
        self,
        plan: ClientPlan,
        generate: Callable[..., Any],
        tell: Callable[[Mapping[str, Any]], None],
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        self._plan = plan
        self._generate = generate
        self._tell = tell
        self._clock = clock
        self._sleep = sleep
        self._loop_lags: list[float] = []
        # Before the run begins, so that it takes none of its time.
        self._ready = [
            (request, build_message(plan, request), build_metadata(plan, request)) for request in plan.requests
        ]

    async def run(self, begin_seconds: float, stopped: asyncio.Event) -> None:
        """Send every request when it is due, and follow it until it ends or the run is stopped."""
        watch = asyncio.create_task(self._watch_loop())
        tasks: set[asyncio.Task[None]] = set()
        stop = asyncio.create_task(stopped.wait())
        sending = asyncio.create_task(self._send_all(begin_seconds, tasks))
        await asyncio.wait([sending, stop], return_when=asyncio.FIRST_COMPLETED)
        for task in (sending, stop, watch, *tasks):
            task.cancel()
        ends = await asyncio.gather(sending, *tasks, return_exceptions=True)
        for end in ends:
            if isinstance(end, Exception):
                raise end
        self._tell({"loop_lags_seconds": self._loop_lags})

    async def _send_all(self, begin_seconds: float, tasks: set[asyncio.Task[None]]) -> None:
        for request, message, metadata in self._ready:
            wait_seconds = begin_seconds + request.at_seconds - self._clock()
            if wait_seconds > 0:
                await self._sleep(wait_seconds)
            tasks.add(asyncio.create_task(self._follow(request, message, metadata)))
            # The task's first step, which sends, comes before the next request's.
            await asyncio.sleep(0)
        if tasks:
            await asyncio.wait(tasks)

    async def _follow(
        self,
        request: ClientRequest,
        message: generation_pb2.GenerateRequest,
        metadata: tuple[tuple[str, str], ...],
    ) -> None:
        record = ClientRecord(number=request.number, sent_seconds=self._clock())
        call = self._generate(message, timeout=self._plan.timeout_seconds, metadata=metadata)
        try:
            while isinstance(response := await call.read(), generation_pb2.GenerateResponse):
                _note(record, response, self._clock())
            if record.code == CUT:
                record.code, record.message = "INTERNAL", "the server ended the stream before the answer"
        except grpc.RpcError as error:
            failure = error_of_rpc(error)
            record.code, record.error, record.message = failure.code.name, type(failure).__name__, failure.message
        finally:
            if record.code == CUT:
                call.cancel()
            self._tell(asdict(record))

    async def _watch_loop(self) -> None:
        """How late the event loop is: what arrives is noted that much later."""
        while True:
            before = self._clock()
            await self._sleep(_LOOP_CHECK_SECONDS)
            self._loop_lags += expected_lags(self._clock() - before - _LOOP_CHECK_SECONDS, _LOOP_CHECK_SECONDS)


def expected_lags(lag_seconds: float, interval_seconds: float) -> list[float]:
    """The lags that looking every ``interval_seconds`` would have met, where one look was late by ``lag_seconds``.

    Without them a loop that stands still for long would count once, as a loop that is late for a moment does.
    """
    count = max(1, math.ceil(lag_seconds / interval_seconds))
    return [max(0.0, lag_seconds - place * interval_seconds) for place in range(count)]


def _note(record: ClientRecord, response: generation_pb2.GenerateResponse, now_seconds: float) -> None:
    event = response.WhichOneof("event")
    if event == "chunk" and response.chunk.token_ids:
        record.last_seconds = now_seconds
        record.tokens += len(response.chunk.token_ids)
        if record.first_seconds is None:
            record.first_seconds = record.last_seconds
    elif event == "finished":
        timing = response.finished.timing
        record.code = OK
        record.tier = generation_pb2.Tier.Name(timing.tier).removeprefix("TIER_").lower()
        record.queue_seconds = timing.queue_seconds


def _tell(line: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


async def _serve(plan: ClientPlan) -> None:
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    async with grpc.aio.insecure_channel(plan.address, options=_CHANNEL_OPTIONS) as channel:
        await asyncio.wait_for(channel.channel_ready(), _CONNECT_SECONDS)
        client = LoadClient(plan, generation_pb2_grpc.GenerationServiceStub(channel).Generate, _tell)
        _tell({"ready": True})
        begin_seconds = float(await loop.run_in_executor(None, sys.stdin.readline))
        loop.run_in_executor(None, lambda: (sys.stdin.read(), loop.call_soon_threadsafe(stopped.set)))
        # A collection would make the loop late; a run's garbage is small.
        gc.collect()
        gc.disable()
        await client.run(begin_seconds, stopped)


def read_plan(line: str) -> ClientPlan:
    """The plan of a line of JSON."""
    table = json.loads(line)
    requests: Sequence[Mapping[str, Any]] = table.pop("requests")
    return ClientPlan(
        **table, requests=tuple(ClientRequest(**{**item, "blocks": tuple(item["blocks"])}) for item in requests)
    )


def main() -> None:
    asyncio.run(_serve(read_plan(sys.stdin.readline())))


if __name__ == "__main__":
    main()

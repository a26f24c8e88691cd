"""The client sends on time whatever the answers do, and notices when it does not. On a clock of its own."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest

from segue.bench.slo.load import LoadResult
from segue.bench.slo.load_client import (
    CUT,
    ClientPlan,
    ClientRecord,
    ClientRequest,
    LoadClient,
    build_message,
    build_metadata,
    expected_lags,
    prompt_ids,
    read_plan,
)
from segue.bench.slo.outcome import judge_run
from segue.v1 import generation_pb2 as pb
from tests.bench.slo.plans import planned

BEGIN = 100.0


@dataclass
class FakeClock:
    """Every turn of the event loop takes ``turn_seconds``."""

    turn_seconds: float
    now: float = BEGIN - 0.05

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            await asyncio.sleep(0)

    async def run(self) -> None:
        while True:
            self.now += self.turn_seconds
            await asyncio.sleep(0)


@dataclass
class FakeCall:
    """Answers a token each 10 ms after a first one at 30 ms; the last read raises ``error``, if there is one."""

    clock: FakeClock
    tokens: int
    error: grpc.RpcError | None = None
    cancelled: bool = False
    responses: list[pb.GenerateResponse] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.responses.append(pb.GenerateResponse(started=pb.Started(request_id="r")))
        self.responses += [pb.GenerateResponse(chunk=pb.Chunk(token_ids=[1])) for _ in range(self.tokens)]
        timing = pb.Timing(tier=pb.TIER_HOST, queue_seconds=0.25)
        self.responses.append(pb.GenerateResponse(finished=pb.Finished(timing=timing)))

    async def read(self) -> object:
        if len(self.responses) == 1 and self.error is not None:
            raise self.error
        if not self.responses:
            return grpc.aio.EOF  # type: ignore[attr-defined]
        response = self.responses.pop(0)
        if response.WhichOneof("event") == "chunk":
            await self.clock.sleep(0.01)
        elif response.WhichOneof("event") == "started":
            await self.clock.sleep(0.02)
        return response

    def cancel(self) -> None:
        self.cancelled = True


def plan(requests: Sequence[ClientRequest], **values: object) -> ClientPlan:
    defaults: dict[str, object] = {
        "address": "nowhere:1",
        "vocab_size": 50,
        "block_tokens": 4,
        "timeout_seconds": 7.0,
        "slo_fields": False,
        "slo_headers": False,
        "reject_on_miss": False,
        "requests": tuple(requests),
    }
    return ClientPlan(**(defaults | values))  # type: ignore[arg-type]


def request(number: int = 0, at_seconds: float = 0.0, **values: object) -> ClientRequest:
    defaults: dict[str, object] = {
        "number": number,
        "at_seconds": at_seconds,
        "adapter": "a",
        "prompt_tokens": 6,
        "output_tokens": 3,
        "prompt_seed": number,
    }
    return ClientRequest(**(defaults | values))  # type: ignore[arg-type]


@dataclass
class Told:
    """What a client told, and the calls it made."""

    records: dict[int, ClientRecord] = field(default_factory=dict)
    lags: list[float] | None = None
    calls: list[FakeCall] = field(default_factory=list)

    def __call__(self, line: Mapping[str, Any]) -> None:
        json.dumps(line)
        if "loop_lags_seconds" in line:
            self.lags = line["loop_lags_seconds"]
        else:
            record = ClientRecord(**line)
            self.records[record.number] = record


def drive(
    requests: Sequence[ClientRequest],
    *,
    turn_seconds: float = 0.001,
    stop_after_seconds: float | None = None,
    make: Callable[[FakeClock], FakeCall] = lambda clock: FakeCall(clock, 3),
) -> Told:
    """Run a client to its end, or stop it."""
    told = Told()
    clock = FakeClock(turn_seconds)

    def generate(_message: pb.GenerateRequest, **_options: object) -> FakeCall:
        told.calls.append(make(clock))
        return told.calls[-1]

    async def main() -> None:
        ticking = asyncio.create_task(clock.run())
        stopped = asyncio.Event()
        client = LoadClient(plan(requests), generate, told, clock=clock, sleep=clock.sleep)
        running = asyncio.create_task(client.run(BEGIN, stopped))
        if stop_after_seconds is not None:
            await clock.sleep(stop_after_seconds)
            stopped.set()
        await running
        ticking.cancel()

    asyncio.run(main())
    return told


def test_requests_are_sent_when_they_are_due_whatever_became_of_those_before() -> None:
    """The first answer takes a hundred times as long as it is to the next request."""
    requests = [request(number, 0.005 * number, output_tokens=3) for number in range(40)]
    told = drive(requests, make=lambda clock: FakeCall(clock, 50))
    assert sorted(told.records) == list(range(40))
    for each in requests:
        record = told.records[each.number]
        assert BEGIN + each.at_seconds <= record.sent_seconds <= BEGIN + each.at_seconds + 0.003
        assert (record.code, record.tokens, record.tier, record.queue_seconds) == ("OK", 50, "host", 0.25)
    assert told.records[0].last_seconds is not None
    assert told.records[0].last_seconds > told.records[39].sent_seconds


def test_times_of_tokens_are_noted() -> None:
    record = drive([request()]).records[0]
    assert record.first_seconds == pytest.approx(record.sent_seconds + 0.03, abs=0.005)
    assert record.last_seconds == pytest.approx(record.sent_seconds + 0.05, abs=0.008)
    assert record.tokens == 3


def judged_lag(told: Told, requests: Sequence[ClientRequest]) -> str | None:
    result = LoadResult(begin_seconds=BEGIN, records=told.records, loop_lags_seconds=told.lags or ())
    return judge_run(1.0, [planned(each.number, each.at_seconds) for each in requests], result).lag.problem(10.0)


def test_a_client_that_keeps_up_is_not_void() -> None:
    requests = [request(number, 0.02 * number) for number in range(20)]
    told = drive(requests, turn_seconds=0.001)
    assert told.lags
    assert judged_lag(told, requests) is None


def test_a_client_that_cannot_keep_up_is_void() -> None:
    requests = [request(number, 0.02 * number) for number in range(20)]
    told = drive(requests, turn_seconds=0.05)
    problem = judged_lag(told, requests)
    assert problem is not None
    assert problem.startswith("the clients lag behind their schedule: requests were sent ")
    assert told.lags is not None
    assert max(told.lags) == pytest.approx(0.045, abs=0.002)


def test_a_loop_that_stands_still_counts_for_as_long_as_it_does() -> None:
    assert expected_lags(-0.001, 0.005) == [0.0]
    assert expected_lags(0.003, 0.005) == [0.003]
    assert expected_lags(0.012, 0.005) == pytest.approx([0.012, 0.007, 0.002])


def test_what_still_runs_at_the_end_is_cut_off_and_told() -> None:
    requests = [request(0), request(1, 0.02), request(2, 5.0)]
    told = drive(requests, stop_after_seconds=0.2, make=lambda clock: FakeCall(clock, 1000))
    assert sorted(told.records) == [0, 1]
    assert {record.code for record in told.records.values()} == {CUT}
    assert all(record.tokens > 0 for record in told.records.values())
    assert all(call.cancelled for call in told.calls)
    assert told.lags is not None


def test_a_failure_is_told_with_its_status() -> None:
    nothing = grpc.aio.Metadata()
    error = grpc.aio.AioRpcError(grpc.StatusCode.RESOURCE_EXHAUSTED, nothing, nothing, "the queue is full", None)
    told = drive([request()], make=lambda clock: FakeCall(clock, 2, error))
    record = told.records[0]
    assert (record.code, record.error, record.message) == (
        "RESOURCE_EXHAUSTED",
        "OverloadedError",
        "the queue is full",
    )
    assert record.tokens == 2


def test_an_answer_without_an_end_has_failed() -> None:
    def endless(clock: FakeClock) -> FakeCall:
        call = FakeCall(clock, 2)
        del call.responses[-1]
        return call

    record = drive([request()], make=endless).records[0]
    assert (record.code, record.tokens) == ("INTERNAL", 2)


def test_prompts_come_from_the_seed_and_share_blocks() -> None:
    alone = [prompt_ids(request(number, prompt_seed=number), 50, 4) for number in (1, 1, 2)]
    assert alone[0] == alone[1] != alone[2]
    assert len(alone[0]) == 6
    first = prompt_ids(request(blocks=(7, 8), prompt_tokens=8), 50, 4)
    second = prompt_ids(request(blocks=(7, 9), prompt_tokens=7), 50, 4)
    longer = prompt_ids(request(blocks=(7,), prompt_tokens=9), 50, 4)
    assert first[:4] == second[:4] == longer[:4]
    assert first[4:7] != second[4:7]
    assert (len(second), len(longer)) == (7, 9)
    assert all(0 <= token < 50 for token in first)


def test_targets_go_as_they_are_wanted() -> None:
    asked = request(ttft_ms=200.0, tpot_ms=None, tenant="t1", adapter=None)
    plain = plan([asked])
    assert not build_message(plain, asked).HasField("slo")
    assert not build_message(plain, asked).HasField("adapter")
    assert build_metadata(plain, asked) == (("x-tenant", "t1"),)
    fields = plan([asked], slo_fields=True, reject_on_miss=True)
    slo = build_message(fields, asked).slo
    assert (slo.ttft_ms, slo.HasField("tpot_ms"), slo.on_miss) == (200.0, False, pb.ON_MISS_REJECT)
    headers = plan([asked], slo_headers=True)
    assert build_metadata(headers, asked) == (("x-tenant", "t1"), ("x-slo-ttft-ms", "200"))


def test_answers_have_exactly_their_tokens() -> None:
    sampling = build_message(plan([]), request(output_tokens=9)).sampling
    assert (sampling.max_tokens, sampling.ignore_eos, sampling.temperature) == (9, True, 0.0)


def test_a_plan_is_read_as_it_was_written() -> None:
    written = plan([request(1, blocks=(3, 4)), request(2, 0.5, tenant="t")])
    assert read_plan(json.dumps(dataclasses.asdict(written))) == written

"""Client processes send what they are told, and all that became of it comes back."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import grpc
import pytest

from segue.bench.driver import BenchmarkError
from segue.bench.slo.config import ClientConfig, SloClass
from segue.bench.slo.load import LoadProcesses, LoadResult
from segue.bench.slo.load_client import CUT, ClientRecord
from segue.bench.slo.workload import Adapter, PlannedRequest
from segue.v1 import generation_pb2 as pb
from segue.v1 import generation_pb2_grpc
from tests.bench.slo.plans import planned

VOCAB_SIZE = 100


@dataclass
class FakeGeneration(generation_pb2_grpc.GenerationServiceServicer):
    """Answers at once; refuses the adapter "refuse", and never answers "hang" and the second half of "stall"."""

    requests: list[pb.GenerateRequest] = field(default_factory=list)
    metadata: list[dict[str, str | bytes]] = field(default_factory=list)
    done: threading.Event = field(default_factory=threading.Event)

    def Generate(self, request: pb.GenerateRequest, context: grpc.ServicerContext) -> Iterator[pb.GenerateResponse]:  # noqa: N802
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        name = request.adapter.name
        yield pb.GenerateResponse(started=pb.Started(request_id=request.request_id))
        if name == "refuse":
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full")
        for token in range(request.sampling.max_tokens):
            if name == "hang" or (name == "stall" and 2 * token >= request.sampling.max_tokens):
                self.done.wait()
                return
            yield pb.GenerateResponse(chunk=pb.Chunk(token_ids=[token]))
        yield pb.GenerateResponse(finished=pb.Finished(timing=pb.Timing(tier=pb.TIER_DISK, queue_seconds=0.5)))

    def Abort(self, request: pb.AbortRequest, context: grpc.ServicerContext) -> pb.AbortResponse:  # noqa: N802
        raise AssertionError(f"nobody aborts, but {request.request_id} of {context.peer()} was to be")


@pytest.fixture
def service() -> Iterator[tuple[FakeGeneration, str]]:
    service = FakeGeneration()
    server = grpc.server(ThreadPoolExecutor(max_workers=16))
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield service, f"127.0.0.1:{port}"
    service.done.set()
    server.stop(None).wait()


def request(number: int, adapter: str | None = "a", **values: object) -> PlannedRequest:
    chosen = None if adapter is None else Adapter(name=adapter, rank=8, decile=1)
    return planned(number, 0.01 * number, adapter=chosen, **values)


def send(
    address: str, requests: list[PlannedRequest], seconds: float, config: ClientConfig
) -> tuple[LoadResult, list[ClientRecord], list[float]]:
    told: list[ClientRecord] = []
    begun: list[float] = []
    with LoadProcesses(address, VOCAB_SIZE, requests, config) as load:
        result = load.run(seconds, told.append, begun.append)
    return result, told, begun


def test_processes_share_the_requests_and_tell_all_of_them(service: tuple[FakeGeneration, str]) -> None:
    fake, address = service
    requests = [request(number, "a" if number % 2 else None, prompt_tokens=5 + number) for number in range(9)]
    result, told, begun = send(address, requests, 60.0, ClientConfig(processes=2))
    assert sorted(result.records) == sorted(record.number for record in told) == list(range(9))
    assert begun == [result.begin_seconds]
    for asked in requests:
        record = result.records[asked.number]
        assert (record.code, record.tokens, record.tier, record.queue_seconds) == ("OK", 10, "disk", 0.5)
        assert record.sent_seconds >= result.begin_seconds + asked.at_seconds
    assert sorted(len(each.token_ids.ids) for each in fake.requests) == [5 + number for number in range(9)]
    assert sorted(each.adapter.name for each in fake.requests) == [""] * 5 + ["a"] * 4
    assert len({tuple(each.token_ids.ids) for each in fake.requests}) == 9
    assert result.loop_lags_seconds


def test_targets_and_tenants_arrive(service: tuple[FakeGeneration, str]) -> None:
    fake, address = service
    requests = [request(0, tenant="loud"), request(1, slo=SloClass(tpot_ms=7.5))]
    send(address, requests, 60.0, ClientConfig(send_slo="headers"))
    found = {data.get("x-slo-tpot-ms"): data for data in fake.metadata}
    assert (found["20"]["x-tenant"], found["20"]["x-slo-ttft-ms"]) == ("loud", "100")
    assert not {"x-tenant", "x-slo-ttft-ms"} & found["7.5"].keys()
    assert not any(each.HasField("slo") for each in fake.requests)
    send(address, requests, 60.0, ClientConfig(send_slo="fields", reject_on_miss=True))
    slos = [each.slo for each in fake.requests[2:]]
    assert sorted((slo.HasField("ttft_ms"), slo.tpot_ms, slo.on_miss) for slo in slos) == [
        (False, 7.5, pb.ON_MISS_REJECT),
        (True, 20.0, pb.ON_MISS_REJECT),
    ]


def test_refusals_come_back_and_what_hangs_is_cut_off(service: tuple[FakeGeneration, str]) -> None:
    _, address = service
    requests = [request(0, "refuse"), request(1, "hang"), request(2, "stall"), request(3)]
    result, _, _ = send(address, requests, 1.0, ClientConfig())
    found = {number: (record.code, record.error, record.tokens) for number, record in result.records.items()}
    assert found == {
        0: ("RESOURCE_EXHAUSTED", "OverloadedError", 0),
        1: (CUT, "", 0),
        2: (CUT, "", 5),
        3: ("OK", "", 10),
    }
    assert result.records[0].message == "the queue is full"


def test_a_request_is_given_up_after_its_timeout(service: tuple[FakeGeneration, str]) -> None:
    _, address = service
    result, _, _ = send(address, [request(0, "hang")], 60.0, ClientConfig(timeout_seconds=0.2))
    assert result.records[0].code == "DEADLINE_EXCEEDED"


def test_a_process_that_fails_ends_the_run(service: tuple[FakeGeneration, str]) -> None:
    """It has no tokens to draw a prompt from."""
    _, address = service
    with (
        LoadProcesses(address, 0, [request(0)], ClientConfig()) as load,
        pytest.raises(BenchmarkError, match="a client process has failed"),
    ):
        load.run(60.0, lambda _: None, lambda _: None)

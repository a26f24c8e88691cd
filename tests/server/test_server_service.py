from __future__ import annotations

from importlib import metadata

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from segue import Client, EngineUnavailableError, ServerInfo
from segue.v1 import generation_pb2, server_pb2, server_pb2_grpc
from tests.server.fake_engine import Command
from tests.server.rig import MODEL_NAME, Rig


def test_info(rig: Rig, client: Client) -> None:
    assert client.info() == ServerInfo(
        model=MODEL_NAME,
        device="cpu",
        dtype="float32",
        version=metadata.version("segue"),
        layers=2,
        vocab_size=400,
        context_tokens=128,
        page_tokens=16,
        pages=64,
        cpu_workers=2,
        cpu_workers_ready=2,
        max_lora_rank=64,
        copy_bytes_per_second=1e9,
    )
    assert rig.messages("Start")[0]["config"]["model_dir"] == str(rig.model_dir)


def test_watch_state(rig: Rig, client: Client) -> None:
    version = client.generate([10], adapter="beta", max_tokens=1).adapter_version
    with grpc.insecure_channel(rig.target) as channel:
        stub = server_pb2_grpc.ServerServiceStub(channel)
        watch = stub.WatchState(server_pb2.WatchStateRequest(interval=Duration(nanos=10_000_000)))
        state = next(iter(watch))
        assert state.status == server_pb2.ENGINE_STATUS_SERVING
        assert state.queue == server_pb2.Queue(waiting=1, prefilling=2, decoding=0)
        assert state.pages == server_pb2.Pages(total=64, free=50, kv=5, adapter=3, cached=6)
        assert state.cpu_workers == server_pb2.CpuWorkers(ready=2, restarts=4)
        assert state.device_time == server_pb2.DeviceTime(batches=7, busy_seconds=2.5, idle_seconds=0.25)
        assert state.residency.host_free_bytes == 1000
        assert list(state.residency.adapters) == [
            server_pb2.AdapterResidency(name="beta", version=version, tier=generation_pb2.TIER_DEVICE, users=0)
        ]
        assert not state.HasField("profile")

        with pytest.raises(EngineUnavailableError):
            client.generate([Command.DIE])
        statuses = {next(iter(watch)).status for _ in range(2)}
        assert server_pb2.ENGINE_STATUS_STARTING in statuses
        while next(iter(watch)).status != server_pb2.ENGINE_STATUS_SERVING:
            continue
        watch.cancel()  # type: ignore[no-untyped-call]


def test_watch_state_refuses_a_short_interval(rig: Rig) -> None:
    with grpc.insecure_channel(rig.target) as channel:
        stub = server_pb2_grpc.ServerServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.WatchState(server_pb2.WatchStateRequest(interval=Duration(nanos=1))))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_watch_state_ends_with_the_server(rig: Rig) -> None:
    with grpc.insecure_channel(rig.target) as channel:
        stub = server_pb2_grpc.ServerServiceStub(channel)
        watch = stub.WatchState(server_pb2.WatchStateRequest(interval=Duration(seconds=3600)))
        assert next(iter(watch)).status == server_pb2.ENGINE_STATUS_SERVING
        rig.server._stopping.set()
        rig.loop.run(_nothing())
        assert [state.status for state in watch] == [server_pb2.ENGINE_STATUS_STOPPING]


def test_reflection_lists_the_services(rig: Rig) -> None:
    with grpc.insecure_channel(rig.target) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        requests = [reflection_pb2.ServerReflectionRequest(list_services="")]
        (response,) = stub.ServerReflectionInfo(iter(requests))
    names = {service.name for service in response.list_services_response.service}
    assert names == {
        "segue.v1.GenerationService",
        "segue.v1.AdapterService",
        "segue.v1.ServerService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }


async def _nothing() -> None:
    """Run once through the loop, which wakes what was set from another thread."""

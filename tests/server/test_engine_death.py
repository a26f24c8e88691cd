from __future__ import annotations

import dataclasses
import json
import os
import signal
import threading
from pathlib import Path

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from segue import Client, EngineUnavailableError
from segue.server.app import SERVICES, Server, ServerStartError
from tests.server.fake_engine import Command
from tests.server.rig import (
    LoopThread,
    Rig,
    fake_engine_command,
    running_server,
    server_config,
    wait_until,
    write_model,
)


def health_of(rig: Rig, service: str = "") -> int:
    with grpc.insecure_channel(rig.target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        return int(stub.Check(health_pb2.HealthCheckRequest(service=service)).status)


def wait_for_service(client: Client) -> None:
    def serves() -> bool:
        try:
            return client.generate([10], max_tokens=1).token_ids == (10,)
        except EngineUnavailableError:
            return False

    wait_until(serves, "the engine is started again")


def test_all_in_flight_fail_and_a_new_engine_serves(rig: Rig, client: Client) -> None:
    client.generate([10], adapter="alpha", max_tokens=1)
    first_pid = rig.engine_pid()
    with client.generate([Command.SILENT], adapter="alpha", stream=True) as silent:
        rig.wait_for("Submit", 2)
        os.kill(first_pid, signal.SIGKILL)
        with pytest.raises(EngineUnavailableError, match="died"):
            list(silent)
    wait_for_service(client)
    assert rig.engine_pid() != first_pid
    assert client.generate([10], adapter="alpha", max_tokens=1).token_ids == (10,)
    before, after = rig.messages("OpenVersion")
    assert before["manifest"] == after["manifest"]
    assert not psutil.pid_exists(first_pid)


def test_tokens_before_the_death_are_delivered(loop: LoopThread, tmp_path: Path) -> None:
    with running_server(loop, tmp_path, step_seconds=0.05) as rig:
        stream = rig.client().generate([10, 20], max_tokens=100, stream=True)
        assert next(stream).token_ids[0] == 20
        os.kill(rig.engine_pid(), signal.SIGKILL)
        with pytest.raises(EngineUnavailableError):
            list(stream)


def test_health_follows_the_engine(rig: Rig, client: Client) -> None:
    serving, not_serving = (health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING)
    assert [health_of(rig, service) for service in ("", *SERVICES)] == [serving] * 4
    seen = []
    with grpc.insecure_channel(rig.target) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        seen.append(next(watch).status)
        with pytest.raises(EngineUnavailableError):
            client.generate([Command.DIE])
        seen += [next(watch).status, next(watch).status]
        watch.cancel()
    assert seen == [serving, not_serving, serving]


def test_requests_while_there_is_no_engine_are_told_so(rig: Rig, client: Client) -> None:
    rig.server._engine._command = ("/nonexistent/engine",)
    with pytest.raises(EngineUnavailableError):
        client.generate([Command.DIE])
    with pytest.raises(EngineUnavailableError, match="is being restarted"):
        client.generate([10])
    with pytest.raises(EngineUnavailableError):
        client.info()
    assert [info.name for info in client.adapters.list()] == ["alpha", "beta"]


def test_an_engine_that_dies_again_and_again_is_started_again(rig: Rig, client: Client) -> None:
    for _ in range(3):
        with pytest.raises(EngineUnavailableError):
            client.generate([Command.DIE])
        wait_for_service(client)
    assert len(rig.messages("Start")) == 4


def test_an_engine_that_breaks_the_protocol_is_replaced(rig: Rig, client: Client) -> None:
    pid = rig.engine_pid()
    with pytest.raises(EngineUnavailableError):
        client.generate([Command.GARBAGE])
    wait_for_service(client)
    assert not psutil.pid_exists(pid)


def test_stopping_the_server_leaves_no_process(loop: LoopThread, tmp_path: Path) -> None:
    with running_server(loop, tmp_path) as rig:
        pid = rig.engine_pid()
        assert rig.client().info().layers == 2
    assert len(rig.messages("Shutdown")) == 1
    assert not psutil.pid_exists(pid)


def test_running_requests_end_before_the_server_stops(loop: LoopThread, tmp_path: Path) -> None:
    with running_server(loop, tmp_path, step_seconds=0.02, drain_seconds=20.0) as rig:
        stream = rig.client().generate([10, 20], max_tokens=40, stream=True)
        next(stream)
        stopping = threading.Thread(target=lambda: loop.run(rig.server.stop()))
        stopping.start()
        list(stream)
        stopping.join()
        assert stream.reply.usage.completion_tokens == 40
        with pytest.raises(EngineUnavailableError):
            rig.client().generate([10], timeout=5)
    assert rig.messages("Cancel") == []


def test_an_engine_that_does_not_stop_is_killed(loop: LoopThread, tmp_path: Path) -> None:
    with running_server(loop, tmp_path) as rig:
        pid = rig.engine_pid()
        with rig.client().generate([Command.IGNORE_SHUTDOWN], stream=True):
            rig.wait_for("Submit")
    assert not psutil.pid_exists(pid)


@pytest.mark.parametrize(
    ("start", "start_seconds", "message"),
    [
        ("failed", 60.0, r"^the engine cannot be started: model\.safetensors is truncated$"),
        ("exit", 60.0, r"^the engine cannot be started: it ended while it started; its log says why$"),
        ("silent", 2.0, r"^the engine cannot be started: it did not start within 2 s$"),
    ],
)
def test_an_engine_that_does_not_start(
    loop: LoopThread, tmp_path: Path, start: str, start_seconds: float, message: str
) -> None:
    with (
        pytest.raises(ServerStartError, match=message),
        running_server(loop, tmp_path, "--start", start, start_seconds=start_seconds),
    ):
        raise AssertionError("the server must not start")
    assert not psutil.pid_exists(json.loads((tmp_path / "engine.log").read_text())["pid"])


def test_a_port_in_use_is_one_line(loop: LoopThread, tmp_path: Path, rig: Rig) -> None:
    model_dir = write_model(tmp_path / "other")
    config = dataclasses.replace(server_config(model_dir, rig.adapters_dir), listen=rig.target)

    async def start() -> None:
        await Server(config, engine_command=fake_engine_command(tmp_path / "other.log")).start()

    with pytest.raises(ServerStartError, match=f"^cannot listen on {rig.target}"):
        loop.run(start())

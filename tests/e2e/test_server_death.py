"""Processes of the real server die or are told to: callers are told, nothing is left, and what can recover does."""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from segue import Client, GenerateStream
from segue.errors import EngineUnavailableError
from segue.types import FinishReason
from tests.e2e.live import ASSETS, CPU_WORKERS, LiveServer, Reference, live_server, shared_memory_files, wait_until

PROMPT = "Tell me about the fox."
NEW_TOKENS = 24
ADAPTERS = ASSETS / "adapters"


def begin(client: Client, adapter: str | None, new_tokens: int) -> GenerateStream:
    """A stream whose first chunk has come."""
    stream = client.generate(
        PROMPT, adapter=adapter, max_tokens=new_tokens, ignore_eos=True, temperature=0.0, timeout=60, stream=True
    )
    next(stream)
    return stream


def family_of(server: LiveServer) -> list[psutil.Process]:
    """The server's descendants: the engine, the zygote and each worker."""
    family = server.descendants()
    assert len(family) >= 2 + CPU_WORKERS
    return family


def has_ended(process: psutil.Process) -> bool:
    """Gone, or dead and only not reaped yet."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def assert_all_end(family: list[psutil.Process]) -> None:
    wait_until(lambda: all(map(has_ended, family)), f"{family} are gone")


def assert_lost(stream: GenerateStream) -> None:
    with pytest.raises(EngineUnavailableError):
        list(stream)


def test_a_server_told_to_stop_ends_what_runs_and_leaves_nothing(tmp_path: Path) -> None:
    files = shared_memory_files()
    with live_server(tmp_path / "server", ADAPTERS) as server, server.client() as client:
        family = family_of(server)
        stream = begin(client, "yoda", 200)
        server.process.send_signal(signal.SIGTERM)
        list(stream)
        assert stream.reply.finish_reason is FinishReason.LENGTH
        assert server.process.wait(30) == 0
        assert "Traceback" not in server.log.read_text()
    assert_all_end(family)
    wait_until(lambda: shared_memory_files() <= files, "nothing is left in /dev/shm")


def test_a_killed_server_leaves_nothing(tmp_path: Path) -> None:
    files = shared_memory_files()
    with live_server(tmp_path / "server", ADAPTERS) as server, server.client() as client:
        family = family_of(server)
        streams = [begin(client, name, 1500) for name in (None, "yoda")]
        server.process.kill()
        for stream in streams:
            assert_lost(stream)
        assert server.process.wait(30) == -signal.SIGKILL
        assert_all_end(family)
    wait_until(lambda: shared_memory_files() <= files, "nothing is left in /dev/shm")


def test_a_killed_engine_is_replaced(tmp_path: Path) -> None:
    reference = Reference()
    names = [None, "yoda", "pirate"]
    with live_server(tmp_path / "server", ADAPTERS) as server, server.client() as client:
        family = family_of(server)
        engine = server.engine()
        with ThreadPoolExecutor(len(names)) as threads:
            streams = list(threads.map(lambda name: begin(client, name, 1500), names))
        engine.kill()
        for stream in streams:
            assert_lost(stream)
        assert_all_end(family)
        wait_until(server.is_ready, "a new engine serves")
        assert server.engine().pid != engine.pid
        for name in names:
            reply = client.generate(
                PROMPT, adapter=name, max_tokens=NEW_TOKENS, ignore_eos=True, temperature=0.0, timeout=60
            )
            reference.compare(reply, None if name is None else ADAPTERS / name, PROMPT, NEW_TOKENS)
        wait_until(server.is_idle, "every page is free or an adapter's")

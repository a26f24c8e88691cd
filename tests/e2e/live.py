"""A real server in a process of its own, and the answers that transformers and PEFT give for the same folders."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import grpc
import psutil
from tokenizers import Tokenizer

from segue import Client, RetryPolicy
from segue.errors import EngineUnavailableError
from segue.types import Reply
from segue.v1 import server_pb2, server_pb2_grpc
from tests.checkpoints import load_reference, reference_greedy

WAIT_SECONDS = 60.0
ASSETS = Path(__file__).parents[2] / "segue" / "demo" / "assets"
MODEL_DIR = ASSETS / "model"
CPU_WORKERS = 2
CONFIG = f"""
drain_seconds = 20.0
[engine]
copy_bytes_per_second = 4e6
cpu_workers = {CPU_WORKERS}
pages = 512
host_store_bytes = 33554432
poison_freed_pages = true
check_invariants = true
[supervision]
restart_min_seconds = 0.1
"""


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Poll until ``condition`` holds; fail after WAIT_SECONDS."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited {WAIT_SECONDS:g} s in vain: {what}"
        time.sleep(0.02)


def shared_memory_files() -> frozenset[str]:
    return frozenset(os.listdir("/dev/shm"))


@dataclass(frozen=True)
class LiveServer:
    """A running ``segue serve``."""

    process: subprocess.Popen[bytes]
    address: str
    adapters_dir: Path
    log: Path

    def client(self) -> Client:
        """A client with a connection of its own, which sends nothing twice."""
        options = (("grpc.use_local_subchannel_pool", 1),)
        return Client(self.address, channel_options=options, retry=RetryPolicy(attempts=1))

    def descendants(self) -> list[psutil.Process]:
        """The engine, the zygote and the workers."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def engine(self) -> psutil.Process:
        (engine,) = psutil.Process(self.process.pid).children()
        return engine

    def state(self) -> server_pb2.WatchStateResponse:
        """The server's state now."""
        with grpc.insecure_channel(self.address) as channel:
            watch = server_pb2_grpc.ServerServiceStub(channel).WatchState(server_pb2.WatchStateRequest(), timeout=20)
            return next(iter(watch))

    def is_idle(self) -> bool:
        """Whether no request is known, and every page is free, an adapter's or kept for prefixes."""
        state = self.state()
        queue, pages = state.queue, state.pages
        busy = queue.waiting or queue.prefilling or queue.decoding or pages.kv
        return not busy and pages.total > 0 and pages.free + pages.adapter + pages.cached == pages.total

    def is_ready(self) -> bool:
        """Whether the engine serves, with all its CPU workers."""
        with self.client() as client:
            try:
                return client.info(timeout=20).cpu_workers_ready == CPU_WORKERS
            except EngineUnavailableError:
                return False


@contextmanager
def live_server(
    directory: Path, adapters_dir: Path, *, model_dir: Path = MODEL_DIR, config: str = CONFIG
) -> Iterator[LiveServer]:
    """``segue serve``, ready with all its CPU workers; killed at the end if it still runs."""
    directory.mkdir()
    config_file, address_file, log = directory / "segue.toml", directory / "address", directory / "server.log"
    config_file.write_text(config)
    command = [sys.executable, "-m", "segue", "serve", "--model", str(model_dir), "--adapters", str(adapters_dir)]
    command += ["--listen", "127.0.0.1:0", "--address-file", str(address_file), "--device", "cpu"]
    command += ["--config", str(config_file)]
    with (
        log.open("wb") as output,
        subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL) as process,
    ):
        try:
            wait_until(lambda: address_file.exists() or process.poll() is not None, "the server starts")
            assert process.poll() is None, log.read_text()
            server = LiveServer(process, address_file.read_text().strip(), adapters_dir, log)
            wait_until(server.is_ready, "all CPU workers are ready")
            yield server
        finally:
            process.terminate()
            try:
                process.wait(WAIT_SECONDS)
            finally:
                process.kill()


class Reference:
    """What the demo's model answers greedily with an adapter's folder, after transformers and PEFT."""

    def __init__(self) -> None:
        self.tokenizer = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))

    @cache  # noqa: B019
    def tokens(self, adapter_dir: Path | None, prompt: str, new_tokens: int) -> tuple[int, ...]:
        """The greedy tokens, end-of-sequence tokens ignored."""
        ids = self.tokenizer.encode(prompt, add_special_tokens=True).ids
        return reference_greedy(load_reference(MODEL_DIR, adapter_dir), ids, new_tokens)

    def compare(self, reply: Reply, adapter_dir: Path | None, prompt: str, new_tokens: int) -> None:
        """The reply is the right answer to a greedy request of ``new_tokens`` tokens that ignores end-of-sequence."""
        expected = self.tokens(adapter_dir, prompt, new_tokens)
        assert reply.token_ids == expected
        assert reply.text == self.tokenizer.decode(list(expected), skip_special_tokens=True)

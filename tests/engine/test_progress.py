"""What an engine tells of its start: how often, in which words, and that it is all told before Ready."""

from __future__ import annotations

import select
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from segue.engine.channel import Channel
from segue.engine.config import EngineConfig
from segue.engine.messages import Ready, Start, StartProgress, ToFrontEnd
from segue.engine.progress import Throttle, amount, decimal_bytes
from tests.checkpoints import TinyModel, write_random_model

WAIT_SECONDS = 60


class FakeClock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def test_the_first_and_the_last_of_a_stage_are_told_and_few_in_between() -> None:
    clock = FakeClock()
    told: list[StartProgress] = []
    report = Throttle(told.append, 0.25, clock)
    for stage in ("a", "b"):
        for done in range(101):
            report(StartProgress(stage, done, 100))
            clock.seconds += 1 / 64
    assert [(item.stage, item.done) for item in told] == [
        (stage, done) for stage in ("a", "b") for done in (0, 16, 32, 48, 64, 80, 96, 100)
    ]


@pytest.mark.parametrize(
    ("progress", "words"),
    [
        (StartProgress("x", 1_500_000_000, 16_060_522_496, "bytes"), "1.50 GB of 16.1 GB"),
        (StartProgress("x", 16_060_522_496, 16_060_522_496, "bytes"), "16.1 GB"),
        (StartProgress("x", 3, 40, "files"), "3 of 40 files"),
        (StartProgress("x", 40, 40, "files"), "40 files"),
        (StartProgress("x", 3, 12), "3 of 12"),
        (StartProgress("x", 0, 0, "bytes"), "0 B"),
    ],
)
def test_amounts(progress: StartProgress, words: str) -> None:
    assert amount(progress) == words


@pytest.mark.parametrize(
    ("size_bytes", "words"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (9_994, "9.99 kB"),
        (9_996, "10.0 kB"),
        (99_960, "100 kB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (1.23e15, "1230 TB"),
    ],
)
def test_bytes(size_bytes: float, words: str) -> None:
    assert decimal_bytes(size_bytes) == words


@contextmanager
def engine_process(config: EngineConfig) -> Iterator[Channel[ToFrontEnd]]:
    """A real engine process that has been sent its Start."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    command = [sys.executable, "-m", "segue.engine", "--channel-fd", str(theirs.fileno())]
    channel: Channel[ToFrontEnd] = Channel(ours, ToFrontEnd)
    with subprocess.Popen(command, pass_fds=(theirs.fileno(),)) as process:
        theirs.close()
        try:
            channel.send(Start(config))
            yield channel
            channel.close()
            assert process.wait(WAIT_SECONDS) == 0
        finally:
            channel.close()
            process.kill()


def next_messages(channel: Channel[ToFrontEnd]) -> list[ToFrontEnd]:
    readable, _, _ = select.select([channel], [], [], WAIT_SECONDS)
    assert readable
    return channel.receive()


@pytest.mark.parametrize(("load_format", "stage"), [("auto", "load weights"), ("dummy", "draw random weights")])
def test_an_engine_tells_how_far_it_is_until_it_serves(tmp_path: Path, load_format: str, stage: str) -> None:
    model_dir = write_random_model(tmp_path, TinyModel(layers=1))
    config = EngineConfig(model_dir=str(model_dir), load_format=load_format, pages=64, cpu_workers=0)
    messages: list[ToFrontEnd] = []
    with engine_process(config) as channel:
        while not (messages and isinstance(messages[-1], Ready)):
            messages += next_messages(channel)
    *told, ready = messages
    assert isinstance(ready, Ready)
    progress = [message for message in told if isinstance(message, StartProgress)]
    assert progress == told
    assert {(item.stage, item.unit) for item in progress} == {(stage, "bytes")}
    assert progress[0].done == 0
    assert progress[-1].is_complete
    assert [item.done for item in progress] == sorted(item.done for item in progress)


def test_an_engine_whose_front_end_is_gone_stops_loading_in_silence(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model_dir = write_random_model(tmp_path, TinyModel(layers=1))
    config = EngineConfig(model_dir=str(model_dir), load_format="dummy", pages=64, cpu_workers=0)
    capfd.readouterr()
    with engine_process(config) as channel:
        # Its Start has been sent: the first report of the loading finds nobody.
        channel.close()
    assert capfd.readouterr().err == ""

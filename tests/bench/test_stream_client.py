"""The processes that read streams: what they record, and what they do when they are stopped or a stream fails."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from segue.bench.stream_client import ClientProcesses, StreamRequest
from tests.server.fake_engine import Command
from tests.server.rig import LoopThread, Rig, running_server, wait_until


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    loop = LoopThread()
    with running_server(loop, tmp_path_factory.mktemp("streams")) as running:
        yield running
    loop.close()


def test_streams_are_shared_and_end_when_they_are_stopped(rig: Rig) -> None:
    requests = [StreamRequest(prompt=(10, 20, place), adapter="beta" if place else None) for place in range(5)]
    requests.append(StreamRequest(prompt=(Command.SILENT,), adapter=None))
    with ClientProcesses(rig.target, requests, max_tokens=100, processes=2) as clients:
        submits = rig.wait_for("Submit", 6)
        assert not clients.has_ended
        records = clients.stop()
    assert sorted(item["prompt_token_ids"] for item in submits) == sorted(list(item.prompt) for item in requests)
    assert {item["max_tokens"] for item in submits} == {100}
    assert [record.error for record in records] == [None] * 6
    assert all(sum(count for _, count in record.arrivals) <= 100 for record in records)
    assert all(list(record.arrivals) == sorted(record.arrivals) for record in records)
    rig.wait_for("Cancel")


def test_a_stream_that_fails_says_why(rig: Rig) -> None:
    before = len(rig.messages("Submit"))
    with ClientProcesses(
        rig.target, [StreamRequest(prompt=(Command.UNFORESEEN,), adapter=None)], max_tokens=9, processes=3
    ) as clients:
        rig.wait_for("Submit", before + 1)
        wait_until(lambda: clients.has_ended, "the only stream has ended")
        (record,) = clients.stop()
    assert record.arrivals == ()
    assert record.error is not None

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from segue import Client, DeadlineExceededError, RequestCancelledError
from tests.server.fake_engine import Command
from tests.server.rig import LoopThread, Rig, running_server, wait_until

ENDLESS = 120


@pytest.fixture
def slow(loop: LoopThread, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with running_server(loop, tmp_path_factory.mktemp("slow"), step_seconds=0.05) as rig:
        yield rig


def test_cancel_stops_the_engine_and_ends_the_iteration(slow: Rig) -> None:
    stream = slow.client().generate([10, 20], max_tokens=ENDLESS, stream=True)
    first = next(stream)
    assert first.token_ids[0] == 20
    stream.cancel()
    list(stream)
    (submit,) = slow.messages("Submit")
    assert slow.wait_for("Cancel")[0]["number"] == submit["number"]
    with pytest.raises(RequestCancelledError):
        _ = stream.reply


def test_leaving_the_block_cancels(slow: Rig) -> None:
    with slow.client().generate([10, 20], max_tokens=ENDLESS, stream=True) as stream:
        next(stream)
    slow.wait_for("Cancel")


def test_an_exception_in_the_block_cancels(slow: Rig) -> None:
    stream = slow.client().generate([10], max_tokens=ENDLESS, stream=True)

    def fail_in_block() -> None:
        with stream:
            next(stream)
            raise LookupError

    with pytest.raises(LookupError):
        fail_in_block()
    slow.wait_for("Cancel")


def test_leaving_the_block_after_the_end_keeps_the_reply(client: Client, rig: Rig) -> None:
    with client.generate([10, 20], max_tokens=3, stream=True) as stream:
        chunks = list(stream)
    assert stream.reply.token_ids == tuple(token for chunk in chunks for token in chunk.token_ids)
    client.info()
    assert rig.messages("Cancel") == []


def test_a_passed_deadline_stops_the_engine(slow: Rig) -> None:
    begin = time.monotonic()
    with pytest.raises(DeadlineExceededError):
        slow.client().generate([10, 20], max_tokens=ENDLESS, timeout=0.3)
    assert time.monotonic() - begin >= 0.3
    slow.wait_for("Cancel")


def test_a_deadline_passes_while_the_engine_is_silent(rig: Rig, client: Client) -> None:
    with pytest.raises(DeadlineExceededError):
        client.generate([Command.SILENT], timeout=0.2)
    rig.wait_for("Cancel")


def test_a_client_that_goes_away_is_cancelled(slow: Rig) -> None:
    client = slow.client()
    stream = client.generate([10, 20], max_tokens=ENDLESS, stream=True)
    next(stream)
    client.close()
    slow.wait_for("Cancel")


def test_cancelled_requests_hold_no_adapter(slow: Rig) -> None:
    client = slow.client()
    with client.generate([10], adapter="alpha", max_tokens=ENDLESS, stream=True) as stream:
        next(stream)
        assert {info.name: info.users for info in client.adapters.list()} == {"alpha": 1, "beta": 0}
    wait_until(lambda: client.adapters.list()[0].users == 0, "the hold on the adapter ends")

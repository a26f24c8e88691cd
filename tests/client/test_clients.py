"""Both clients against a FakeServer that fails as it is told: each test runs with either."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time

import pytest

from segue import AsyncClient, Client, RetryPolicy, SegueError
from segue.errors import (
    DeadlineExceededError,
    EngineUnavailableError,
    InternalError,
    OverloadedError,
    RequestCancelledError,
)
from tests.client.rig import (
    TEXTS,
    UNAVAILABLE,
    WAIT_SECONDS,
    Driver,
    Failure,
    FakeClock,
    Setting,
    fake_server,
    overloaded,
)

DOWN = Failure(error=UNAVAILABLE)
POLICY = RetryPolicy(attempts=3, initial_backoff_seconds=1, multiplier=2)


@pytest.mark.parametrize("failure", [DOWN, Failure(error=UNAVAILABLE, accepted=True)], ids=["at once", "accepted"])
def test_a_request_is_sent_again(driver: Driver, failure: Failure) -> None:
    setting = Setting(retry=POLICY, drawn=0.5)
    with fake_server(failure, failure) as server:
        reply = driver.ask(server.target, setting)
    assert (reply.text, reply.adapter_version) == ("one two", "v1")
    assert setting.clock.pauses == [0.5, 1.0]
    assert len(set(server.request_ids)) == 3
    assert reply.request_id == server.request_ids[-1]


def test_a_stream_is_sent_again_before_its_first_chunk(driver: Driver) -> None:
    setting = Setting(retry=POLICY)
    received: list[str] = []
    with fake_server(DOWN, Failure(error=UNAVAILABLE, accepted=True)) as server:
        reply = driver.stream(server.target, setting, received)
    assert tuple(received) == TEXTS
    assert reply.request_id == server.request_ids[-1]
    assert setting.clock.pauses == [1, 2]


def test_nothing_is_sent_again_after_the_first_chunk(driver: Driver) -> None:
    setting = Setting(retry=POLICY)
    received: list[str] = []
    late = Failure(error=UNAVAILABLE, chunks=1)
    with fake_server(late, late) as server:
        with pytest.raises(EngineUnavailableError, match="died"):
            driver.stream(server.target, setting, received)
        with pytest.raises(EngineUnavailableError, match="died"):
            driver.ask(server.target, setting)
    assert received == ["one "]
    assert len(server.request_ids) == 2
    assert setting.clock.pauses == []


def test_an_id_of_the_callers_is_kept(driver: Driver) -> None:
    with fake_server(DOWN, DOWN) as server:
        reply = driver.ask(server.target, Setting(), request_id="mine")
    assert server.request_ids == ["mine"] * 3
    assert reply.request_id == "mine"


def test_the_attempts_end(driver: Driver) -> None:
    setting = Setting(retry=POLICY)
    with fake_server(*[DOWN] * 3) as server, pytest.raises(EngineUnavailableError) as caught:
        driver.ask(server.target, setting)
    assert len(server.request_ids) == 3
    assert isinstance(caught.value.__cause__, EngineUnavailableError)
    assert setting.clock.pauses == [1, 2]


def test_one_attempt_is_no_retry(driver: Driver) -> None:
    with fake_server(DOWN) as server, pytest.raises(EngineUnavailableError):
        driver.ask(server.target, Setting(retry=RetryPolicy(attempts=1)))
    assert len(server.request_ids) == 1


def test_the_servers_time_to_come_again_is_kept(driver: Driver) -> None:
    setting = Setting(retry=POLICY, drawn=0.5)
    with fake_server(Failure(error=overloaded(2.5))) as server:
        assert driver.ask(server.target, setting).text == "one two"
    assert setting.clock.pauses == [3.0]


@pytest.mark.parametrize(
    "error",
    [overloaded(None), InternalError("no"), RequestCancelledError("aborted"), DeadlineExceededError("late")],
    ids=lambda error: error.reason,
)
def test_other_errors_are_raised_at_once(driver: Driver, error: SegueError) -> None:
    setting = Setting()
    with fake_server(Failure(error=error, accepted=True)) as server, pytest.raises(type(error)):
        driver.stream(server.target, setting, [])
    assert len(server.request_ids) == 1
    assert setting.clock.pauses == []


def test_each_attempt_gets_the_time_that_is_left(driver: Driver) -> None:
    """The FakeClock moves by 100 and by 200 seconds, the server's only by what the calls take."""
    retry = RetryPolicy(initial_backoff_seconds=100, max_backoff_seconds=200)
    with fake_server(DOWN, DOWN) as server:
        driver.ask(server.target, Setting(retry=retry), timeout=1000)
    assert server.bounds_seconds == pytest.approx([1000, 900, 700], abs=WAIT_SECONDS)


def test_the_last_error_is_raised_when_no_time_is_left_to_wait(driver: Driver) -> None:
    setting = Setting(retry=POLICY)
    with fake_server(*[DOWN] * 3) as server, pytest.raises(EngineUnavailableError):
        driver.ask(server.target, setting, timeout=2.5)
    assert len(server.request_ids) == 2
    assert setting.clock.pauses == [1]


def test_the_last_error_is_raised_after_oversleeping(driver: Driver) -> None:
    setting = Setting(retry=POLICY, clock=FakeClock(oversleep_seconds=20))
    with fake_server(DOWN) as server, pytest.raises(EngineUnavailableError):
        driver.stream(server.target, setting, [], timeout=10)
    assert len(server.request_ids) == 1


def test_a_passed_deadline_is_no_reason_to_send_again(driver: Driver) -> None:
    with fake_server() as server:
        server.answers_forever = True
        with pytest.raises(DeadlineExceededError):
            driver.ask(server.target, Setting(), timeout=0.3)
    assert len(server.request_ids) == 1


def test_leaving_the_block_cancels(driver: Driver) -> None:
    with fake_server() as server:
        server.answers_forever = True
        driver.leave_after_first_chunk(server.target, Setting())
        assert server.ended.wait(WAIT_SECONDS)
    assert len(server.request_ids) == 1


def test_a_server_that_is_away_is_tried_so_often(driver: Driver) -> None:
    setting = Setting(retry=POLICY)
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        with pytest.raises(EngineUnavailableError):
            driver.ask(f"127.0.0.1:{bound.getsockname()[1]}", setting)
    assert setting.clock.pauses == [1, 2]


def test_a_server_that_comes_back_is_found(driver: Driver) -> None:
    """gRPC connects anew soon enough for the next attempts: by default it would wait for longer than all of them."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
    with contextlib.ExitStack() as servers:

        def start_then_wait() -> None:
            if len(clock.pauses) == 1:
                servers.enter_context(fake_server(port=port))
            time.sleep(0.1)

        clock = FakeClock(meanwhile=start_then_wait)
        setting = Setting(retry=RetryPolicy(attempts=6), clock=clock)
        assert driver.ask(f"127.0.0.1:{port}", setting).text == "one two"
    assert clock.pauses


def test_every_unary_call(driver: Driver) -> None:
    setting = Setting()
    with fake_server() as server:
        assert driver.info(server.target, setting).model == "fake"
        assert [adapter.name for adapter in driver.adapters(server.target, setting, "list")] == ["a", "b"]
        assert driver.adapters(server.target, setting, "load", "c", "folder", preload=True).name == "c"
        driver.adapters(server.target, setting, "unload", "c")
        driver.adapters(server.target, setting, "evict", "c")
        driver.abort(server.target, setting, "mine")
    assert server.calls == ["info", "list", "load c folder True", "unload c", "evict c", "abort mine"]


@pytest.mark.parametrize(("method", "arguments"), [("list", ()), ("load", ("c",)), ("evict", ("c",))])
def test_what_may_be_done_twice_is_called_again(driver: Driver, method: str, arguments: tuple[str, ...]) -> None:
    setting = Setting(retry=POLICY)
    with fake_server(DOWN, DOWN) as server:
        driver.adapters(server.target, setting, method, *arguments, timeout=60)
        assert driver.info(server.target, setting).model == "fake"
    assert len(server.calls) == 4
    assert setting.clock.pauses == [1, 2]


def test_what_would_not_be_found_again_is_called_once(driver: Driver) -> None:
    setting = Setting(retry=POLICY)
    with fake_server(DOWN, DOWN) as server:
        with pytest.raises(EngineUnavailableError):
            driver.adapters(server.target, setting, "unload", "c")
        with pytest.raises(EngineUnavailableError):
            driver.abort(server.target, setting, "mine")
    assert server.calls == ["unload c", "abort mine"]
    assert setting.clock.pauses == []


def test_an_overloaded_unary_call_keeps_within_its_time(driver: Driver) -> None:
    setting = Setting(retry=POLICY)
    with fake_server(Failure(error=overloaded(5))) as server, pytest.raises(OverloadedError):
        driver.info(server.target, setting, timeout=4)
    assert server.calls == ["info"]
    assert setting.clock.pauses == []


def test_the_pauses_are_real_by_default(runner: asyncio.Runner) -> None:
    retry = RetryPolicy(initial_backoff_seconds=0.01)

    async def ask(target: str) -> str:
        async with AsyncClient(target, retry=retry) as client:
            return (await client.generate("x")).text

    with fake_server(DOWN, DOWN) as server:
        with Client(server.target, retry=retry) as client:
            assert client.generate("x").text == "one two"
        server.failures += [DOWN, DOWN]
        assert runner.run(ask(server.target)) == "one two"
    assert len(server.request_ids) == 6

"""What only asyncio has: cancelled tasks, and cancelled calls that are no cancelled tasks."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from segue import AsyncClient, InvalidRequestError, RequestCancelledError, RetryPolicy
from tests.client.rig import UNAVAILABLE, WAIT_SECONDS, Failure, FakeClock, FakeServer, fake_server

Use = Callable[[AsyncClient], Awaitable[object]]


async def ended(server: FakeServer) -> bool:
    """Wait until the server's side of the call has ended."""
    return await asyncio.to_thread(server.ended.wait, WAIT_SECONDS)


async def whole(client: AsyncClient) -> None:
    await client.generate("x")


async def streamed(client: AsyncClient) -> None:
    async with client.generate("x", stream=True) as stream:
        async for _ in stream:
            continue


async def without_block(client: AsyncClient) -> None:
    async for _ in client.generate("x", stream=True):
        continue


@pytest.mark.parametrize("use", [whole, streamed, without_block])
def test_cancelling_the_task_cancels_the_call(runner: asyncio.Runner, use: Use) -> None:
    async def run(server: FakeServer) -> None:
        async with AsyncClient(server.target) as client:
            task = asyncio.ensure_future(use(client))
            await asyncio.to_thread(server.began.wait, WAIT_SECONDS)
            task.cancel("enough")
            with pytest.raises(asyncio.CancelledError) as caught:
                await task
            assert caught.value.args == ("enough",)
            assert task.cancelled()
            assert await ended(server)

    with fake_server() as server:
        server.answers_forever = True
        runner.run(run(server))
    assert len(server.request_ids) == 1


def test_a_timeout_of_asyncio_is_a_timeout(runner: asyncio.Runner) -> None:
    async def run(server: FakeServer) -> None:
        async with AsyncClient(server.target) as client:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await client.generate("x")
            assert await ended(server)

    with fake_server() as server:
        server.answers_forever = True
        runner.run(run(server))


def test_a_task_is_cancelled_in_a_pause(runner: asyncio.Runner) -> None:
    sleeping = asyncio.Event()

    async def sleep_forever(_: float) -> None:
        sleeping.set()
        await asyncio.Event().wait()

    async def run(target: str) -> None:
        async with AsyncClient(target, sleep=sleep_forever) as client:
            task = asyncio.ensure_future(whole(client))
            await sleeping.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    with fake_server(Failure(error=UNAVAILABLE)) as server:
        runner.run(run(server.target))
    assert len(server.request_ids) == 1


def test_another_task_stops_the_stream(runner: asyncio.Runner) -> None:
    async def run(server: FakeServer) -> None:
        async with AsyncClient(server.target) as client, client.generate("x", stream=True) as stream:
            await anext(stream)
            asyncio.get_running_loop().call_later(0.05, stream.cancel)
            async for _ in stream:
                continue
            with pytest.raises(RequestCancelledError):
                stream.reply.text  # noqa: B018
            assert await ended(server)

    with fake_server() as server:
        server.answers_forever = True
        runner.run(run(server))


def test_a_stream_that_is_stopped_in_a_pause_is_not_sent_again(runner: asyncio.Runner) -> None:
    clock = FakeClock()

    async def run(target: str) -> None:
        async def stop(seconds: float) -> None:
            stream.cancel()
            await clock.async_sleep(seconds)

        async with AsyncClient(target, sleep=stop, retry=RetryPolicy(initial_backoff_seconds=1)) as client:
            stream = client.generate("x", stream=True)
            assert [chunk async for chunk in stream] == []
            with pytest.raises(RequestCancelledError):
                stream.reply.text  # noqa: B018

    with fake_server(Failure(error=UNAVAILABLE)) as server:
        runner.run(run(server.target))
    assert len(server.request_ids) == 1
    assert len(clock.pauses) == 1


@pytest.mark.parametrize("use", [whole, streamed])
def test_closing_the_client_fails_what_runs(runner: asyncio.Runner, use: Use) -> None:
    async def run(server: FakeServer) -> None:
        client = AsyncClient(server.target)
        task = asyncio.ensure_future(use(client))
        await asyncio.to_thread(server.began.wait, WAIT_SECONDS)
        await client.close()
        with pytest.raises(RequestCancelledError):
            await task

    with fake_server() as server:
        server.answers_forever = True
        runner.run(run(server))


def test_closing_the_client_fails_what_pauses(runner: asyncio.Runner) -> None:
    async def run(target: str) -> None:
        async def close(_: float) -> None:
            await client.close()

        client = AsyncClient(target, sleep=close)
        with pytest.raises(RequestCancelledError):
            await client.generate("x")

    with fake_server(Failure(error=UNAVAILABLE)) as server:
        runner.run(run(server.target))
    assert len(server.request_ids) == 1


def test_what_cannot_be_sent_is_refused_by_the_await(runner: asyncio.Runner) -> None:
    async def run() -> None:
        async with AsyncClient("127.0.0.1:1") as client:
            refused = client.generate("x", max_tokens=-1)
            with pytest.raises(InvalidRequestError, match="max_tokens"):
                await refused
            with pytest.raises(InvalidRequestError, match="max_tokens"):
                client.generate("x", max_tokens=-1, stream=True)

    runner.run(run())


def test_without_a_running_loop_there_is_no_client() -> None:
    with pytest.raises(RuntimeError, match="no running event loop"):
        AsyncClient("127.0.0.1:1")

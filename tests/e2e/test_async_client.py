"""The asynchronous client and the real server: many streams at once, and cancels that free the pages."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from segue import AsyncClient, AsyncGenerateStream, Client, Reply, RequestCancelledError
from segue.types import Tier
from tests.e2e.live import ASSETS, LiveServer, live_server, wait_until

PROMPT = "Tell me about the fox."
STREAMS = 32
NEW_TOKENS = 16
ENDLESS_TOKENS = 1500
ADAPTERS = ASSETS / "adapters"
NAMES = (None, *sorted(path.name for path in ADAPTERS.iterdir()))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with live_server(tmp_path_factory.mktemp("async") / "server", ADAPTERS) as running:
        yield running
        wait_until(running.is_idle, "every page is free or an adapter's")
    assert running.process.returncode == 0, running.log.read_text()
    assert "Traceback" not in running.log.read_text(), running.log.read_text()


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    """One event loop for all tests: gRPC's asyncio side dislikes many."""
    with asyncio.Runner() as runner:
        yield runner


def job(index: int) -> tuple[str, str | None]:
    """The prompt and the adapter of one of the streams."""
    return f"{PROMPT} {'Once more, please. ' * (index % 5)}".strip(), NAMES[index % len(NAMES)]


def ask(client: Client, index: int) -> Reply:
    prompt, adapter = job(index)
    return client.generate(prompt, adapter=adapter, max_tokens=NEW_TOKENS, temperature=0.0, timeout=60)


async def stream(client: AsyncClient, index: int) -> Reply:
    prompt, adapter = job(index)
    async with client.generate(
        prompt, adapter=adapter, max_tokens=NEW_TOKENS, temperature=0.0, timeout=60, stream=True
    ) as answer:
        text = "".join([chunk.text async for chunk in answer])
    assert answer.reply.text == text
    return answer.reply


async def rest(answer: AsyncGenerateStream) -> None:
    """Iterate to the end."""
    async for _ in answer:
        continue


async def busy(server: LiveServer) -> None:
    """Wait until a request holds pages."""
    await asyncio.to_thread(wait_until, lambda: server.state().pages.kv > 0, "a request holds pages")


async def idle(server: LiveServer) -> None:
    await asyncio.to_thread(wait_until, server.is_idle, "every page is free or an adapter's")


def test_many_streams_at_once_equal_the_synchronous_answers(server: LiveServer, runner: asyncio.Runner) -> None:
    async def run() -> list[Reply]:
        async with AsyncClient(server.address) as client:
            for info in await client.adapters.list():
                await client.adapters.evict(info.name)
            while any(info.tier is not Tier.DISK for info in await client.adapters.list()):
                await asyncio.sleep(0.02)
            return await asyncio.gather(*(stream(client, index) for index in range(STREAMS)))

    streamed = runner.run(run())
    with server.client() as client, ThreadPoolExecutor(4) as threads:
        asked = list(threads.map(lambda index: ask(client, index), range(STREAMS)))
    for one, other in zip(streamed, asked, strict=True):
        assert (one.token_ids, one.text, one.finish_reason) == (other.token_ids, other.text, other.finish_reason)
        assert one.adapter_version == other.adapter_version
        assert one.usage.completion_tokens == other.usage.completion_tokens
    assert len({reply.request_id for reply in (*streamed, *asked)}) == 2 * STREAMS


def test_leaving_the_block_frees_the_pages(server: LiveServer, runner: asyncio.Runner) -> None:
    async def run() -> None:
        async with AsyncClient(server.address) as client:
            async with client.generate(
                PROMPT, adapter="shout", max_tokens=ENDLESS_TOKENS, ignore_eos=True, stream=True
            ) as answer:
                await anext(answer)
                await busy(server)
            await idle(server)

    runner.run(run())


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "streamed"])
def test_cancelling_the_task_frees_the_pages(server: LiveServer, runner: asyncio.Runner, whole: bool) -> None:
    async def endless(client: AsyncClient) -> None:
        if whole:
            await client.generate(PROMPT, adapter="json", max_tokens=ENDLESS_TOKENS, ignore_eos=True)
        else:
            await rest(client.generate(PROMPT, max_tokens=ENDLESS_TOKENS, ignore_eos=True, stream=True))

    async def run() -> None:
        async with AsyncClient(server.address) as client:
            task = asyncio.ensure_future(endless(client))
            await busy(server)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await idle(server)

    runner.run(run())


def test_an_aborted_request_fails_and_frees_the_pages(server: LiveServer, runner: asyncio.Runner) -> None:
    async def run() -> None:
        async with AsyncClient(server.address) as client:
            answer = client.generate(PROMPT, max_tokens=ENDLESS_TOKENS, ignore_eos=True, stream=True)
            await anext(answer)
            await client.abort(answer.request_id)
            with pytest.raises(RequestCancelledError):
                await rest(answer)
            await idle(server)

    runner.run(run())


def test_adapters_and_info(server: LiveServer, runner: asyncio.Runner) -> None:
    async def run() -> None:
        async with AsyncClient(server.address) as client:
            assert (await client.info()).max_lora_rank > 0
            captain = await client.adapters.load("captain", "pirate")
            assert captain.name == "captain"
            assert "captain" in [info.name for info in await client.adapters.list()]
            await client.adapters.unload("captain")
            assert "captain" not in [info.name for info in await client.adapters.list()]

    runner.run(run())

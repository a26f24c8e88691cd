"""The real server, driven by the real SDK: answers, cancels, replaced adapters."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from segue import Client
from segue.errors import AdapterNotFoundError, DeadlineExceededError
from segue.types import Reply, Tier
from segue.v1 import generation_pb2 as pb
from segue.v1.server_pb2 import WatchStateResponse
from tests.e2e.live import ASSETS, LiveServer, Reference, live_server, wait_until

PROMPT = "Tell me about the fox."
LONG_PROMPT = f"{PROMPT} {'Once more, please. ' * 12}".strip()
NEW_TOKENS = 24
ENDLESS_TOKENS = 1500
ADAPTERS = ASSETS / "adapters"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    root = tmp_path_factory.mktemp("e2e")
    shutil.copytree(ADAPTERS, root / "adapters")
    with live_server(root / "server", root / "adapters") as running:
        yield running
        wait_until(running.is_idle, "every page is free or an adapter's")
    log = running.log.read_text()
    assert running.process.returncode == 0, log
    assert "Traceback" not in log, log


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference()


@pytest.fixture
def client(server: LiveServer) -> Iterator[Client]:
    with server.client() as client:
        yield client


def ask(client: Client, adapter: str | None, prompt: str = PROMPT, new_tokens: int = NEW_TOKENS) -> Reply:
    with client.generate(
        prompt, adapter=adapter, max_tokens=new_tokens, ignore_eos=True, temperature=0.0, timeout=60, stream=True
    ) as stream:
        chunks = list(stream)
    assert "".join(chunk.text for chunk in chunks) == stream.reply.text
    return stream.reply


def in_memory(server: LiveServer) -> set[str]:
    """The adapters whose weights are all on the device or in host memory."""
    return {item.name for item in server.state().residency.adapters if item.tier != pb.TIER_DISK}


def held(state: WatchStateResponse) -> tuple[int, int, int]:
    """Pages of adapters, pages of KV that is kept, and free bytes of the host store."""
    return state.pages.adapter, state.pages.cached, state.residency.host_free_bytes


def test_a_burst_of_streams_equals_the_reference(server: LiveServer, reference: Reference) -> None:
    names = [None, "brief", "json", "list", "pirate", "polite", "rhyme", "yoda"]
    prompts = [f"{PROMPT} {'Once more, please. ' * index}".strip() for index in range(len(names))]
    with server.client() as client, ThreadPoolExecutor(len(names)) as threads:
        for info in client.adapters.list():
            client.adapters.evict(info.name)
        wait_until(lambda: all(info.tier is Tier.DISK for info in client.adapters.list()), "every adapter is cold")
        replies = list(threads.map(lambda name, prompt: ask(client, name, prompt), names, prompts))
    for name, prompt, reply in zip(names, prompts, replies, strict=True):
        reference.compare(reply, None if name is None else ADAPTERS / name, prompt, NEW_TOKENS)
        assert reply.timing.tier is (Tier.NONE if name is None else Tier.DISK)
    assert any(reply.timing.cpu_layers for reply in replies), "no cold prefill had help of the CPU"
    wait_until(server.is_idle, "every page is free or an adapter's")


def test_cancelled_streams_give_their_pages_back(server: LiveServer, client: Client, reference: Reference) -> None:
    streams = [
        client.generate(PROMPT, adapter=name, max_tokens=ENDLESS_TOKENS, ignore_eos=True, stream=True)
        for name in (None, "shout", "shout", "json")
    ]
    for stream in streams[:-1]:
        next(stream)
    assert server.state().pages.kv > 0
    for stream in streams:
        stream.cancel()
    wait_until(server.is_idle, "cancelled requests hold no pages")
    reference.compare(ask(client, "shout"), ADAPTERS / "shout", PROMPT, NEW_TOKENS)


def test_a_passed_deadline_gives_the_pages_back(server: LiveServer, client: Client, reference: Reference) -> None:
    client.adapters.evict("rhyme")
    for name in (None, "rhyme"):
        with pytest.raises(DeadlineExceededError):
            client.generate(PROMPT, adapter=name, max_tokens=ENDLESS_TOKENS, ignore_eos=True, timeout=0.25)
    wait_until(server.is_idle, "requests past their deadline hold no pages")
    reference.compare(ask(client, "rhyme"), ADAPTERS / "rhyme", PROMPT, NEW_TOKENS)


def exchange_folders(voice: Path, successor: Path) -> None:
    voice.rename(successor.with_name("replaced"))
    successor.rename(voice)


def overwrite_files(voice: Path, successor: Path) -> None:
    for file in successor.iterdir():
        (voice / file.name).write_bytes(file.read_bytes())


@pytest.mark.parametrize("replace", [exchange_folders, overwrite_files])
def test_an_adapter_replaced_while_in_use(
    server: LiveServer, client: Client, reference: Reference, tmp_path: Path, replace: Callable[[Path, Path], None]
) -> None:
    """The old content's KV is kept for reuse when the new content comes: it is not reused."""
    name = replace.__name__
    voice = Path(shutil.copytree(ADAPTERS / "pirate", server.adapters_dir / name))
    successor = Path(shutil.copytree(ADAPTERS / "brief", tmp_path / "successor"))
    new_tokens = 200
    asked = [ask(client, name, LONG_PROMPT) for _ in range(2)]
    with client.generate(
        LONG_PROMPT, adapter=name, max_tokens=new_tokens, ignore_eos=True, temperature=0.0, timeout=60, stream=True
    ) as stream:
        next(stream)
        replace(voice, successor)
        replaced = [ask(client, name, LONG_PROMPT) for _ in range(2)]
        list(stream)
    for reply in asked:
        reference.compare(reply, ADAPTERS / "pirate", LONG_PROMPT, NEW_TOKENS)
    for reply in replaced:
        reference.compare(reply, ADAPTERS / "brief", LONG_PROMPT, NEW_TOKENS)
    reference.compare(stream.reply, ADAPTERS / "pirate", LONG_PROMPT, new_tokens)
    assert {reply.adapter_version for reply in asked} == {stream.reply.adapter_version}
    assert stream.reply.adapter_version not in {reply.adapter_version for reply in replaced}
    for first, second in (asked, replaced):
        assert first.usage.cached_prompt_tokens == 0 < second.usage.cached_prompt_tokens


def test_an_adapter_unloaded_while_in_use(server: LiveServer, client: Client, reference: Reference) -> None:
    """Its user ends with the right answer; then its pages, its KV and its bytes in host memory are free again."""
    client.adapters.unload("polite")
    wait_until(server.is_idle, "nothing runs")
    wait_until(lambda: "polite" not in in_memory(server), "nothing of it is in memory")
    before = server.state()
    client.adapters.load("polite")
    new_tokens = 300
    with client.generate(
        LONG_PROMPT, adapter="polite", max_tokens=new_tokens, ignore_eos=True, temperature=0.0, timeout=60, stream=True
    ) as stream:
        next(stream)
        client.adapters.unload("polite")
        with pytest.raises(AdapterNotFoundError):
            ask(client, "polite")
        meanwhile = server.state()
        rest = list(stream)
    assert len(rest) > 1
    reference.compare(stream.reply, ADAPTERS / "polite", LONG_PROMPT, new_tokens)
    (used,) = [adapter for adapter in meanwhile.residency.adapters if adapter.name == "polite"]
    assert used.users == 1
    assert meanwhile.pages.adapter > before.pages.adapter
    assert meanwhile.residency.host_free_bytes < before.residency.host_free_bytes
    wait_until(lambda: held(server.state()) == held(before), "everything of it is gone")
    assert "polite" not in in_memory(server)
    client.adapters.load("polite")


def test_an_unloaded_adapter_is_unknown_until_it_is_loaded(client: Client, reference: Reference) -> None:
    reference.compare(ask(client, "list"), ADAPTERS / "list", PROMPT, NEW_TOKENS)
    client.adapters.unload("list")
    with pytest.raises(AdapterNotFoundError):
        ask(client, "list")
    assert "list" not in [info.name for info in client.adapters.list()]
    client.adapters.load("list")
    reference.compare(ask(client, "list"), ADAPTERS / "list", PROMPT, NEW_TOKENS)

"""Everything that the interface promises to refuse, on one channel to the real server, each followed by a good answer.

What the front end did not foresee (INTERNAL) and the queue's place in line are tested with a FakeEngine.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from segue import SLO, Client
from segue.errors import (
    AdapterNotFoundError,
    AdapterPinnedError,
    AdapterRejectedError,
    DeadlineExceededError,
    DuplicateRequestError,
    EngineUnavailableError,
    InvalidRequestError,
    OverloadedError,
    RequestCancelledError,
    RequestNotFoundError,
    SegueError,
    StatusCode,
    UnsafePathError,
    UnsupportedError,
)
from segue.types import AdapterInfo, Tier
from tests.e2e.bad_adapters import MAX_RANK, REJECTED, UNSAFE, write_all
from tests.e2e.live import ASSETS, CONFIG, LiveServer, Reference, live_server, wait_until
from tests.server.values import INVALID, NO_TOKEN

PROMPT = "Tell me about the fox."
NEW_TOKENS = 12
ADAPTERS = ASSETS / "adapters"
MAX_WAITING = 40
# A pool that a request for the whole context does not fit into, and neither do seven modules of rank 64.
SMALL = CONFIG.replace("pages = 512", f"pages = 80\nmax_waiting = {MAX_WAITING}\nmax_lora_rank = {MAX_RANK}")
PINNED = 'pinned_adapters = ["shout"]\n'
ENDLESS: dict[str, Any] = {"max_tokens": 600, "ignore_eos": True}

Refused = Callable[[LiveServer, Client], object]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    root = tmp_path_factory.mktemp("refusals")
    for name in ("yoda", "shout"):
        shutil.copytree(ADAPTERS / name, root / "adapters" / name)
    write_all(root / "adapters", ADAPTERS / "yoda")
    with live_server(root / "server", root / "adapters", config=PINNED + SMALL) as running:
        yield running
        wait_until(running.is_idle, "every request has given its pages back")
    log = running.log.read_text()
    assert running.process.returncode == 0, log
    assert "Traceback" not in log, log


@pytest.fixture(scope="module")
def client(server: LiveServer) -> Iterator[Client]:
    """One channel for all."""
    with server.client() as client:
        yield client


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference()


def asking(prompt: Any = PROMPT, **options: Any) -> Refused:
    return lambda _, client: client.generate(prompt, timeout=60, **options)


def loading(path: str) -> Refused:
    return lambda _, client: client.adapters.load("new", path)


def duplicate(_: LiveServer, client: Client) -> None:
    with client.generate(PROMPT, request_id="mine", stream=True, **ENDLESS) as stream:
        next(stream)
        client.generate(PROMPT, request_id="mine")


def deadline(_: LiveServer, client: Client) -> None:
    client.generate(PROMPT, timeout=0.2, n=3, **ENDLESS)


def aborted(_: LiveServer, client: Client) -> None:
    with client.generate(PROMPT, request_id="mine", stream=True, n=3, **ENDLESS) as stream:
        next(stream)
        threading.Timer(0.05, client.abort, ["mine"]).start()
        list(stream)


def client_gone(server: LiveServer, _: Client) -> None:
    with server.client() as other:
        stream = other.generate(PROMPT, stream=True, **ENDLESS)
        next(stream)
    wait_until(server.is_idle, "its request has ended")
    list(stream)


def engine_killed(server: LiveServer, client: Client) -> None:
    with client.generate(PROMPT, adapter="yoda", stream=True, **ENDLESS) as stream:
        next(stream)
        server.engine().kill()
        list(stream)


# Values are read when the weights are, and a tokenizer when there is something to tokenise.
FOUND_LATER = {"nan", "other-vocabulary"}
ROWS: dict[str, tuple[Refused, type[SegueError], StatusCode]] = {
    **{
        f"{index} {field}": (asking(**options), InvalidRequestError, StatusCode.INVALID_ARGUMENT)
        for index, (field, options) in enumerate(INVALID)
    },
    **{
        f"prompt {name}": (asking(prompt), InvalidRequestError, StatusCode.INVALID_ARGUMENT)
        for name, prompt in {
            "empty text": "",
            "no tokens": [],
            "no such token": [10, NO_TOKEN],
            "no role": [{"role": "", "content": "x"}],
            "over the context": "fox " * 4000,
        }.items()
    },
    "over the pool": (asking(max_tokens=1900), InvalidRequestError, StatusCode.INVALID_ARGUMENT),
    "unknown adapter": (asking(adapter="nobody"), AdapterNotFoundError, StatusCode.NOT_FOUND),
    "unknown version": (
        asking(adapter="yoda", adapter_version="nothing"),
        AdapterNotFoundError,
        StatusCode.NOT_FOUND,
    ),
    "unknown request": (lambda _, client: client.abort("nobody"), RequestNotFoundError, StatusCode.NOT_FOUND),
    **{
        f"name {name!r}": (asking(adapter=name), UnsafePathError, StatusCode.INVALID_ARGUMENT)
        for name in ("..", "../server", "/etc", "a\0b", "https://host/yoda", *UNSAFE)
    },
    **{
        f"path {path!r}": (loading(path), UnsafePathError, StatusCode.INVALID_ARGUMENT)
        for path in ("../../model", "/etc", "file:///etc", "yoda/../yoda", "a\0b", *UNSAFE)
    },
    **{
        f"adapter {name}": (asking(adapter=name), AdapterRejectedError, StatusCode.FAILED_PRECONDITION)
        for name in REJECTED
    },
    **{
        f"load {name}": (loading(name), AdapterRejectedError, StatusCode.FAILED_PRECONDITION)
        for name in sorted(REJECTED.keys() - FOUND_LATER)
    },
    "evict pinned": (
        lambda _, client: client.adapters.evict("shout"),
        AdapterPinnedError,
        StatusCode.FAILED_PRECONDITION,
    ),
    "queue full": (asking(n=128, **ENDLESS), OverloadedError, StatusCode.RESOURCE_EXHAUSTED),
    "slo": (asking(slo=SLO(ttft_ms=1, reject_on_miss=True)), UnsupportedError, StatusCode.UNIMPLEMENTED),
    "priority": (asking(priority=1), UnsupportedError, StatusCode.UNIMPLEMENTED),
    "duplicate": (duplicate, DuplicateRequestError, StatusCode.ALREADY_EXISTS),
    "deadline": (deadline, DeadlineExceededError, StatusCode.DEADLINE_EXCEEDED),
    "aborted": (aborted, RequestCancelledError, StatusCode.CANCELLED),
    "client gone": (client_gone, RequestCancelledError, StatusCode.CANCELLED),
    "engine killed": (engine_killed, EngineUnavailableError, StatusCode.UNAVAILABLE),
}


def test_a_pinned_adapter_stays_on_the_device(client: Client) -> None:
    def shout() -> AdapterInfo:
        (found,) = [info for info in client.adapters.list() if info.name == "shout"]
        return found

    assert (shout().tier, shout().pinned) == (Tier.DEVICE, True)
    client.generate(PROMPT, adapter="yoda", max_tokens=900, ignore_eos=True, timeout=60)
    assert shout().tier is Tier.DEVICE


@pytest.mark.parametrize(("refused", "error", "code"), ROWS.values(), ids=list(ROWS))
def test_a_refusal_hinders_nobody(
    server: LiveServer,
    client: Client,
    reference: Reference,
    refused: Refused,
    error: type[SegueError],
    code: StatusCode,
) -> None:
    with pytest.raises(error) as caught:
        refused(server, client)
    assert caught.type is error
    assert caught.value.code is code
    assert "\n" not in caught.value.message
    if code is StatusCode.UNAVAILABLE:
        wait_until(server.is_ready, "a new engine serves")
    reply = client.generate(PROMPT, adapter="yoda", max_tokens=NEW_TOKENS, ignore_eos=True, timeout=60)
    reference.compare(reply, ADAPTERS / "yoda", PROMPT, NEW_TOKENS)


def test_a_refusal_names_each_field_and_when_to_come_again(client: Client) -> None:
    with pytest.raises(InvalidRequestError) as invalid:
        client.generate(PROMPT, top_p=7.0, max_tokens=0, logit_bias={NO_TOKEN: 1.0})
    fields = [violation.field for violation in invalid.value.violations]
    assert fields == ["sampling.top_p", "sampling.max_tokens", "sampling.logit_bias"]
    with pytest.raises(OverloadedError) as overloaded:
        client.generate(PROMPT, n=128, **ENDLESS)
    assert overloaded.value.retry_after_seconds == 1.0

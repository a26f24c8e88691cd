"""Everything that the interface promises to refuse, on one channel to the real server, each followed by a good answer.

What the front end did not foresee (INTERNAL) and the queue's place in line are tested with a FakeEngine.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

from segue import SLO, Client
from segue.client.requests import build_generate_request
from segue.client.status import error_of_rpc
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
    SloInfeasibleError,
    StatusCode,
    UnsafePathError,
)
from segue.types import AdapterInfo, Tier
from segue.v1 import generation_pb2_grpc
from tests.e2e.bad_adapters import MAX_RANK, REJECTED, UNSAFE, write_all
from tests.e2e.live import ASSETS, CONFIG, LiveServer, Reference, live_server, wait_until
from tests.server.values import INVALID, NO_TOKEN

PROMPT = "Tell me about the fox."
NEW_TOKENS = 12
ADAPTERS = ASSETS / "adapters"
MAX_WAITING = 40
MAX_RUNNING = 4
QUOTA = 30
# A pool that a request for the whole context does not fit into, and neither do seven modules of rank 64.
SETTINGS = f"""pages = 80
max_waiting = {MAX_WAITING}
max_running = {MAX_RUNNING}
tenant_queue_share = {QUOTA / MAX_WAITING}
max_lora_rank = {MAX_RANK}"""
SMALL = CONFIG.replace("pages = 512", SETTINGS)
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


def slo_never(_: LiveServer, client: Client) -> None:
    """The server has measured what prompts and steps take."""
    client.generate(PROMPT, max_tokens=20, ignore_eos=True)
    client.generate(PROMPT, slo=SLO(tpot_ms=1e-3, reject_on_miss=True))


def slo_not_now(_: LiveServer, client: Client) -> None:
    """All places are taken by answers that are far longer than the target."""
    client.generate(PROMPT, max_tokens=20, ignore_eos=True)
    with client.generate(PROMPT, n=MAX_RUNNING, stream=True, **ENDLESS) as stream:
        for _chunk in range(2 * MAX_RUNNING):
            next(stream)
        client.generate(PROMPT, slo=SLO(ttft_ms=300, reject_on_miss=True))


def over_quota(server: LiveServer, _: Client) -> None:
    """One tenant has its part of the queue, which is not full."""
    with grpc.insecure_channel(server.address) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        request = build_generate_request(PROMPT, {"n": MAX_RUNNING + QUOTA + 1, "max_tokens": 600})
        try:
            list(stub.Generate(request, metadata=(("x-tenant", "flood"),)))
        except grpc.RpcError as error:
            raise error_of_rpc(error) from error


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
    "slo never": (slo_never, SloInfeasibleError, StatusCode.FAILED_PRECONDITION),
    "slo not now": (slo_not_now, OverloadedError, StatusCode.RESOURCE_EXHAUSTED),
    "tenant over quota": (over_quota, OverloadedError, StatusCode.RESOURCE_EXHAUSTED),
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


def test_a_target_that_cannot_be_met_now_says_when_it_could(server: LiveServer, client: Client) -> None:
    """The answers that are in the way take more than a second; without them the same request is served."""
    with pytest.raises(OverloadedError, match="after its target") as refused:
        slo_not_now(server, client)
    assert refused.value.retry_after_seconds is not None
    assert refused.value.retry_after_seconds >= 0.1
    wait_until(server.is_idle, "the answers in the way have ended")
    client.generate(PROMPT, max_tokens=2, slo=SLO(ttft_ms=10_000, reject_on_miss=True))


def test_a_quota_is_told_with_the_time_to_come_again(server: LiveServer, client: Client) -> None:
    with pytest.raises(OverloadedError, match=f"{QUOTA} requests of this tenant .* its quota") as refused:
        over_quota(server, client)
    assert refused.value.retry_after_seconds == 1.0

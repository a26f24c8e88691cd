from __future__ import annotations

from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status

from segue import (
    AdapterNotFoundError,
    AdapterRejectedError,
    Client,
    DuplicateRequestError,
    InternalError,
    InvalidRequestError,
    OverloadedError,
    RequestCancelledError,
    RequestNotFoundError,
    SegueError,
    UnsafePathError,
)
from segue.server import generation
from segue.server.adapters import AdapterDirectory
from segue.v1 import generation_pb2 as pb
from segue.v1 import generation_pb2_grpc
from tests.server.fake_engine import Command
from tests.server.rig import Rig, write_adapter
from tests.server.values import ACCEPTED, INVALID


@pytest.mark.parametrize("options", ACCEPTED, ids=str)
def test_the_ends_of_ranges_are_served(client: Client, options: dict[str, Any]) -> None:
    reply = client.generate([10, 20], **{"max_tokens": 2, **options})
    assert reply.token_ids[:2] == (20, 10)


@pytest.mark.parametrize(("field", "options"), INVALID)
def test_invalid_values_are_refused_by_field(client: Client, field: str, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        client.generate([10, 20], **options)
    assert [violation.field for violation in caught.value.violations] == [field]


def test_all_invalid_values_are_told_together(client: Client) -> None:
    with pytest.raises(InvalidRequestError, match=r"sampling\.top_p.*sampling\.max_tokens") as caught:
        client.generate([10], priority=1, top_p=7.0, max_tokens=0)
    assert len(caught.value.violations) == 2


def test_sizes_of_the_model_are_bounds(client: Client) -> None:
    for field, options in (
        ("sampling.max_tokens", {"max_tokens": 127}),
        ("sampling.stop_token_ids", {"stop_token_ids": [400]}),
        ("sampling.logit_bias", {"logit_bias": {400: 1.0}}),
    ):
        with pytest.raises(InvalidRequestError) as caught:
            client.generate([10, 20], **options)
        assert [violation.field for violation in caught.value.violations] == [field]


def test_a_bias_that_is_refused_is_told_by_its_token(client: Client) -> None:
    with pytest.raises(InvalidRequestError, match=r"sampling\.logit_bias: .* token 7 is nan"):
        client.generate([10], logit_bias={5: 1.0, 7: float("nan")})


@pytest.mark.parametrize(
    ("field", "prompt"),
    [
        ("text", ""),
        ("token_ids", []),
        ("token_ids.ids", [10, 400]),
        ("prompt", [10] * 128),
        ("prompt", "x" * 200),
        ("chat.messages.role", [{"role": "", "content": "x"}]),
    ],
)
def test_prompts_that_cannot_be_served(client: Client, field: str, prompt: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        client.generate(prompt)
    assert [violation.field for violation in caught.value.violations] == [field]


def test_a_prompt_is_required(rig: Rig) -> None:
    with grpc.insecure_channel(rig.target) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Generate(pb.GenerateRequest()))
        with pytest.raises(grpc.RpcError) as unknown_value:
            list(stub.Generate(pb.GenerateRequest(text="x", slo=pb.Slo(on_miss=9))))  # type: ignore[arg-type]
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "prompt" in (caught.value.details() or "")
    assert unknown_value.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("adapter", "error"),
    [
        ("unknown", AdapterNotFoundError),
        ("../alpha", UnsafePathError),
        ("..", UnsafePathError),
        ("a\0b", UnsafePathError),
        ("/etc", UnsafePathError),
        ("https://host/alpha", UnsafePathError),
        ("link", UnsafePathError),
    ],
)
def test_adapters_that_are_not_there_or_not_inside(
    rig: Rig, client: Client, adapter: str, error: type[SegueError]
) -> None:
    (rig.adapters_dir / "link").symlink_to(rig.model_dir)
    with pytest.raises(error) as caught:
        client.generate([10], adapter=adapter)
    assert type(caught.value) is error


def test_an_adapter_that_cannot_be_served_does_not_stop_the_others(rig: Rig, client: Client) -> None:
    write_adapter(rig.adapters_dir / "wide", rank=65)
    with pytest.raises(AdapterRejectedError, match="rank 65 is over the limit of 64"):
        client.generate([10], adapter="wide")
    assert client.generate([10], adapter="alpha", max_tokens=1).token_ids == (10,)


def test_a_version_that_the_engine_rejects_is_refused_until_its_content_changes(rig: Rig, client: Client) -> None:
    for _ in range(2):
        with pytest.raises(AdapterRejectedError, match="layer 0 q_proj has NaN"):
            client.generate([Command.REJECT_VERSION], adapter="alpha")
    assert len(rig.messages("Submit")) == 1
    (rig.adapters_dir / "alpha").rename(rig.adapters_dir.parent / "old")
    write_adapter(rig.adapters_dir / "alpha", rank=8)
    assert client.generate([10], adapter="alpha", max_tokens=1).token_ids == (10,)


def test_a_live_request_id_is_taken_for_its_caller_alone(rig: Rig, client: Client) -> None:
    other = rig.client()
    with client.generate([Command.SILENT], request_id="mine", stream=True):
        rig.wait_for("Submit")
        with pytest.raises(DuplicateRequestError) as caught:
            client.generate([10], request_id="mine")
        assert caught.value.request_id == "mine"
        assert other.generate([10], request_id="mine", max_tokens=1).token_ids == (10,)
    rig.wait_for("Cancel")
    assert client.generate([10], request_id="mine", max_tokens=1).token_ids == (10,)


def test_abort_ends_the_callers_own_request(rig: Rig, client: Client) -> None:
    with client.generate([Command.SILENT], request_id="mine", stream=True) as stream:
        rig.wait_for("Submit")
        with pytest.raises(RequestNotFoundError):
            rig.client().abort("mine")
        client.abort("mine")
        with pytest.raises(RequestCancelledError, match="aborted") as caught:
            list(stream)
        assert caught.value.request_id == "mine"
        with pytest.raises(RequestCancelledError):
            _ = stream.reply
    rig.wait_for("Cancel")
    with pytest.raises(RequestNotFoundError):
        client.abort("mine")


def test_a_full_queue_says_when_to_come_again(client: Client) -> None:
    with pytest.raises(OverloadedError, match="the queue is full") as caught:
        client.generate([Command.OVERLOADED])
    assert caught.value.retry_after_seconds == 1.0


def test_what_the_engine_did_not_foresee_keeps_its_text_here(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(InternalError) as caught:
        client.generate([Command.UNFORESEEN], request_id="abc")
    assert caught.value.message == "internal error"
    assert caught.value.request_id == "abc"
    assert "secret detail" in caplog.text
    assert client.generate([10], max_tokens=1).token_ids == (10,)


def test_what_the_front_end_did_not_foresee_keeps_its_text_here(
    client: Client, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("secret detail")

    with monkeypatch.context() as patch:
        patch.setattr(generation, "validate", fail)
        patch.setattr(AdapterDirectory, "list_adapters", fail)
        with pytest.raises(InternalError) as caught:
            client.generate([10])
        assert caught.value.message == "internal error"
        assert f"unforeseen error in request {caught.value.request_id}" in caplog.text
        assert "secret detail" in caplog.text
        with pytest.raises(InternalError, match=r"^internal error$") as unary:
            client.adapters.list()
        assert unary.value.request_id in caplog.text
    assert client.generate([10], max_tokens=1).token_ids == (10,)
    assert [info.name for info in client.adapters.list()] == ["alpha", "beta"]


def test_errors_are_google_rpc_details(rig: Rig) -> None:
    with grpc.insecure_channel(rig.target) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Generate(pb.GenerateRequest(request_id="abc")))
    status = rpc_status.from_call(caught.value)  # type: ignore[arg-type]
    assert status is not None
    assert status.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    info, request, bad = (
        error_details_pb2.ErrorInfo(),
        error_details_pb2.RequestInfo(),
        error_details_pb2.BadRequest(),
    )
    assert status.details[0].Unpack(info)
    assert status.details[1].Unpack(request)
    assert status.details[2].Unpack(bad)
    assert (info.reason, info.domain) == ("INVALID_REQUEST", "segue")
    assert request.request_id == "abc"
    assert [violation.field for violation in bad.field_violations] == ["prompt"]


def test_an_error_with_long_texts_still_arrives(client: Client) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        client.generate([10], model="é" * 100_000)
    assert len(caught.value.message) < 2000
    with pytest.raises(UnsafePathError):
        client.generate([10], adapter="好" * 100_000)

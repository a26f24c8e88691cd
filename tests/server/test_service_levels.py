"""What a call says of its targets, its tenant and its deadline, and that the engine is told."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import grpc
import pytest

from segue import SLO, Client, InvalidRequestError
from segue.client.requests import build_generate_request
from segue.client.status import error_of_rpc
from segue.server.caller import is_loopback, tenant
from segue.v1 import generation_pb2_grpc
from tests.server.rig import Rig


def ask(rig: Rig, *metadata: tuple[str, str], timeout: float | None = None, **options: Any) -> None:
    """One call with this metadata. Raises what the SDK would."""
    request = build_generate_request([10], {"max_tokens": 1, **options})  # type: ignore[typeddict-item]
    with grpc.insecure_channel(rig.target) as channel:
        try:
            list(generation_pb2_grpc.GenerationServiceStub(channel).Generate(request, timeout, metadata))
        except grpc.RpcError as error:
            raise error_of_rpc(error) from error


def submitted(rig: Rig) -> dict[str, Any]:
    return rig.messages("Submit")[-1]


def test_targets_and_priority_reach_the_engine(rig: Rig, client: Client) -> None:
    client.generate([10], max_tokens=1, slo=SLO(ttft_ms=200, tpot_ms=30, reject_on_miss=True), priority=-3)
    message = submitted(rig)
    assert (message["ttft_seconds"], message["tpot_seconds"], message["reject_on_miss"]) == (0.2, 0.03, True)
    assert (message["priority"], message["tenant"]) == (-3, "")


def test_without_targets_there_are_none(rig: Rig) -> None:
    ask(rig)
    message = submitted(rig)
    assert (message["ttft_seconds"], message["tpot_seconds"], message["reject_on_miss"]) == (None, None, False)
    assert message["deadline_seconds"] is None


def test_headers_fill_in_what_the_request_leaves_open(rig: Rig) -> None:
    ask(rig, ("x-slo-ttft-ms", "150"), ("x-slo-tpot-ms", "20.5"), slo=SLO(ttft_ms=300))
    assert (submitted(rig)["ttft_seconds"], submitted(rig)["tpot_seconds"]) == (0.3, 0.0205)


@pytest.mark.parametrize("value", ["fast", "0", "-1", "nan", "inf", ""])
def test_a_header_that_is_no_target_is_refused_by_name(rig: Rig, value: str) -> None:
    with pytest.raises(InvalidRequestError, match="must be a number greater than 0") as caught:
        ask(rig, ("x-slo-tpot-ms", value))
    assert [violation.field for violation in caught.value.violations] == ["x-slo-tpot-ms"]


def test_the_deadline_reaches_the_engine(rig: Rig) -> None:
    before = time.monotonic()
    ask(rig, timeout=30.0)
    assert before + 25.0 < submitted(rig)["deadline_seconds"] < time.monotonic() + 30.5


def test_a_caller_on_this_machine_names_its_tenant(rig: Rig) -> None:
    ask(rig, ("x-tenant", "acme"))
    assert submitted(rig)["tenant"] == "acme"


@pytest.mark.parametrize("name", ["", "x" * 129])
def test_a_tenant_must_have_a_plain_name(rig: Rig, name: str) -> None:
    with pytest.raises(InvalidRequestError, match="printable ASCII") as caught:
        ask(rig, ("x-tenant", name))
    assert [violation.field for violation in caught.value.violations] == ["x-tenant"]


class FakeContext:
    """A call as gRPC shows it to its handler."""

    def __init__(self, peer: str, identities: Sequence[bytes] = ()) -> None:
        self._peer = peer
        self._identities = identities

    def peer(self) -> str:
        return self._peer

    def peer_identities(self) -> Sequence[bytes] | None:
        return self._identities or None


def test_credentials_alone_name_the_tenant_where_there_are_any() -> None:
    known: Any = FakeContext("ipv4:127.0.0.1:1", [b"alice"])
    assert tenant(known, {"x-tenant": "bob"}) == tenant(known, {}) == "[b'alice']"


def test_a_name_from_another_machine_is_refused() -> None:
    remote: Any = FakeContext("ipv4:10.0.0.7:4711")
    with pytest.raises(InvalidRequestError, match="own machine"):
        tenant(remote, {"x-tenant": "bob"})
    assert tenant(remote, {}) == ""


@pytest.mark.parametrize(
    ("peer", "expected"),
    [
        ("ipv4:127.0.0.1:4711", True),
        ("ipv4:127.8.0.1:4711", True),
        ("ipv6:[::1]:4711", True),
        ("ipv6:%5B::1%5D:4711", True),
        ("ipv6:[::ffff:127.0.0.1]:4711", True),
        ("unix:", True),
        ("ipv4:10.0.0.7:4711", False),
        ("ipv6:[::ffff:10.0.0.7]:4711", False),
        ("ipv6:[2001:db8::1]:4711", False),
        ("dns:localhost:1", False),
        ("unknown", False),
        ("", False),
    ],
)
def test_loopback_is_told_by_the_address_alone(peer: str, expected: bool) -> None:
    assert is_loopback(peer) is expected

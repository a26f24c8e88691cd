"""What can be said is understood, and what cannot is named."""

from __future__ import annotations

import pytest

from segue.bench.slo.config import (
    ChurnConfig,
    ClientConfig,
    SearchConfig,
    SloBenchConfig,
    SloClass,
    WorkloadConfig,
    parse_tenants,
)
from segue.config import ConfigError


def test_a_class_is_read() -> None:
    assert SloClass.parse("ttft_ms=100,tpot_ms=20,share=0.3", 2) == SloClass(
        name="class2", ttft_ms=100, tpot_ms=20, share=0.3
    )
    assert SloClass.parse("batch:tpot_ms=50", 1) == SloClass(name="batch", tpot_ms=50)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "class: '' in '' is not one of ttft_ms, tpot_ms, share"),
        ("ttft=5", "class: 'ttft' in 'ttft=5' is not one of"),
        ("ttft_ms=5,ttft_ms=6", "class: 'ttft_ms' in "),
        ("ttft_ms=fast", "class: 'fast' in 'ttft_ms=fast' is no number"),
        ("x:ttft_ms=0", "ttft_ms: of class 'x' must be greater than 0 and finite, is 0.0"),
        ("x:ttft_ms=nan", "ttft_ms: of class 'x' must be greater than 0 and finite, is nan"),
        ("x:share=0", "share: of class 'x' must be greater than 0"),
    ],
)
def test_a_wrong_class_is_named(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SloClass.parse(text, 1)
    assert str(caught.value).startswith(message)


def test_tenants_are_read() -> None:
    assert parse_tenants("2") == {"tenant0": 1.0, "tenant1": 1.0}
    assert parse_tenants("flood=10,quiet=1") == {"flood": 10.0, "quiet": 1.0}


@pytest.mark.parametrize("text", ["", "0", "a", "a=1,a=2", "=1", "a=x", "a=0", "é=1", "a=inf"])
def test_wrong_tenants_are_named(text: str) -> None:
    with pytest.raises(ConfigError, match="tenants: "):
        parse_tenants(text)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SearchConfig(attain=1.0), "attain: must be above 0 and below 1"),
        (lambda: SearchConfig(from_rate=5, to_rate=4), "to_rate: must be at least from_rate"),
        (lambda: SearchConfig(repeats=0), "repeats: must be greater than 0"),
        (lambda: ClientConfig(send_slo="shout"), "send_slo: must be one of none, fields, headers"),
        (lambda: ClientConfig(send_slo="headers", reject_on_miss=True), "reject_on_miss: needs send_slo"),
        (lambda: ChurnConfig(kind="drop"), "churn: must be one of evict, reload"),
        (lambda: SloBenchConfig(rate=0.0), "rate: must be positive"),
        (lambda: SloBenchConfig(measured_seconds=0.0), "measured_seconds: must be greater than 0"),
        (lambda: SloBenchConfig(settle_seconds=-1.0), "settle_seconds: must not be negative"),
        (lambda: WorkloadConfig(classes=()), "class: there must be at least one"),
        (lambda: WorkloadConfig(classes=(SloClass(), SloClass())), "class: names must differ"),
        (lambda: WorkloadConfig(adapters=0), "adapters: must be at least 1"),
        (lambda: SloBenchConfig().check_targets(), "ttft_ms: a search needs targets"),
    ],
)
def test_what_cannot_be_is_named(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_single_rate_needs_no_targets() -> None:
    SloBenchConfig(rate=3.0).check_targets()

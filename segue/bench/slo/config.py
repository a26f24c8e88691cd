"""What ``segue bench slo`` is told."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Self

from segue.bench.slo.arrivals import ArrivalsConfig, Phases
from segue.bench.slo.lengths import LengthConfig
from segue.bench.slo.popularity import PopularityConfig
from segue.config import ConfigError, require, require_positive


class SendSlo(StrEnum):
    """How requests carry their targets: not at all, in the request's message, or as metadata."""

    NONE = "none"
    FIELDS = "fields"
    HEADERS = "headers"


class Churn(StrEnum):
    """What is done to adapters during the run: their weights are dropped from memory, or they are unloaded and loaded
    again, in between which they are unknown."""

    EVICT = "evict"
    RELOAD = "reload"


@dataclass(frozen=True, slots=True, kw_only=True)
class SloClass:
    """A class of requests and its targets in milliseconds, None for none; ``share`` weighs it against the others."""

    name: str = "all"
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    share: float = 1.0

    def __post_init__(self) -> None:
        for name in ("ttft_ms", "tpot_ms"):
            value = getattr(self, name)
            sound = value is None or 0 < value < math.inf
            require(sound, name, f"of class {self.name!r} must be greater than 0 and finite, is {value}")
        require(0 < self.share < math.inf, "share", f"of class {self.name!r} must be greater than 0, is {self.share}")

    @classmethod
    def parse(cls, text: str, place: int) -> Self:
        """``[NAME:]KEY=NUMBER,...`` with the keys ttft_ms, tpot_ms and share. Raises ConfigError."""
        name, colon, rest = text.partition(":")
        if not colon:
            name, rest = f"class{place}", text
        values: dict[str, float] = {}
        for part in rest.split(","):
            key, _, number = part.partition("=")
            known = ("ttft_ms", "tpot_ms", "share")
            require(
                key in known and key not in values, "class", f"{key!r} in {text!r} is not one of {', '.join(known)}"
            )
            values[key] = _number("class", number, text)
        return cls(name=name, **values)

    @property
    def has_targets(self) -> bool:
        return self.ttft_ms is not None or self.tpot_ms is not None

    def late_after_seconds(self, output_tokens: int) -> float:
        """When a request that has not ended by then has missed its targets, in seconds from its start; infinite if it
        may take any time."""
        if self.ttft_ms is None or self.tpot_ms is None:
            return math.inf
        return (self.ttft_ms + self.tpot_ms * (output_tokens - 1)) / 1e3


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadConfig:
    """The requests, drawn from ``seed``. ``tenants`` are shares by name; none are named if it is empty.

    ``adapters`` is how many of the server's are used, None for all.
    """

    arrivals: ArrivalsConfig = field(default_factory=ArrivalsConfig)
    popularity: PopularityConfig = field(default_factory=PopularityConfig)
    adapters: int | None = None
    prompt: LengthConfig = field(default_factory=lambda: LengthConfig(mean=128))
    output: LengthConfig = field(default_factory=lambda: LengthConfig(mean=64))
    classes: tuple[SloClass, ...] = (SloClass(),)
    tenants: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        require(bool(self.classes), "class", "there must be at least one")
        names = [each.name for each in self.classes]
        require(len(set(names)) == len(names), "class", f"names must differ, are {', '.join(names)}")
        require(self.adapters is None or self.adapters >= 1, "adapters", f"must be at least 1, is {self.adapters}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchConfig:
    """The search for the highest rate at which ``attain`` of the requests meet their targets, between
    ``from_rate`` and ``to_rate`` requests a second, to the factor 1 + ``precision``.

    A rate that ``confidence`` cannot tell from the border is measured again, ``repeats`` times at most. After
    ``seconds`` no measurement begins.
    """

    attain: float = 0.95
    from_rate: float = 1.0
    to_rate: float = 1024.0
    precision: float = 0.05
    repeats: int = 2
    confidence: float = 0.95
    seconds: float = 600.0

    def __post_init__(self) -> None:
        require(0 < self.attain < 1, "attain", f"must be above 0 and below 1, is {self.attain:g}")
        require(0 < self.confidence < 1, "confidence", f"must be above 0 and below 1, is {self.confidence:g}")
        require_positive(self, "from_rate", "precision", "repeats", "seconds")
        require(
            self.from_rate <= self.to_rate < math.inf, "to_rate",
            f"must be at least from_rate ({self.from_rate:g}) and finite, is {self.to_rate:g}",
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientConfig:
    """``processes`` share the requests. A request is given up after ``timeout_seconds``. A run is void if the 99th
    percentile of what sends or the clients' event loops are late by is above ``most_lag_ms``."""

    processes: int = 1
    timeout_seconds: float = 60.0
    most_lag_ms: float = 10.0
    send_slo: str = SendSlo.NONE.value
    reject_on_miss: bool = False

    def __post_init__(self) -> None:
        require_positive(self, "processes", "timeout_seconds", "most_lag_ms")
        require(self.send_slo in tuple(SendSlo), "send_slo", f"must be one of {', '.join(SendSlo)}: {self.send_slo!r}")
        sent = self.send_slo == SendSlo.FIELDS or not self.reject_on_miss
        require(sent, "reject_on_miss", "needs send_slo to be 'fields'")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChurnConfig:
    """``per_second`` adapters of the run, drawn alike, are treated so; 0 for none."""

    kind: str = Churn.EVICT.value
    per_second: float = 0.0

    def __post_init__(self) -> None:
        require(self.kind in tuple(Churn), "churn", f"must be one of {', '.join(Churn)}, is {self.kind!r}")
        require(0 <= self.per_second < math.inf, "churn", f"must not be negative, is {self.per_second:g}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SloBenchConfig:
    """One benchmark. ``rate`` measures that rate alone, in requests a second; None searches.

    ``settle_seconds`` of load at the first rate come before the first run and are not kept: kernels are compiled and
    adapters loaded then. Each run has a warm-up and a cool-down of its own, which are not measured either.
    """

    workload: WorkloadConfig = field(default_factory=WorkloadConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    client: ClientConfig = field(default_factory=ClientConfig)
    churn: ChurnConfig = field(default_factory=ChurnConfig)
    rate: float | None = None
    settle_seconds: float = 5.0
    warmup_seconds: float = 2.0
    measured_seconds: float = 10.0
    cooldown_seconds: float = 2.0

    def __post_init__(self) -> None:
        require_positive(self, "measured_seconds")
        for name in ("settle_seconds", "warmup_seconds", "cooldown_seconds"):
            require(getattr(self, name) >= 0, name, f"must not be negative, is {getattr(self, name):g}")
        require(self.rate is None or 0 < self.rate < math.inf, "rate", f"must be positive and finite, is {self.rate}")

    def check_targets(self) -> None:
        """Raises ConfigError for a search without any target, which would have no end."""
        searchable = self.rate is not None or any(each.has_targets for each in self.workload.classes)
        require(searchable, "ttft_ms", "a search needs targets: give --ttft-ms, --tpot-ms or --class, or else --rate")

    @property
    def first_rate(self) -> float:
        return self.search.from_rate if self.rate is None else self.rate

    @property
    def settling(self) -> Phases:
        """Of the load before the first run."""
        return Phases(warmup_seconds=self.settle_seconds, measured_seconds=0.0, cooldown_seconds=0.0)

    @property
    def phases(self) -> Phases:
        return Phases(
            warmup_seconds=self.warmup_seconds,
            measured_seconds=self.measured_seconds,
            cooldown_seconds=self.cooldown_seconds,
        )


def parse_tenants(text: str) -> Mapping[str, float]:
    """``N`` tenants of equal shares, or ``NAME=SHARE,...``. Raises ConfigError."""
    if text.isdecimal():
        require(int(text) >= 1, "tenants", "there must be at least one")
        return {f"tenant{number}": 1.0 for number in range(int(text))}
    tenants: dict[str, float] = {}
    for part in text.split(","):
        name, equals, number = part.partition("=")
        sound = bool(name) and bool(equals) and name not in tenants and name.isascii() and name.isprintable()
        require(sound, "tenants", f"must be N or NAME=SHARE,..., is {text!r}")
        tenants[name] = _number("tenants", number, text)
        require(0 < tenants[name] < math.inf, "tenants", f"the share of {name} must be greater than 0, is {number}")
    return tenants


def _number(field_name: str, number: str, text: str) -> float:
    try:
        return float(number)
    except ValueError:
        raise ConfigError(f"{field_name}: {number!r} in {text!r} is no number") from None

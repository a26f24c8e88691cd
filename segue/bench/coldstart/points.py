"""The points of the problem, the modes that are compared at each, and which points are measured."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

import numpy as np

from segue.bench.cases import Mix
from segue.bench.random_checkpoints import Targets
from segue.config import ConfigError, require
from segue.engine.config import HandoffConfig, HandoffMode
from segue.types import Tier


class Mode(StrEnum):
    """How the sources of a cold adapter's layers are chosen; WARM has the adapter on the device."""

    WARM = "warm"
    LOAD_FIRST = "load first"
    STREAM = "stream"
    CPU = "cpu"
    PLANNER = "planner"

    def handoff(self, layers: int) -> HandoffConfig:
        """For a model of so many layers."""
        match self:
            case Mode.LOAD_FIRST:
                return HandoffConfig(mode=HandoffMode.LOAD_FIRST.value)
            case Mode.STREAM | Mode.WARM:
                return HandoffConfig(mode=HandoffMode.STREAM.value)
            case Mode.CPU:
                return HandoffConfig(mode=HandoffMode.FIXED.value, cpu_layers=layers)
            case Mode.PLANNER:
                return HandoffConfig(mode=HandoffMode.AUTO.value)


COLD_MODES = (Mode.LOAD_FIRST, Mode.STREAM, Mode.CPU, Mode.PLANNER)
RIVALS = (Mode.LOAD_FIRST, Mode.STREAM, Mode.CPU)
"""The cold modes that the planner must not be slower than."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """``adapters`` requests arrive together, each of ``prompt`` tokens and with an adapter of its own at ``tier``.

    The link to the device carries ``link_bytes_per_second`` (None: as fast as it goes). ``decodes`` other requests
    decode meanwhile, with adapters that are on the device.
    """

    prompt: int
    rank: int
    targets: Targets
    adapters: int
    tier: Tier
    link_bytes_per_second: float | None = None
    decodes: int = 0

    def __post_init__(self) -> None:
        for name in ("prompt", "rank", "adapters"):
            require(getattr(self, name) >= 1, name, f"must be at least 1, is {getattr(self, name)}")
        require(self.tier in (Tier.HOST, Tier.DISK), "tier", f"must be host or disk, is {self.tier.value!r}")
        require(self.decodes >= 0, "decodes", f"must not be negative, is {self.decodes}")
        link = self.link_bytes_per_second
        require(link is None or link > 0, "link", f"must be greater than 0, is {link}")

    @property
    def mix(self) -> Mix:
        """The adapters that arrive."""
        return Mix(self.adapters, (self.rank,), self.targets)

    @property
    def link_words(self) -> str:
        """The link's bandwidth in words."""
        return "full" if self.link_bytes_per_second is None else f"{self.link_bytes_per_second / 1e9:g} GB/s"

    def __str__(self) -> str:
        link = "full link" if self.link_bytes_per_second is None else self.link_words
        count = "1 adapter" if self.adapters == 1 else f"{self.adapters} adapters"
        busy = f", beside {self.decodes} decodes" if self.decodes else ""
        return (
            f"{count} of rank {self.rank} on {self.targets} from {self.tier.value}, prompt {self.prompt}, {link}{busy}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Axes:
    """The values of each coordinate, in order; the first and last of each make the corners."""

    prompts: tuple[int, ...] = (8, 32, 128, 512, 2048)
    ranks: tuple[int, ...] = (8, 64, 128)
    targets: tuple[Targets, ...] = (Targets.QKVO, Targets.ALL)
    adapters: tuple[int, ...] = (1, 8, 32)
    tiers: tuple[Tier, ...] = (Tier.HOST, Tier.DISK)
    links: tuple[float | None, ...] = (None, 12e9, 6e9)

    def __post_init__(self) -> None:
        for name in ("prompts", "ranks", "targets", "adapters", "tiers", "links"):
            values = getattr(self, name)
            require(bool(values), name, "must name at least one value")
            require(len(set(values)) == len(values), name, "names a value twice")

    def points(self) -> tuple[Point, ...]:
        """All of them, without other requests."""
        return self._product(*self._values())

    def corners(self) -> tuple[Point, ...]:
        """Those that have the first or last value of every coordinate."""
        return self._product(*(tuple(dict.fromkeys((values[0], values[-1]))) for values in self._values()))

    def _values(self) -> tuple[tuple[object, ...], ...]:
        return self.prompts, self.ranks, self.targets, self.adapters, self.tiers, self.links

    def _product(self, *values: Sequence[object]) -> tuple[Point, ...]:
        names = ("prompt", "rank", "targets", "adapters", "tier", "link_bytes_per_second")
        return tuple(
            Point(**dict(zip(names, each, strict=True)))  # type: ignore[arg-type]
            for each in itertools.product(*values)
        )


def measured_points(axes: Axes, samples: int, seed: int) -> tuple[Point, ...]:
    """All corners and ``samples`` of the other points, drawn without repetition, all in one random order.

    So the points that were measured when the time runs out are a fair sample of all of these. Raises ConfigError for
    more samples than there are other points.
    """
    corners = axes.corners()
    others = [point for point in axes.points() if point not in set(corners)]
    if samples > len(others):
        raise ConfigError(f"samples: must be at most {len(others)}, the points that are no corners, is {samples}")
    random = np.random.default_rng(seed)
    drawn = [others[index] for index in random.choice(len(others), size=samples, replace=False)]
    chosen = [*corners, *drawn]
    return tuple(chosen[index] for index in random.permutation(len(chosen)))


def _table_of_8b() -> tuple[Point, ...]:
    def one(targets: Targets, tier: Tier, decodes: int = 0) -> Point:
        return Point(prompt=128, rank=64, targets=targets, adapters=1, tier=tier, decodes=decodes)

    return (
        one(Targets.QKVO, Tier.HOST),
        one(Targets.QKVO, Tier.DISK),
        one(Targets.ALL, Tier.HOST),
        one(Targets.ALL, Tier.DISK),
        Point(prompt=32, rank=64, targets=Targets.QKVO, adapters=32, tier=Tier.HOST),
        one(Targets.QKVO, Tier.DISK, decodes=16),
    )


def beside_decodes(points: Sequence[Point], decodes: int) -> tuple[Point, ...]:
    """Each point, and behind it the same while so many requests decode; with 0 the points alone."""
    if decodes == 0:
        return tuple(points)
    return tuple(each for point in points for each in (point, dataclasses.replace(point, decodes=decodes)))


TABLES: Mapping[str, tuple[Point, ...]] = MappingProxyType({"table-8b": _table_of_8b()})
"""Points that are measured as they stand."""

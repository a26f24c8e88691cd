"""What the adapter store reports: steps of loading, with the moment of each by the monotonic clock."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LayerHost:
    """A layer's weights are in host memory and finite."""

    version_id: int
    layer: int
    monotonic_seconds: float


@dataclass(frozen=True, slots=True)
class LayerEnqueued:
    """The device will have a layer's weights behind an event: see ``AdapterStore.landing_event``."""

    version_id: int
    layer: int
    monotonic_seconds: float


@dataclass(frozen=True, slots=True)
class LayerLanded:
    """A layer's weights are on the device."""

    version_id: int
    layer: int
    monotonic_seconds: float


@dataclass(frozen=True, slots=True)
class Verified:
    """All weights were read, and the file was the same before and after."""

    version_id: int
    monotonic_seconds: float


@dataclass(frozen=True, slots=True)
class LoadFailed:
    """The version cannot be served, now or later. What its users hold of it stays until they release it.

    ``may_pass``: its weights are not to blame, so the same content may be served as another version.
    """

    version_id: int
    message: str
    monotonic_seconds: float
    may_pass: bool = False


StoreEvent = LayerHost | LayerEnqueued | LayerLanded | Verified | LoadFailed

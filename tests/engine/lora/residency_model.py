"""What must hold of one adapter version in a store, whatever is done to it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from hypothesis.vendor.pretty import RepresentationPrinter
from torch import Tensor

from segue.engine.lora.events import LayerEnqueued, LayerHost, LayerLanded, LoadFailed, StoreEvent, Verified
from segue.engine.lora.manifest import AdapterManifest, Projection
from segue.engine.lora.states import HostLayer
from tests.engine.lora.stepped_rig import LANDING_ERROR, READ_ERROR


@dataclass(eq=False, kw_only=True)
class Version:
    """What must hold of one version.

    ``held`` is what each reader of the host copy has seen there. ``host_is_to_go`` once the last of them has ended.
    """

    manifest: AdapterManifest
    contents: list[dict[tuple[Projection, str], Tensor]]
    path: Path
    nan_layer: int | None
    users: int = 0
    held: list[dict[int, HostLayer]] = field(default_factory=list)
    has_pages: bool = False
    may_lose_pages: bool = False
    host_is_to_go: bool = False
    closed: bool = False
    failed: bool = False
    spoilt: bool = False
    stale: bool = False
    stalled: bool = False
    layers_read: int = 0
    layers_enqueued: int = 0
    layers_landed: int = 0

    def __repr__(self) -> str:
        return f"<version {self.number}>"

    def _repr_pretty_(self, printer: RepresentationPrinter, _cycle: bool) -> None:
        printer.text(repr(self))

    @property
    def number(self) -> int:
        return self.manifest.version_id

    @property
    def leaves(self) -> bool:
        return self.users == 0 and (self.closed or self.failed)

    @property
    def is_sound(self) -> bool:
        return not self.spoilt and self.number % 2 == 0

    @property
    def takes_new_work(self) -> bool:
        """Nobody asks for a version that was closed, but those who had it before."""
        return not self.failed and (self.users > 0 or not self.closed)

    def apply(self, event: StoreEvent) -> None:
        """Layers are read and land in order; nothing wrong is ever verified; a failure is the last that is read."""
        match event:
            case LayerHost(layer=layer):
                assert not self.failed
                assert layer in (0, self.layers_read), "layers are read in order"
                assert layer != self.nan_layer
                self.layers_read = layer + 1
            case LayerEnqueued(layer=layer):
                assert self.failed or layer in (0, self.layers_enqueued), "layers are enqueued in order"
                self.layers_enqueued = layer + 1
            case LayerLanded(layer=layer):
                assert self.failed or layer in (0, self.layers_landed), "layers land in order"
                self.layers_landed = layer + 1
            case Verified():
                assert not self.failed
                assert self.layers_read == len(self.contents)
                assert self.nan_layer is None
                assert not self.stale, "a file that had changed before the read began was verified"
            case LoadFailed(message=message):
                assert not self.failed, "a version fails once"
                self.failed = True
                self._assert_right_failure(message)

    def _assert_right_failure(self, message: str) -> None:
        if "NaN" in message:
            assert self.nan_layer is not None
        elif "truncated" in message or "changed" in message:
            assert self.spoilt
        elif "did not answer" in message:
            assert self.stalled
        else:
            assert READ_ERROR in message or LANDING_ERROR in message

"""What an engine computes with on its device."""

from __future__ import annotations

from dataclasses import dataclass

from segue.engine.attention import AttentionBackend
from segue.engine.lora.device_lora import DeviceLora
from segue.engine.runner import DecodeRunner


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """``decodes`` is None where batches that only decode run as all others."""

    lora: DeviceLora
    attention: AttentionBackend
    decodes: DecodeRunner | None = None

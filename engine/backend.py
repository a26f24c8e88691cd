"""What an engine computes with on its device."""

from __future__ import annotations

from dataclasses import dataclass, field

from segue.engine.attention import AttentionBackend
from segue.engine.lora.device_lora import DeviceLora
from segue.engine.runner import BatchRunner
from segue.engine.sampler import Sampler, TorchSampler


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """``batches`` is None where a batch runs as any other pass."""

    lora: DeviceLora
    attention: AttentionBackend
    batches: BatchRunner | None = None
    sampler: Sampler = field(default_factory=TorchSampler)

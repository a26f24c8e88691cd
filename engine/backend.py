"""What an engine computes with on its device."""

from __future__ import annotations

from dataclasses import dataclass, field

from segue.engine.attention import AttentionBackend
from segue.engine.lora.device_lora import DeviceLora
from segue.engine.runner import BatchRunner, PassPreparer
from segue.engine.sampler import Sampler, TorchSampler


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """``batches`` and ``passes`` are None where batches, and passes of loading adapters, run operation by operation."""

    lora: DeviceLora
    attention: AttentionBackend
    batches: BatchRunner | None = None
    passes: PassPreparer | None = None
    sampler: Sampler = field(default_factory=TorchSampler)

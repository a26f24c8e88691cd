"""What all benchmarks ask of an engine alike."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Protocol

from segue.engine.config import EngineConfig, LoadFormat

_SPARE_HOST_BYTES = 64 << 20


class MeasuredEngine(Protocol):
    """What a benchmark's configuration says of its engine. With a ``shape`` the model has random weights."""

    @property
    def shape(self) -> str | None: ...
    @property
    def dtype(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def torch_threads(self) -> int: ...


def engine_config(
    measured: MeasuredEngine, model_dir: Path, *, max_running: int, max_lora_rank: int, cpu_workers: int = 0
) -> EngineConfig:
    """An engine without prefix cache, whose pages and host bytes are still to be said. Raises ConfigError."""
    return EngineConfig(
        model_dir=str(model_dir),
        load_format=(LoadFormat.AUTO if measured.shape is None else LoadFormat.DUMMY).value,
        device=measured.device,
        dtype=measured.dtype,
        torch_threads=measured.torch_threads,
        max_running=max_running,
        max_lora_rank=max_lora_rank,
        prefix_cache=False,
        cpu_workers=cpu_workers,
    )


def with_room(engine: EngineConfig, *, pages: int, host_bytes: int) -> EngineConfig:
    """The engine with so many pages, and with bytes in host memory for adapters of ``host_bytes`` bytes."""
    return dataclasses.replace(engine, pages=pages, host_store_bytes=host_bytes + _SPARE_HOST_BYTES)

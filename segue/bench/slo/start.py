"""A server with random weights and random adapters, made on the spot."""

from __future__ import annotations

import dataclasses
import json
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from segue.bench.adapter_folders import write_adapters
from segue.bench.cases import Mix
from segue.bench.driver import BenchmarkError
from segue.bench.prepare import DTYPES
from segue.bench.random_checkpoints import Targets
from segue.bench.server import write_tokenizer
from segue.bench.shapes import SHAPES
from segue.config import ConfigError, from_table, require, require_positive
from segue.engine.config import EngineConfig, LoadFormat
from segue.engine.lora.catalog import AdapterCatalog
from segue.engine.models.config import ModelConfig
from segue.server.spawn import SpawnError, spawned_server

# Host copies of adapters that are on the device may go, so that the host store need not hold all.
_MOST_HOST_BYTES = 16 << 30
_SPARE_HOST_BYTES = 64 << 20
_MAX_RUNNING = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class StartConfig:
    """The server that is started: a random model of ``shape``, a name in SHAPES, and ``adapters`` random ones of the
    ``ranks`` in turn. With ``pinned`` they are on the device before it serves, and stay there.

    ``settings`` are further keys of the server's configuration, ``engine.`` before those of the engine, which go
    before what is chosen here.
    """

    shape: str
    device: str = "cpu"
    dtype: str = "float32"
    adapters: int = 8
    ranks: tuple[int, ...] = (8, 16, 32, 64)
    targets: str = Targets.QKVO.value
    pinned: bool = False
    context_tokens: int = 4096
    start_seconds: float = 600.0
    settings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require(self.shape in SHAPES, "start", f"must be one of {', '.join(SHAPES)}, is {self.shape!r}")
        require(bool(self.ranks) and min(self.ranks) >= 1, "ranks", "must name at least one, all from 1 on")
        require(self.adapters >= 0, "adapters", f"must not be negative, is {self.adapters}")
        require(self.targets in tuple(Targets), "targets", f"must be one of {', '.join(Targets)}: {self.targets!r}")
        require_positive(self, "context_tokens", "start_seconds")
        available = self.device != "cuda" or torch.cuda.is_available()
        require(available, "device", "is 'cuda', and torch finds no CUDA device")
        # The engine's own checks, before anything is written.
        self.server_table(Path("model"), Path("adapters"), (), 0)

    @property
    def mix(self) -> Mix:
        return Mix(self.adapters, self.ranks, Targets(self.targets)) if self.adapters else Mix()

    def server_table(
        self, model_dir: Path, adapters_dir: Path, names: Sequence[str], weight_bytes: int
    ) -> Mapping[str, Any]:
        """The server's configuration. Raises ConfigError."""
        top, engine = parse_settings(self.settings)
        host_bytes = min(weight_bytes + weight_bytes // 4, _MOST_HOST_BYTES) + _SPARE_HOST_BYTES
        chosen: dict[str, Any] = {
            "model_dir": str(model_dir),
            "load_format": LoadFormat.DUMMY.value,
            "device": self.device,
            "dtype": self.dtype,
            "max_context_tokens": min(self.context_tokens, SHAPES[self.shape].max_position_embeddings),
            "max_running": _MAX_RUNNING,
            "max_lora_rank": max(self.ranks),
            "host_store_bytes": host_bytes,
        }
        return {
            "adapters_dir": str(adapters_dir),
            "pinned_adapters": list(names) if self.pinned else [],
            "drain_seconds": 0.0,
            **top,
            "engine": from_table(EngineConfig, {**chosen, **engine}, where="engine"),
        }


def parse_settings(settings: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The values of ``KEY=VALUE`` for the server and, of ``engine.KEY=VALUE``, for its engine; a value as TOML writes
    it. Raises ConfigError."""
    top: dict[str, Any] = {}
    engine: dict[str, Any] = {}
    for text in settings:
        key, equals, value = text.partition("=")
        try:
            parsed = tomllib.loads(f"value = {value}")["value"] if equals else None
        except tomllib.TOMLDecodeError:
            parsed = None
        if not key or parsed is None:
            raise ConfigError(f"set: must be KEY=VALUE with a value as in the configuration file, is {text!r}")
        head, _, rest = key.partition(".")
        if head == "engine" and rest:
            section, dot, inner = rest.partition(".")
            if dot:
                engine.setdefault(section, {})[inner] = parsed
            else:
                engine[rest] = parsed
        else:
            top[key] = parsed
    return top, engine


@contextmanager
def started_server(config: StartConfig, progress: Callable[[str], None]) -> Iterator[str]:
    """Its address, once it serves; it is stopped at the end. Raises ConfigError, OSError and BenchmarkError."""
    with tempfile.TemporaryDirectory(prefix="segue-bench-") as folder:
        model_dir, adapters_dir = Path(folder) / "model", Path(folder) / "adapters"
        progress(f"writing {config.adapters} adapters")
        model_dir.mkdir()
        (model_dir / "config.json").write_text(json.dumps(SHAPES[config.shape].config_json(config.dtype)))
        model = ModelConfig.load(model_dir)
        write_tokenizer(model_dir, model.vocab_size)
        names = write_adapters([config.mix], model, adapters_dir, DTYPES[config.dtype])
        weight_bytes = _weight_bytes(AdapterCatalog(adapters_dir, model, max(config.ranks)), names)
        progress("starting the server")
        try:
            table = config.server_table(model_dir, adapters_dir, names, weight_bytes)
            with spawned_server(table, start_seconds=config.start_seconds) as address:
                yield address
        except SpawnError as error:
            raise BenchmarkError(str(error)) from error


def _weight_bytes(catalog: AdapterCatalog, names: Sequence[str]) -> int:
    total = 0
    for name in names:
        with catalog.lookup(name) as opened:
            total += opened.manifest.weight_bytes
    return total


def start_settings(config: StartConfig) -> Mapping[str, Any]:
    """The configuration for a report."""
    return dataclasses.asdict(config)

"""A model's configuration and random adapters on disk, and how much room the adapters take in an engine."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from segue.bench.adapter_folders import write_adapters
from segue.bench.cases import Mix
from segue.bench.shapes import SHAPES
from segue.config import ConfigError, require
from segue.engine.lora.catalog import AdapterCatalog
from segue.engine.memory.adapter_layout import AdapterLayout, choose_chunk_elems
from segue.engine.models.config import ModelConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def require_model(shape: str | None, model_dir: str | None) -> None:
    """Exactly one of a name in SHAPES and a folder must be given. Raises ConfigError."""
    if model_dir is None:
        require(shape in SHAPES, "shape", f"must be one of {', '.join(SHAPES)}, is {shape!r}")
    else:
        require(shape is None, "shape", f"is {shape!r}, but the model is the one in model_dir")


def require_device(device: str) -> None:
    """Raises ConfigError where torch has no such device."""
    available = device != "cuda" or torch.cuda.is_available()
    require(available, "device", "is 'cuda', and torch finds no CUDA device")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSize:
    """``pages`` of the pool and ``weight_bytes`` in host memory."""

    pages: int
    weight_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What is on disk: a model's folder, which has at least config.json, and adapters ``names`` in a folder."""

    model_dir: Path
    model: ModelConfig
    adapters_dir: Path
    catalog: AdapterCatalog
    names: tuple[str, ...]

    def sizes(self, page_tokens: int) -> dict[str, AdapterSize]:
        """Of each adapter, in an engine whose pages hold the KV of so many tokens."""
        model = self.model
        page_elems = 2 * page_tokens * model.kv_heads * model.head_dim
        widths = {width for pair in model.projection_shapes().values() for width in pair}
        chunk_elems = choose_chunk_elems(page_elems, widths)
        found = {}
        for name in self.names:
            with self.catalog.lookup(name) as opened:
                layout = AdapterLayout.plan(opened.manifest, page_elems=page_elems, chunk_elems=chunk_elems)
                found[name] = AdapterSize(pages=layout.pages, weight_bytes=opened.manifest.weight_bytes)
        return found


@contextmanager
def written(
    *,
    shape: str | None,
    model_dir: str | None,
    dtype: str,
    mixes: Sequence[Mix],
    max_rank: int,
    request_tokens: int,
    progress: Callable[[str], None],
    longest: str,
) -> Iterator[Written]:
    """Write the configuration of a random model, unless there is a ``model_dir``, and the adapters of all mixes into a
    folder that goes with the block. ``longest`` names the option that makes requests of ``request_tokens`` tokens.

    Raises ConfigError, ModelError or OSError for a model that cannot be measured.
    """
    with tempfile.TemporaryDirectory(prefix="segue-bench-") as folder:
        progress("writing adapters")
        directory, adapters_dir = Path(model_dir or Path(folder) / "model"), Path(folder) / "adapters"
        if shape is not None:
            directory.mkdir()
            (directory / "config.json").write_text(json.dumps(SHAPES[shape].config_json(dtype)))
        model = ModelConfig.load(directory)
        context = model.max_position_embeddings
        if request_tokens > context:
            raise ConfigError(
                f"{longest}: a request would have {request_tokens} tokens, the model's context is {context}"
            )
        names = write_adapters(mixes, model, adapters_dir, DTYPES[dtype])
        catalog = AdapterCatalog(adapters_dir, model, max_rank)
        yield Written(model_dir=directory, model=model, adapters_dir=adapters_dir, catalog=catalog, names=tuple(names))

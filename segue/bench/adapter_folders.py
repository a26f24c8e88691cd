"""Folders of many random adapters, whose weights are written once for each rank.

An engine keeps each folder as a version with pages of its own, and times do not depend on the weights' values. So
folders of one rank are links to one file: 128 adapters of an 8B model take the room of four.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from segue.bench.cases import Mix
from segue.bench.random_checkpoints import Targets, write_random_adapter
from segue.engine.models.config import ModelConfig


def write_adapters(mixes: Sequence[Mix], model: ModelConfig, adapters_dir: Path, dtype: torch.dtype) -> list[str]:
    """Write all adapters of the mixes into ``adapters_dir`` (created); their names, each once. Raises OSError."""
    adapters_dir.mkdir()
    kinds: dict[tuple[Targets, int], list[str]] = {}
    for mix in dict.fromkeys(mixes):
        if mix.targets is None:
            continue
        for index, name in enumerate(mix.adapter_names):
            names = kinds.setdefault((mix.targets, mix.ranks[index % len(mix.ranks)]), [])
            if name not in names:
                names.append(name)

    def write(kind: tuple[Targets, int]) -> None:
        targets, rank = kind
        first, *others = (adapters_dir / name for name in kinds[kind])
        write_random_adapter(first, model, rank=rank, targets=targets, dtype=dtype, seed=rank)
        # All links are made before the first folder is read: a new link changes the file's identity.
        for folder in others:
            folder.mkdir()
            for file in first.iterdir():
                os.link(file, folder / file.name)

    with ThreadPoolExecutor() as pool:
        list(pool.map(write, kinds))
    return [name for names in kinds.values() for name in names]

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch

from segue.bench.adapter_folders import write_adapters
from segue.bench.cases import BASE, PRESETS, Case, Measure, Mix, When, cross_cases
from segue.bench.random_checkpoints import Targets
from segue.bench.shapes import SHAPES
from segue.config import ConfigError
from segue.engine.lora.catalog import AdapterCatalog
from segue.engine.models.config import ModelConfig

OPTIONS = {
    "batches": (1, 4, 4),
    "mixes": ("base", "one", "distinct", "ranks", "2"),
    "ranks": (8, 16),
    "targets": ("qkvo",),
    "prompt": 9,
    "first_token_prompts": (16,),
}


def test_every_batch_with_every_mix() -> None:
    qkvo = Targets.QKVO
    assert cross_cases(**OPTIONS) == (  # type: ignore[arg-type]
        Case(Measure.GEMMS, 1),
        Case(Measure.GEMMS, 4),
        Case(Measure.DECODE_STEP, 1, BASE, 9, When.BEFORE),
        Case(Measure.DECODE_STEP, 1, Mix(1, (16,), qkvo), 9),
        Case(Measure.DECODE_STEP, 1, Mix(1, (8,), qkvo), 9),
        Case(Measure.DECODE_STEP, 4, BASE, 9, When.BEFORE),
        Case(Measure.DECODE_STEP, 4, Mix(1, (16,), qkvo), 9),
        Case(Measure.DECODE_STEP, 4, Mix(4, (16,), qkvo), 9),
        Case(Measure.DECODE_STEP, 4, Mix(4, (8, 16), qkvo), 9),
        Case(Measure.DECODE_STEP, 4, Mix(2, (8, 16), qkvo), 9),
        Case(Measure.DECODE_STEP, 1, BASE, 9, When.AFTER),
        Case(Measure.DECODE_STEP, 4, BASE, 9, When.AFTER),
        Case(Measure.FIRST_TOKEN, 1, BASE, 16),
        Case(Measure.FIRST_TOKEN, 1, Mix(1, (16,), qkvo), 16),
    )


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"batches": (1, 0)}, "batch: must be at least 1, is 0"),
        ({"ranks": (0,)}, "ranks: must be at least 1, is 0"),
        ({"targets": ("qk",)}, "targets: must be one of qkvo, all, is 'qk'"),
        ({"mixes": ("all",)}, "mix: must be base, one, distinct, ranks or a number of adapters, is 'all'"),
        ({"mixes": ("17",)}, "mix: no batch has a request for each adapter"),
        ({"prompt": 0}, "prompt: must be at least 1, is 0"),
    ],
)
def test_what_cannot_be_a_case_is_named(options: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(problem)}$"):
        cross_cases(**{**OPTIONS, **options})  # type: ignore[arg-type]


def test_mixes_of_a_preset_share_adapters() -> None:
    """Those of rank 64 and of rank 8 alone are among the 128 of all ranks."""
    names = {name for case in PRESETS["table-8b"] for name in case.mix.adapter_names}
    assert len(names) == 2 * 128
    assert sum(name.startswith("all-rank-64-") for name in names) == 32


def test_folders_of_one_rank_share_their_weights_and_are_versions_of_their_own(tmp_path: Path) -> None:
    model = ModelConfig.from_json(SHAPES["tiny"].config_json("float32"), {})
    mixes = [BASE, Mix(3, (4, 8), Targets.QKVO), Mix(2, (4,), Targets.QKVO)]
    names = write_adapters(mixes, model, tmp_path / "adapters", torch.float32)
    assert names == ["qkvo-rank-4-0", "qkvo-rank-4-1", "qkvo-rank-8-0"]
    inodes = {os.stat(tmp_path / "adapters" / name / "adapter_model.safetensors").st_ino for name in names}
    assert len(inodes) == 2
    catalog = AdapterCatalog(tmp_path / "adapters", model, 8)
    versions = set()
    for name in names:
        with catalog.lookup(name) as opened:
            versions.add(opened.manifest.version_id)
    assert len(versions) == 3

"""How many pages the pool has where the configuration names none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from segue.config import ConfigError
from segue.engine.config import EngineConfig
from segue.engine.cuda.reserve import device_reserve
from segue.engine.instance import EngineInstance
from segue.engine.models.config import ModelConfig
from segue.engine.pool_size import PageNeeds, cpu_pages, cuda_pages
from tests.checkpoints import TinyModel, write_random_model

GIB = 1 << 30
NEEDS = PageNeeds(page_bytes=1 << 20, page_tokens=16, least_tokens=160, useful_pages=10_000)


def llama_8b(tmp_path: Path) -> ModelConfig:
    """The shape of Llama 3.1 8B."""
    small = ModelConfig.load(write_random_model(tmp_path / "model", TinyModel(layers=1)))
    return replace(
        small,
        hidden_size=4096,
        layers=32,
        heads=32,
        kv_heads=8,
        head_dim=128,
        intermediate_size=14336,
        vocab_size=128256,
        sliding_windows=(None,) * 32,
    )


def test_cuda_takes_its_share_of_what_is_free_less_the_reserve() -> None:
    reserve = {"activations": GIB, "code": GIB}
    assert cuda_pages(NEEDS, 10 * GIB, 0.5, reserve) == 3 * 1024 - 1
    assert cuda_pages(NEEDS, 10 * GIB, 1.0, {}) == 10 * 1024 - 1


def test_the_smallest_pool_holds_one_request_and_a_page() -> None:
    least_bytes = (10 + 1 + 1) << 20
    assert cuda_pages(NEEDS, least_bytes, 1.0, {}) == 11
    with pytest.raises(
        ConfigError,
        match=r"^device memory: one request of 160 tokens needs 0\.0117 GiB of pages, and there are 0\.0107 GiB for "
        r"them \(1 x 0\.0117 GiB free: 0\.0117 GiB, less code: -0\.000977 GiB\)$",
    ):
        cuda_pages(NEEDS, least_bytes, 1.0, {"code": 1 << 20})


def test_a_reserve_beyond_all_memory_leaves_nothing() -> None:
    with pytest.raises(ConfigError, match="and there are 0 GiB for them"):
        cuda_pages(NEEDS, GIB, 0.9, {"logits": 2 * GIB})


def test_the_cpu_takes_a_quarter_four_gib_at_most_and_no_more_than_is_useful() -> None:
    assert cpu_pages(NEEDS, 2 * GIB) == 511
    assert cpu_pages(NEEDS, 64 * GIB) == 4095
    assert cpu_pages(replace(NEEDS, useful_pages=100), 64 * GIB) == 100
    with pytest.raises(ConfigError, match=r"^host memory: one request of 160 tokens needs "):
        cpu_pages(NEEDS, 40 << 20)


def test_what_must_fit_is_the_context_that_is_configured_else_one_pass(tmp_path: Path) -> None:
    model = llama_8b(tmp_path)
    config = EngineConfig(model_dir="x", budget_tokens=512, max_running=8)
    needs = PageNeeds.of(config, model, 131072, 2)
    # 32 layers of K and V of 16 tokens, 8 heads of 128, in 2 bytes.
    assert needs == PageNeeds(
        page_bytes=32 * 2 * 16 * 8 * 128 * 2, page_tokens=16, least_tokens=512, useful_pages=2 * 8 * 8193
    )
    assert PageNeeds.of(replace(config, max_context_tokens=4096), model, 4096, 2).least_tokens == 4096
    assert PageNeeds.of(config, model, 100, 2).least_tokens == 100


def test_the_reserve_grows_with_rows_and_ranks(tmp_path: Path) -> None:
    model = llama_8b(tmp_path)
    config = EngineConfig(model_dir="x", dtype="bfloat16", budget_tokens=512)

    def reserve(config: EngineConfig) -> dict[str, int]:
        return device_reserve(config, model, item_bytes=2, context_tokens=8192, processors=132)

    usual = reserve(config)
    assert all(size_bytes > 0 for size_bytes in usual.values())
    # The pass that runs, two that are recorded and 16 that rest: 512 and more rows of some 139 and 74 kB.
    assert usual["activations"] == 2 * (3 * 512 * 69_632 + 16 * 512 * 36_864)
    assert sum(usual.values()) < 16 * GIB
    wider = reserve(replace(config, budget_tokens=2048))
    assert {name for name in usual if wider[name] > usual[name]} >= {"activations", "LoRA plans and tables"}
    lower = reserve(replace(config, max_lora_rank=16))
    assert lower["LoRA plans and tables"] < usual["LoRA plans and tables"]


def test_an_engine_tells_the_pages_that_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model_dir = write_random_model(tmp_path / "model", TinyModel(layers=2))
    config = EngineConfig(model_dir=str(model_dir), cpu_workers=0, max_running=4)
    with EngineInstance.build(config) as instance:
        # 512 tokens of context in pages of 16: 33 pages each.
        assert instance.ready().pages == 2 * 4 * 33
        assert instance.state(0).free_pages == 2 * 4 * 33
    with EngineInstance.build(replace(config, pages=77)) as instance:
        assert instance.ready().pages == 77

    class FakeMemory:
        available = 64 << 10

    monkeypatch.setattr(psutil, "virtual_memory", FakeMemory)
    with pytest.raises(ConfigError, match=r"^host memory: one request of 512 tokens needs "):
        EngineInstance.build(config)


@pytest.mark.parametrize("fraction", [0.0, 1.5])
def test_the_fraction_is_part_of_the_whole(fraction: float) -> None:
    with pytest.raises(ConfigError, match=r"^memory_fraction: must be "):
        EngineConfig(model_dir="x", memory_fraction=fraction)


@pytest.mark.gpu
def test_an_automatic_pool_leaves_room_to_serve(tmp_path: Path) -> None:
    model_dir = write_random_model(tmp_path / "model", TinyModel(layers=2, head_dim=64))
    config = EngineConfig(model_dir=str(model_dir), device="cuda", dtype="bfloat16", cpu_workers=0)
    free_bytes, _ = torch.cuda.mem_get_info()
    with EngineInstance.build(config) as instance:
        pool_bytes = instance._pool.data.numel() * 2
        assert free_bytes // 2 < pool_bytes < free_bytes * 0.9

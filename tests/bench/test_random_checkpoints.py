from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch

from segue.bench import random_checkpoints
from segue.bench.random_checkpoints import TARGET_PROJECTIONS, Targets, write_random_adapter, write_random_model
from segue.bench.shapes import SHAPES
from segue.engine.lora.catalog import AdapterCatalog
from segue.engine.models.config import ModelConfig
from segue.engine.models.rope_config import RopeType
from segue.engine.models.weights import load_weights
from tests.checkpoints import load_reference, reference_greedy, reference_logits
from tests.engine.harness import EngineHarness

TINY = SHAPES["tiny"]


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_is_a_model_that_the_engine_reads(name: str) -> None:
    shape = SHAPES[name]
    config = ModelConfig.from_json(shape.config_json("bfloat16"), {})
    sizes = (config.hidden_size, config.intermediate_size, config.layers, config.heads, config.kv_heads)
    assert sizes == (shape.hidden_size, shape.intermediate_size, shape.layers, shape.heads, shape.kv_heads)
    assert (config.head_dim, config.vocab_size, config.dtype) == (shape.head_dim, shape.vocab_size, "bfloat16")
    assert not config.tied_embeddings


def test_the_large_shape_is_llama_3_1_8b() -> None:
    config = ModelConfig.from_json(SHAPES["llama-3.1-8b"].config_json("bfloat16"), {})
    assert (config.hidden_size, config.intermediate_size, config.layers) == (4096, 14336, 32)
    assert (config.heads, config.kv_heads, config.head_dim, config.vocab_size) == (32, 8, 128, 128256)
    assert (config.rope.type, config.rope.theta, config.rope.factor) == (RopeType.LLAMA3, 500_000.0, 8.0)


@pytest.mark.parametrize("targets", Targets)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_finite_and_spread(tmp_path: Path, dtype: torch.dtype, targets: Targets) -> None:
    """Also with adapters of PEFT's own reading, on all layers."""
    model_dir = write_random_model(tmp_path / "model", TINY, dtype=dtype)
    model = ModelConfig.load(model_dir)
    adapter_dir = write_random_adapter(tmp_path / "adapter", model, rank=16, targets=targets, dtype=dtype)
    prompt = range(5, 45)
    base = reference_logits(load_reference(model_dir, dtype=dtype), prompt)
    adapted = reference_logits(load_reference(model_dir, adapter_dir, dtype=dtype), prompt)
    for logits in (base, adapted):
        assert logits.isfinite().all()
        assert 1.0 < logits.std() < 4.0
    assert (base - adapted).abs().mean() > 0.2


@pytest.mark.parametrize("targets", Targets)
def test_the_engine_answers_as_transformers_and_peft(tmp_path: Path, targets: Targets) -> None:
    model_dir = write_random_model(tmp_path / "model", TINY, dtype=torch.float32)
    adapters_dir, model = tmp_path / "adapters", ModelConfig.load(model_dir)
    for rank in (4, 16):
        folder = adapters_dir / f"rank-{rank}"
        write_random_adapter(folder, model, rank=rank, targets=targets, dtype=torch.float32, seed=rank)
    prompt = range(7, 30)
    with EngineHarness(model_dir, adapters_dir, cpu_workers=0) as harness:
        names = (None, "rank-4", "rank-16")
        numbers = {name: harness.submit(prompt, name, max_tokens=6) for name in names}
        harness.run()
        answers = {name: tuple(harness.answers[number].tokens) for name, number in numbers.items()}
    for name, answer in answers.items():
        reference = load_reference(model_dir, None if name is None else adapters_dir / name)
        assert answer == reference_greedy(reference, prompt, 6)
    assert len(set(answers.values())) == 3


def test_an_adapter_is_what_was_asked_for(tmp_path: Path) -> None:
    model = ModelConfig.from_json(TINY.config_json("float32"), {})
    folder = write_random_adapter(tmp_path / "a", model, rank=12, targets=Targets.ALL, dtype=torch.bfloat16)
    config = peft.LoraConfig.from_pretrained(str(folder))
    assert (config.r, config.lora_alpha, config.task_type) == (12, 24, "CAUSAL_LM")
    with AdapterCatalog(tmp_path, model, 12).lookup("a") as opened:
        layers = opened.manifest.layers
    assert len(layers) == TINY.layers
    for layer in layers:
        assert [module.projection for module in layer] == list(TARGET_PROJECTIONS[Targets.ALL])
        assert {(module.rank, module.scale, module.a.dtype) for module in layer} == {(12, 2.0, "BF16")}


def test_shards_stay_small_and_say_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = write_random_model(tmp_path / "one", TINY, dtype=torch.float32, seed=3)
    monkeypatch.setattr(random_checkpoints, "_SHARD_BYTES", 1 << 20)
    many = write_random_model(tmp_path / "many", TINY, dtype=torch.float32, seed=3)
    shards = list(many.glob("*.safetensors"))
    assert len(list(one.glob("*.safetensors"))) == 1
    assert len(shards) > 5
    assert max(path.stat().st_size for path in shards) < (1 << 20) + 4096
    config = ModelConfig.load(one)
    first, second = (load_weights(folder, config, torch.float32) for folder in (one, many))
    assert torch.equal(first.head, second.head)
    assert torch.equal(first.layers[-1].down.weight, second.layers[-1].down.weight)

"""16-bit dtypes on CUDA, through FlashInfer and decode graphs: log probabilities of the engine's own tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.checkpoints import (
    ALL_TARGETS,
    TinyModel,
    load_reference,
    reference_logits,
    write_random_adapter,
    write_random_model,
)
from tests.engine.harness import EngineHarness
from tests.engine.worlds import prompts

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(700)]

NEW_TOKENS = 32
LOGPROB_TOLERANCE = 2e-2
CLEAR_MARGIN = 4e-2
SHAPES = {
    "llama": TinyModel(hidden_size=256, heads=4, kv_heads=2, head_dim=128, layers=4),
    "llama, one kv head": TinyModel(hidden_size=256, heads=4, kv_heads=1, head_dim=128, layers=4),
    "mistral": TinyModel(
        family="mistral", hidden_size=256, heads=4, kv_heads=2, head_dim=128, extra={"sliding_window": 24}
    ),
    "qwen2": TinyModel(family="qwen2", hidden_size=256, heads=4, kv_heads=2, head_dim=128),
    "qwen3": TinyModel(family="qwen3", hidden_size=256, heads=4, kv_heads=2, head_dim=128),
}
ADAPTERS: dict[str, tuple[int, tuple[str, ...]]] = {
    "a": (8, ("q_proj", "v_proj")),
    "b": (64, ALL_TARGETS),
    "c": (1, ("o_proj", "down_proj")),
    "d": (24, ("k_proj", "gate_proj")),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("hot", [True, False], ids=["hot", "cold"])
def test_log_probabilities_are_those_of_the_reference(shape: str, hot: bool, tmp_path: Path) -> None:
    model_dir = write_random_model(tmp_path / "model", SHAPES[shape], seed=2, dtype=torch.bfloat16)
    for seed, (name, (rank, targets)) in enumerate(ADAPTERS.items()):
        write_random_adapter(
            tmp_path / "adapters" / name, model_dir, rank=rank, targets=targets, dtype=torch.bfloat16, seed=seed
        )
    names = [*ADAPTERS, None, *ADAPTERS, None]
    asked = list(zip(names, prompts(len(names), seed=1), strict=True))
    settings = {"device": "cuda", "dtype": "bfloat16", "chunk_tokens": 16, "copy_bytes_per_second": 4e6}
    with EngineHarness(model_dir, tmp_path / "adapters", **settings) as harness:
        if hot:
            for name in ADAPTERS:
                harness.warm(name)
        numbers = [harness.submit(prompt, adapter, max_tokens=NEW_TOKENS, logprobs=2) for adapter, prompt in asked]
        # Kernels are compiled when they are first met.
        harness.run(timeout_seconds=600)
        worst = 0.0
        for number, (adapter, prompt) in zip(numbers, asked, strict=True):
            answer = harness.answers[number]
            assert answer.failed is None
            reference = load_reference(model_dir, None if adapter is None else tmp_path / "adapters" / adapter)
            logprobs = reference_logits(reference, prompt + answer.tokens).log_softmax(-1)[len(prompt) - 1 : -1]
            got = torch.tensor([item.logprob for item in answer.logprobs])
            expected = logprobs.gather(1, torch.tensor(answer.tokens)[:, None])[:, 0]
            worst = max(worst, float((got - expected).abs().max()))
            best = logprobs.topk(2).values
            clear = best[:, 0] - best[:, 1] > CLEAR_MARGIN
            assert torch.equal(torch.tensor(answer.tokens)[clear], logprobs.argmax(-1)[clear]), adapter
        assert worst < LOGPROB_TOLERANCE

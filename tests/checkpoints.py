"""Tiny random checkpoints on disk: models as transformers saves them and LoRA adapters as PEFT saves them.

The weights are wide enough that logits spread over several units, so that a greedy choice is not decided by rounding,
and adapters are strong enough that the choice of adapter changes the logits clearly.
"""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

ATTENTION_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_TARGETS = (*ATTENTION_TARGETS, "gate_proj", "up_proj", "down_proj")

ROPE_DEFAULT: Mapping[str, Any] = {"rope_type": "default", "rope_theta": 10_000.0}
ROPE_LINEAR: Mapping[str, Any] = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
ROPE_YARN: Mapping[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
}
ROPE_LLAMA3: Mapping[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@dataclass(frozen=True, kw_only=True)
class TinyModel:
    """The shape of a tiny random model. All widths are features, ``kv_heads`` may be any divisor of ``heads``.

    ``family`` is transformers' model_type. ``extra`` has further fields of its config.json, such as sliding_window.
    """

    family: str = "llama"
    hidden_size: int = 64
    intermediate_size: int = 96
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    vocab_size: int = 256
    max_position_embeddings: int = 512
    tied: bool = False
    rope: Mapping[str, Any] = field(default_factory=lambda: ROPE_DEFAULT)
    eos_token_id: int | tuple[int, ...] = 2
    extra: Mapping[str, Any] = field(default_factory=dict)


def write_random_model(
    directory: Path,
    model: TinyModel | None = None,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_bytes: int | None = None,
    transformers_4_config: bool = False,
    block_strength: float = 1.0,
    logit_spread: float = 2.0,
) -> Path:
    """Write a random checkpoint into ``directory`` (created) and return it.

    ``max_shard_bytes`` splits the weights over several files with an index. ``transformers_4_config`` writes the rope
    parameters of config.json as transformers 4 spelled them (``rope_theta`` and ``rope_scaling``). ``block_strength``
    is the spread of what an attention or MLP block adds, beside 1 of its input: trained models add little in each.
    """
    model = model or TinyModel()
    causal = transformers.AutoModelForCausalLM.from_config(_transformers_config(model))  # type: ignore[no-untyped-call]
    _randomise(causal, seed, block_strength, logit_spread)
    shard: dict[str, Any] = {} if max_shard_bytes is None else {"max_shard_size": max_shard_bytes}
    torch.nn.Module.to(causal, dtype)
    causal.save_pretrained(directory, **shard)
    if transformers_4_config:
        _spell_rope_as_transformers_4(directory / "config.json")
    return directory


def write_random_adapter(
    directory: Path,
    base_dir: Path,
    *,
    rank: int = 8,
    targets: Iterable[str] = ATTENTION_TARGETS,
    rank_by_module: Mapping[str, int] | None = None,
    alpha: float | None = None,
    alpha_by_module: Mapping[str, float] | None = None,
    rslora: bool = False,
    layers: Iterable[int] | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    strength: float = 0.4,
) -> Path:
    """Write a random PEFT LoRA adapter for the model in ``base_dir`` into ``directory`` and return it.

    ``rank_by_module`` (PEFT's rank_pattern, e.g. {"k_proj": 3}) overrides ``rank`` and ``alpha_by_module`` (its
    alpha_pattern) overrides ``alpha``; ``layers`` limits the adapter to those layers. ``alpha`` is PEFT's lora_alpha,
    2 x rank when None. B is sized after rank, alpha and rslora, so that a module's delta always has about ``strength``
    times the spread of the module's own output.
    """
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,  # type: ignore[arg-type]
        target_modules=list(targets),
        rank_pattern=dict(rank_by_module or {}),
        alpha_pattern=dict(alpha_by_module or {}),
        layers_to_transform=None if layers is None else list(layers),
        use_rslora=rslora,
        task_type="CAUSAL_LM",
    )
    return write_peft_adapter(directory, base_dir, config, seed=seed, dtype=dtype, strength=strength)


def write_peft_adapter(
    directory: Path,
    base_dir: Path,
    config: peft.LoraConfig,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    strength: float = 0.4,
) -> Path:
    """As ``write_random_adapter``, for any LoRA configuration that PEFT applies to the model in ``base_dir``."""
    base = transformers.AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    with _known_peft_warnings():
        adapted = peft.get_peft_model(base, config)
    generator = torch.Generator().manual_seed(seed)
    for module in adapted.modules():
        if isinstance(module, peft.tuners.lora.Linear):
            _randomise_adapter_module(module, generator, strength)
    adapted.to(dtype).save_pretrained(str(directory))
    return directory


def load_reference(
    base_dir: Path, adapter_dir: Path | None = None, *, dtype: torch.dtype = torch.float32
) -> torch.nn.Module:
    """The transformers model of ``base_dir`` in ``dtype`` on the CPU, with PEFT's adapter applied if one is named."""
    model: torch.nn.Module = transformers.AutoModelForCausalLM.from_pretrained(base_dir, dtype=dtype)
    if adapter_dir is not None:
        with _known_peft_warnings():
            model = peft.PeftModel.from_pretrained(model, str(adapter_dir)).to(dtype)
    model.requires_grad_(False).train(False)
    return model


@torch.inference_mode()
def reference_logits(model: torch.nn.Module, token_ids: Iterable[int]) -> torch.Tensor:
    """Logits [tokens, vocab] float32 of one sequence."""
    logits: torch.Tensor = model(torch.tensor([list(token_ids)])).logits[0]
    return logits.float()


@torch.inference_mode()
def reference_greedy(model: torch.nn.Module, prompt: Iterable[int], new_tokens: int) -> tuple[int, ...]:
    """The ``new_tokens`` greedy tokens after ``prompt``, end-of-sequence tokens ignored."""
    config: Any = model.config
    options = {_cache_argument(model): transformers.DynamicCache(config=config), "use_cache": True}
    ids, tokens = torch.tensor([list(prompt)]), []
    for _ in range(new_tokens):
        tokens.append(int(model(ids, **options).logits[0, -1].argmax()))
        ids = torch.tensor([[tokens[-1]]])
    return tuple(tokens)


def _cache_argument(model: torch.nn.Module) -> str:
    """What forward() calls the KV cache, which transformers 5 renamed on its way."""
    base = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    return "cache" if "cache" in inspect.signature(base.forward).parameters else "past_key_values"


@contextmanager
def _known_peft_warnings() -> Iterator[None]:
    """PEFT reads an attribute that transformers 5 has deprecated; tests run with warnings as errors."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        yield


def _transformers_config(model: TinyModel) -> transformers.PretrainedConfig:
    eos = model.eos_token_id
    return transformers.AutoConfig.for_model(
        model.family,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.head_dim,
        vocab_size=model.vocab_size,
        max_position_embeddings=model.max_position_embeddings,
        tie_word_embeddings=model.tied,
        rope_parameters=dict(model.rope),
        bos_token_id=1,
        eos_token_id=eos if isinstance(eos, int) else list(eos),
        **model.extra,
    )


def _randomise(model: torch.nn.Module, seed: int, block_strength: float, logit_spread: float) -> None:
    """Linear weights keep the scale of their input, embeddings have unit spread, norms are near 1, biases near 0."""
    tied = "lm_head.weight" not in dict(model.named_parameters())
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            values = 1.0 + 0.1 * noise
        elif name.endswith("bias"):
            values = 0.5 * noise
        elif "lm_head" in name:
            values = logit_spread * noise / parameter.shape[1] ** 0.5
        elif "o_proj" in name or "down_proj" in name:
            values = block_strength * noise / parameter.shape[1] ** 0.5
        elif "embed_tokens" in name:
            values = noise / (parameter.shape[1] ** 0.5 / logit_spread if tied else 1.0)
        else:
            values = noise / parameter.shape[1] ** 0.5
        parameter.data.copy_(values)


def _randomise_adapter_module(module: Any, generator: torch.Generator, strength: float) -> None:
    """A keeps the scale of its input; B's scale makes scaling * B A as strong as ``strength`` times the base weight."""
    a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
    a.data.copy_(torch.randn(a.shape, generator=generator) / a.shape[1] ** 0.5)
    spread = strength / (abs(module.scaling["default"]) * a.shape[0] ** 0.5)
    b.data.copy_(torch.randn(b.shape, generator=generator) * spread)


def _spell_rope_as_transformers_4(path: Path) -> None:
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    path.write_text(json.dumps(config, indent=2))

"""Training of the base model and of the adapters, and the files that they are saved as."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from demo_assets.dataset import IGNORED_LABEL, Rows
from demo_assets.tokenizer import BOS_ID, EOS_ID, MAX_POSITIONS

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_LINEARS = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
_REPORT_STEPS = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterSpec:
    """The LoRA hyperparameters of one voice."""

    voice: str
    rank: int
    alpha: int
    target_modules: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """Steps of AdamW with a linear warm-up over the first twentieth and a cosine decay to a twentieth of the peak."""

    steps: int
    batch_rows: int
    peak_learning_rate: float
    weight_decay: float


ADAPTERS = (
    AdapterSpec(voice="brief", rank=4, alpha=16, target_modules=("q_proj", "v_proj")),
    AdapterSpec(voice="polite", rank=8, alpha=16, target_modules=("q_proj", "v_proj")),
    AdapterSpec(voice="list", rank=16, alpha=32, target_modules=("q_proj", "v_proj")),
    AdapterSpec(voice="yoda", rank=32, alpha=32, target_modules=("q_proj", "v_proj")),
    AdapterSpec(voice="pirate", rank=16, alpha=32, target_modules=ATTENTION),
    AdapterSpec(voice="json", rank=64, alpha=64, target_modules=ATTENTION),
    AdapterSpec(voice="shout", rank=8, alpha=16, target_modules=ALL_LINEARS),
    AdapterSpec(voice="rhyme", rank=16, alpha=32, target_modules=ALL_LINEARS),
)


def new_base_model(vocab_size: int) -> LlamaForCausalLM:
    """A freshly initialised model of about 2.7 million parameters."""
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=192, intermediate_size=384, num_hidden_layers=8, num_attention_heads=6,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=MAX_POSITIONS, tie_word_embeddings=True,
        bos_token_id=BOS_ID, eos_token_id=EOS_ID, pad_token_id=EOS_ID, initializer_range=0.04,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def train(model: torch.nn.Module, rows: Rows, schedule: Schedule, seed: int, label: str) -> None:
    """Train `model`'s trainable parameters in place on random batches of `rows`, which lie on its device."""
    device = rows.tokens.device
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=schedule.peak_learning_rate, betas=(0.9, 0.98), weight_decay=schedule.weight_decay
    )
    warmup_steps = max(1, schedule.steps // 20)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.02, total_iters=warmup_steps)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, T_max=max(1, schedule.steps - warmup_steps), eta_min=schedule.peak_learning_rate / 20
    )
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, decay], milestones=[warmup_steps])
    generator = torch.Generator().manual_seed(seed)
    model.train()
    started = time.perf_counter()
    for step in range(1, schedule.steps + 1):
        chosen = torch.randint(len(rows.tokens), (schedule.batch_rows,), generator=generator).to(device)
        loss = _loss(model, rows.tokens[chosen], rows.labels[chosen])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        if step % _REPORT_STEPS == 0 or step == schedule.steps:
            seconds = time.perf_counter() - started
            print(f"{label}: step {step}, loss {loss.item():.4f}, {seconds:.1f} s", flush=True)
    model.eval()


def _loss(model: torch.nn.Module, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    with torch.autocast(tokens.device.type, dtype=torch.bfloat16, enabled=tokens.device.type == "cuda"):
        logits = model(input_ids=tokens, use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED_LABEL
    )


def save_base(model: LlamaForCausalLM, folder: Path) -> None:
    """Write config.json, generation_config.json and model.safetensors, the weights in bfloat16."""
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=BOS_ID, eos_token_id=EOS_ID, pad_token_id=EOS_ID, do_sample=False, max_new_tokens=160
    )
    model.bfloat16().save_pretrained(folder)


def load_base(folder: Path, device: torch.device) -> LlamaForCausalLM:
    """The saved base model in float32."""
    model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.nn.Module.to(model, device)
    return model


def with_lora(model: LlamaForCausalLM, spec: AdapterSpec) -> PeftModel:
    """The model with a fresh adapter, of which alone the weights are trainable."""
    config = LoraConfig(
        task_type="CAUSAL_LM", r=spec.rank, lora_alpha=spec.alpha, target_modules=list(spec.target_modules),
        lora_dropout=0.0, bias="none", use_rslora=False,
    )  # fmt: skip
    adapted = get_peft_model(model, config)
    assert isinstance(adapted, PeftModel)
    return adapted


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors as PEFT does, the weights in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model.peft_config["default"].to_dict()
    config["inference_mode"] = True
    config["base_model_name_or_path"] = "segue-demo"
    config["target_modules"] = sorted(config["target_modules"])
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True, default=str) + "\n")
    weights = {name: value.to("cpu", torch.bfloat16).contiguous() for name, value in
               get_peft_model_state_dict(model).items()}  # fmt: skip
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})

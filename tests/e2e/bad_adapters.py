"""Folders that no server may serve as adapters, each made from one that it can."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
MAX_RANK = 64


def write_all(root: Path, good: Path) -> None:
    """Write each folder of ``REJECTED`` and ``UNSAFE`` into the adapters folder ``root``."""
    for name, spoil in (REJECTED | UNSAFE).items():
        folder = Path(shutil.copytree(good, root / name))
        spoil(folder)


def _truncate(folder: Path) -> None:
    os.truncate(folder / WEIGHTS, 100_000)


def _corrupt(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"\xff" * 4096)


def _without_config(folder: Path) -> None:
    (folder / CONFIG).unlink()


def _pickle_only(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


def _wrong_shape(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    name = next(name for name in tensors if name.endswith("lora_A.weight"))
    _save(folder, tensors | {name: tensors[name][:-1].contiguous()})


def _wrong_base(folder: Path) -> None:
    _save(folder, {name: torch.cat([tensor, tensor], dim=1) for name, tensor in load_file(folder / WEIGHTS).items()})


def _nan(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    next(reversed(tensors.values())).view(-1)[-1] = torch.nan
    _save(folder, tensors)


def _rank_over_the_limit(folder: Path) -> None:
    _with_rank(folder, MAX_RANK + 1, ("q_proj", "v_proj"))


def _larger_than_the_pool(folder: Path) -> None:
    _with_rank(folder, MAX_RANK, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))


def _dora(folder: Path) -> None:
    _configure(folder, use_dora=True)


def _other_kind(folder: Path) -> None:
    _configure(folder, peft_type="IA3")


def _other_vocabulary(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')


def _fifo(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


def _link_out(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to("/dev/zero")


def _folder_is_fifo(folder: Path) -> None:
    shutil.rmtree(folder)
    os.mkfifo(folder)


def _folder_is_link(folder: Path) -> None:
    shutil.move(folder, folder.parents[1] / folder.name)
    folder.symlink_to(folder.parents[1] / folder.name)


def _with_rank(folder: Path, rank: int, modules: tuple[str, ...]) -> None:
    """Weights of this rank on every layer's ``modules`` of the demo's model."""
    widths = {"q_proj": 192, "k_proj": 64, "v_proj": 64, "o_proj": 192, "gate_proj": 384, "up_proj": 384}
    tensors = {}
    for layer in range(8):
        for module in modules:
            block = "self_attn" if module[0] in "qkvo" else "mlp"
            prefix = f"base_model.model.model.layers.{layer}.{block}.{module}"
            inputs = 384 if module == "down_proj" else 192
            tensors[f"{prefix}.lora_A.weight"] = torch.zeros(rank, inputs, dtype=torch.bfloat16)
            tensors[f"{prefix}.lora_B.weight"] = torch.zeros(widths.get(module, 192), rank, dtype=torch.bfloat16)
    _save(folder, tensors)
    _configure(folder, r=rank, target_modules=list(modules))


def _save(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def _configure(folder: Path, **fields: object) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | fields))


REJECTED: dict[str, Callable[[Path], None]] = {
    "truncated": _truncate,
    "corrupt": _corrupt,
    "without-config": _without_config,
    "pickle-only": _pickle_only,
    "wrong-shape": _wrong_shape,
    "wrong-base": _wrong_base,
    "nan": _nan,
    "rank-over-the-limit": _rank_over_the_limit,
    "larger-than-the-pool": _larger_than_the_pool,
    "dora": _dora,
    "ia3": _other_kind,
    "other-vocabulary": _other_vocabulary,
}
UNSAFE: dict[str, Callable[[Path], None]] = {
    "weights-are-a-fifo": _fifo,
    "weights-are-a-link-out": _link_out,
    "folder-is-a-fifo": _folder_is_fifo,
    "folder-is-a-link-out": _folder_is_link,
}

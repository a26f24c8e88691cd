"""The forward pass with a hook that computes deltas from pages, against PEFT; and the order of the hook's calls."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from segue.engine.lora.points import LoraPoint, NullLora
from segue.gpu_kernels.landing import land_rows
from segue.gpu_kernels.paged_lora import PagedModule, add_paged_lora
from tests.checkpoints import (
    ALL_TARGETS,
    ATTENTION_TARGETS,
    TinyModel,
    load_reference,
    reference_greedy,
    reference_logits,
    write_random_adapter,
    write_random_model,
)
from tests.engine.models.passes import Runner, logprob_error, make_runner, random_tokens

CHUNK_ELEMS = 32
POINTS = {
    LoraPoint.QKV: ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    LoraPoint.O: ("self_attn.o_proj",),
    LoraPoint.GATE_UP: ("mlp.gate_proj", "mlp.up_proj"),
    LoraPoint.DOWN: ("mlp.down_proj",),
}
COLUMNS = {
    "self_attn.q_proj": slice(0, 64),
    "self_attn.k_proj": slice(64, 96),
    "self_attn.v_proj": slice(96, 128),
    "self_attn.o_proj": slice(0, 64),
    "mlp.gate_proj": slice(0, 96),
    "mlp.up_proj": slice(96, 192),
    "mlp.down_proj": slice(0, 64),
}

FAMILIES = {
    "llama": TinyModel(),
    "mistral": TinyModel(family="mistral", extra={"sliding_window": 21}),
    "qwen2": TinyModel(family="qwen2"),
    "qwen3": TinyModel(family="qwen3"),
}


@dataclass
class FakePagedLora:
    """A hook for one adapter and all rows, its matrices landed in the pool when made. It waits ``waits`` times."""

    pool_layers: list[Tensor]
    page_table: Tensor
    starts: Mapping[tuple[int, str], tuple[int, int, int]]  # rank, where A begins, where B begins
    scale: float
    waits: int = 0
    calls: list[tuple[str, int]] = field(default_factory=list)

    def enter_layer(self, layer: int, /) -> Iterator[None]:
        self.calls.append(("enter", layer))
        for _ in range(self.waits):
            yield

    def begin(self, layer: int, point: LoraPoint, x: Tensor, /) -> None:
        self.calls.append((f"begin {point.value}", layer))
        self.seen = x.clone()

    def finish(self, layer: int, point: LoraPoint, x: Tensor, out: Tensor, /) -> Iterator[None]:
        self.calls.append((f"finish {point.value}", layer))
        for _ in range(self.waits):
            yield
        assert torch.equal(x, self.seen)
        modules = [self._module(layer, name) for name in POINTS[point] if (layer, name) in self.starts]
        if modules:
            add_paged_lora(
                x,
                out,
                rows=slice(None),
                pool_layer=self.pool_layers[layer],
                page_tables=self.page_table[None],
                modules=modules,
                chunk_elems=CHUNK_ELEMS,
            )

    def leave_layer(self, layer: int, /) -> None:
        self.calls.append(("leave", layer))

    def _module(self, layer: int, name: str) -> PagedModule:
        rank, a_start, b_start = self.starts[layer, name]
        column, width = COLUMNS[name].start, COLUMNS[name].stop - COLUMNS[name].start
        return PagedModule(rank=rank, a_start=a_start, b_start=b_start, column=column, width=width, scale=self.scale)


def land_adapter(runner: Runner, adapter_dir: Path, *, waits: int = 0) -> FakePagedLora:
    """Put an adapter's matrices one after the other into pages of the runner's pool."""
    tensors = load_file(adapter_dir / "adapter_model.safetensors")
    config = json.loads((adapter_dir / "adapter_config.json").read_text())
    page_table = torch.tensor(runner.pool.allocate(30, "adapter"))
    starts = {}
    for layer in range(runner.model.config.layers):
        end = 0
        for name in COLUMNS:
            key = f"base_model.model.model.layers.{layer}.{name}"
            if f"{key}.lora_A.weight" not in tensors:
                continue
            a, b = tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"]
            b_start = end + a.numel()
            land_rows(a, runner.pool.layer(layer), page_table, end, CHUNK_ELEMS)
            land_rows(b, runner.pool.layer(layer), page_table, b_start, CHUNK_ELEMS, transpose=True)
            starts[layer, name] = (len(a), end, b_start)
            end = b_start + b.numel()
    layers = [runner.pool.layer(layer) for layer in range(runner.pool.layers)]
    return FakePagedLora(layers, page_table, starts, config["lora_alpha"] / config["r"], waits)


@pytest.fixture(scope="module", params=FAMILIES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("base"), FAMILIES[request.param])


@pytest.mark.parametrize("targets", [ATTENTION_TARGETS, ALL_TARGETS, ("q_proj", "v_proj"), ("up_proj",)])
@pytest.mark.parametrize("rank", [1, 24])
def test_deltas_from_pages_match_peft(base: Path, tmp_path: Path, rank: int, targets: tuple[str, ...]) -> None:
    adapter = write_random_adapter(tmp_path, base, rank=rank, targets=targets, alpha=5)
    runner, reference, prompt = make_runner(base), load_reference(base, adapter), random_tokens(70, seed=0)
    hook = land_adapter(runner, adapter)
    logits = runner.run([(runner.add(prompt, 70), 70, 70)], hook)
    exact = reference_logits(reference, prompt)
    assert logprob_error(exact, reference_logits(load_reference(base), prompt)) > 0.5
    assert logprob_error(logits, exact) < 1e-4
    assert runner.greedy([prompt[:40]], 64, hook) == [reference_greedy(reference, prompt[:40], 64)]


def test_hook_calls_come_in_order(base: Path, tmp_path: Path) -> None:
    runner = make_runner(base)
    hook = land_adapter(runner, write_random_adapter(tmp_path, base, rank=2))
    runner.run([(runner.add((5, 6, 7), 3), 3, 1)], hook)
    steps = [f"{step} {point.value}" for point in LoraPoint for step in ("begin", "finish")]
    assert hook.calls == [(step, layer) for layer in range(3) for step in ("enter", *steps, "leave")]


def test_pass_rests_while_a_hook_waits(base: Path, tmp_path: Path) -> None:
    """Waiting changes how often the pass yields and nothing else."""
    adapter = write_random_adapter(tmp_path, base, rank=8, targets=ALL_TARGETS)
    prompt = random_tokens(30, seed=0)
    runner = make_runner(base)
    prompt_logits = runner.run([(runner.add(prompt, 30), 30, 30)], land_adapter(runner, adapter))
    assert runner.yields == 2
    runner = make_runner(base)
    waiting_logits = runner.run([(runner.add(prompt, 30), 30, 30)], land_adapter(runner, adapter, waits=3))
    assert runner.yields == 2 + 3 * (1 + len(LoraPoint)) * 3
    assert torch.equal(prompt_logits, waiting_logits)


def test_null_lora_adds_nothing() -> None:
    hook = NullLora()
    out = torch.zeros(2, 128)
    assert list(hook.enter_layer(0)) == []
    hook.begin(0, LoraPoint.QKV, out)
    assert list(hook.finish(0, LoraPoint.QKV, out, out)) == []
    hook.leave_layer(0)
    assert (out == 0).all()

"""The kernels of one engine, compiled before it serves: FlashInfer's side by side into its cache, then Triton's.

FlashInfer compiles a module when it is first called, one after the other, and Triton a kernel when it is first
launched. An engine would do so within its first requests, and the first of all would take minutes.
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, TypeAlias

import torch
from filelock import FileLock
from torch import Tensor

from segue.config import ConfigError
from segue.engine.cuda.lora import KernelLora
from segue.engine.lora.points import LoraPoint
from segue.engine.memory.pool import PagePool
from segue.engine.sampler import Sampler
from segue.engine.sampling import SamplingRow
from segue.engine.sampling_params import SamplingParams
from segue.gpu_kernels.host_rows import add_rows, pack_rows
from segue.gpu_kernels.lora_tiles import Regime
from segue.gpu_kernels.rope_kv import rotate_and_store

_LOG = logging.getLogger(__name__)

# Told the stage, how many of its parts are done, and how many there are.
Report: TypeAlias = Callable[[str, int, int], None]


class ModuleSpec(Protocol):
    """What is used of FlashInfer's JitSpec: one shared library, and the file that tells ninja how to build it."""

    @property
    def name(self) -> str: ...

    @property
    def sources(self) -> Sequence[Path]: ...

    @property
    def is_aot(self) -> bool:
        """Whether a package has brought the library."""
        ...

    @property
    def build_dir(self) -> Path: ...

    @property
    def ninja_path(self) -> Path: ...

    @property
    def lock_path(self) -> Path: ...

    def write_ninja(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    """One of FlashInfer's modules. ``load`` has FlashInfer keep it, so that the first call finds it."""

    spec: ModuleSpec
    load: Callable[[], object]


def flashinfer_modules(dtype: torch.dtype, head_dim: int, windows: Iterable[int | None]) -> list[Module]:
    """What ``attention``, ``graph_attention`` and ``ops`` call, for a model whose layers have these ``windows``."""
    from flashinfer import activation, decode, norm, prefill
    from flashinfer.jit.activation import gen_act_and_mul_module
    from flashinfer.jit.attention import gen_batch_decode_module, gen_batch_prefill_module
    from flashinfer.jit.norm import gen_norm_module

    modules = [
        Module(spec=gen_norm_module(), load=norm.get_norm_module),
        Module(spec=gen_act_and_mul_module("silu"), load=partial(activation.get_act_and_mul_module, "silu")),
    ]
    for windowed in sorted({window is not None for window in windows}):
        # As the wrapper's plan asks for it: dtypes of q, KV, output and indices, two head dims, no rotary embedding,
        # a window or none, no soft cap, and float32 products.
        kind = ("fa2", dtype, dtype, dtype, torch.int32, head_dim, head_dim, 0, windowed, False, False)
        modules.append(
            Module(spec=gen_batch_prefill_module(*kind), load=partial(prefill.get_batch_prefill_module, *kind))
        )
        # The same, but without the kind of the products.
        row = (dtype, dtype, dtype, torch.int32, head_dim, head_dim, 0, windowed, False)
        modules.append(Module(spec=gen_batch_decode_module(*row), load=partial(decode.get_batch_decode_module, *row)))
    return modules


def compile_modules(modules: Sequence[Module], report: Report, *, cores: int) -> None:
    """Compile what is missing in FlashInfer's cache, on ``cores`` cores, and load all. Raises ConfigError."""
    build([module.spec for module in modules], report, cores=cores)
    for module in modules:
        module.load()


def build(specs: Sequence[ModuleSpec], report: Report, *, cores: int) -> None:
    """Have ninja bring every library up to date, those with most sources first. Raises ConfigError when one fails.

    ``report`` counts files, and is called from several threads, one at a time.
    """
    missing = sorted((spec for spec in specs if not spec.is_aot), key=lambda spec: -len(spec.sources))
    if not missing:
        return
    progress = _Progress(missing, report)
    budget = _Cores(cores)
    with ThreadPoolExecutor(len(missing), thread_name_prefix="compile") as executor:
        for ended in [executor.submit(_build, spec, budget, progress) for spec in missing]:
            ended.result()


def compile_lora(lora: KernelLora, report: Report, dtype: torch.dtype) -> None:
    """Launch the LoRA kernels once for each LoRA point and regime, with nothing to do."""
    device = lora.tables.page_tables.device
    workspace = lora.workspace()
    kinds = [(regime, point) for regime in Regime for point in LoraPoint]
    for done, (regime, point) in enumerate(kinds):
        report("compile LoRA kernels", done, len(kinds))
        shape = lora.points[point]
        x = torch.zeros(16, shape.in_features, dtype=dtype, device=device)
        out = torch.zeros(16, sum(shape.out_features), dtype=dtype, device=device)
        words, _ = lora.capacity(point, regime, 1)
        plan = torch.zeros(words, dtype=torch.int32, device=device)
        lora.launch(0, point, x, out, plan, workspace, lora.tiles[regime])
    report("compile LoRA kernels", len(kinds), len(kinds))


def compile_host_rows(report: Report, dtype: torch.dtype, device: torch.device) -> None:
    """Carry rows to host memory and back, at widths that are multiples of 16."""
    report("compile kernels of CPU rows", 0, 1)
    rows = torch.zeros(1, 16, dtype=dtype, device=device)
    buffer = torch.zeros(1, 16, dtype=dtype, pin_memory=device.type == "cuda")
    pack_rows(rows, None, buffer)
    add_rows(buffer, None, rows, [(0, 0, 16)])
    # The buffer may not serve anybody else before.
    rows.cpu()
    report("compile kernels of CPU rows", 1, 1)


def compile_rotation(report: Report, pool: PagePool, heads: int, table: Tensor) -> None:
    """Rotate and store a row that nobody asked for."""
    report("compile the kernel of rotary embedding", 0, 1)
    row = torch.zeros(1, heads + 2 * pool.kv_heads, pool.head_dim, dtype=pool.dtype, device=table.device)
    q, k, v = torch.split(row, [heads, pool.kv_heads, pool.kv_heads], dim=1)
    places = (0, pool.padding_page * pool.page_tokens)
    position, slot = (torch.full((1,), place, dtype=torch.int32, device=table.device) for place in places)
    rotate_and_store(q, k, v, position, slot, table, pool.kv(0))
    report("compile the kernel of rotary embedding", 1, 1)


def compile_sampler(sampler: Sampler, report: Report, vocab: int, dtype: torch.dtype, device: torch.device) -> None:
    """Choose a token by everything that a row can ask for, from logits in ``dtype``."""
    report("compile sampling kernels", 0, 1)
    params = SamplingParams(seed=0, temperature=1.0, top_k=2, top_p=0.5, logit_bias={0: 1.0}, logprobs=1)
    sampler.launch(torch.zeros(1, vocab, dtype=dtype, device=device), [SamplingRow(params=params, position=0)]).read()
    report("compile sampling kernels", 1, 1)


class _Cores:
    """Cores that threads share out among themselves."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = count
        self._changed = threading.Condition()

    def take(self, count: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._free >= count)
            self._free -= count

    def give_back(self, count: int) -> None:
        with self._changed:
            self._free += count
            self._changed.notify_all()


class _Progress:
    """How many files of all modules are done: each module's objects and its library."""

    def __init__(self, specs: Iterable[ModuleSpec], report: Report) -> None:
        self._report = report
        self._files = {spec.name: len(spec.sources) + 1 for spec in specs}
        self._done = dict.fromkeys(self._files, 0)
        self._lock = threading.Lock()
        self._tell()

    def finished(self, name: str, files: int | None = None) -> None:
        """So many files of a module are done, all by default."""
        with self._lock:
            self._done[name] = self._files[name] if files is None else min(files, self._files[name])
            self._tell()

    def _tell(self) -> None:
        self._report("compile FlashInfer kernels", sum(self._done.values()), sum(self._files.values()))


def _build(spec: ModuleSpec, budget: _Cores, progress: _Progress) -> None:
    cores = min(budget.count, len(spec.sources))
    # Another engine may be at it, with this lock; then there is nothing left to do.
    with FileLock(spec.lock_path):
        budget.take(cores)
        try:
            spec.write_ninja()
            _run_ninja(spec, cores, progress)
        finally:
            budget.give_back(cores)
    progress.finished(spec.name)


def _run_ninja(spec: ModuleSpec, cores: int, progress: _Progress) -> None:
    """Raises ConfigError with the first line that names an error.

    Should this process die, ninja ends when it has the next file to report.
    """
    command = ["ninja", "-C", str(spec.build_dir), "-f", str(spec.ninja_path), "-j", str(cores)]
    output = []
    with subprocess.Popen(
        command,
        env={**os.environ, "NINJA_STATUS": "[%f/%t] "},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as ninja:
        assert ninja.stdout is not None
        for line in ninja.stdout:
            output.append(line)
            finished = re.match(r"\[(\d+)/\d+\]", line)
            if finished:
                progress.finished(spec.name, int(finished[1]))
    if ninja.returncode != 0:
        _LOG.error("FlashInfer's module %s does not compile:\n%s", spec.name, "".join(output))
        reasons = [line for line in output if re.search(r": (fatal )?error\b|nvcc fatal", line)] or output[-1:]
        raise ConfigError(f"device: FlashInfer's module {spec.name} does not compile: {''.join(reasons[:1]).strip()}")

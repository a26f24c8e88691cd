"""What an engine on CUDA computes with, put together from the model's shape and dtype."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial

import torch

from segue.engine.attention import TorchAttention
from segue.engine.backend import Backend
from segue.engine.config import EngineConfig
from segue.engine.cuda.attention import SERVED_DTYPES, SERVED_HEAD_DIMS, FlashInferAttention
from segue.engine.cuda.batch_graphs import BatchGraphs
from segue.engine.cuda.batch_shapes import PASS_SETS, BatchShape, batch_shapes, pass_shapes
from segue.engine.cuda.compile import (
    Report,
    compile_host_rows,
    compile_lora,
    compile_modules,
    compile_rotation,
    compile_sampler,
    flashinfer_modules,
)
from segue.engine.cuda.graph_attention import RecordedAttention
from segue.engine.cuda.graph_recorder import GraphRecorder
from segue.engine.cuda.graph_set import GraphSet
from segue.engine.cuda.lora import KernelLora, LoraSizes
from segue.engine.cuda.ops import CudaOps
from segue.engine.cuda.pass_graphs import PassGraphs, PassGraphSets
from segue.engine.cuda.reserve import MAX_TABLE_ROWS, adapter_pages, max_rows
from segue.engine.cuda.sampler import KernelSampler
from segue.engine.lora.store import AdapterStore
from segue.engine.memory.pool import PagePool
from segue.engine.models.decoder import DecoderModel
from segue.engine.models.rope import RotaryEmbedding


def cuda_backend(
    config: EngineConfig,
    model: DecoderModel,
    pool: PagePool,
    store: AdapterStore,
    *,
    chunk_elems: int,
    context_tokens: int,
    report: Report,
) -> Backend:
    """FlashInfer and CUDA graphs where they serve the dtype and the head dim, else torch, pass by pass.

    Has the model's small operations run in FlashInfer as well. ``report`` is told what is being compiled.
    """
    projections = dict(model.config.projection_shapes())
    sizes = LoraSizes(
        # So that the tables of every layer begin at 16 bytes: else Triton compiles the kernels for both cases.
        adapters=-(-min(pool.pages, MAX_TABLE_ROWS) // 16) * 16,
        adapter_pages=adapter_pages(config, model.config, pool.page_elems, chunk_elems),
        max_rank=config.max_lora_rank,
        max_rows=max_rows(config),
    )
    processors = torch.cuda.get_device_properties(model.device).multi_processor_count
    lora = KernelLora(store, pool, sizes, projections, chunk_elems, processors)
    compile_lora(lora, report, pool.dtype)
    compile_host_rows(report, pool.dtype, model.device)
    sampler = KernelSampler()
    compile_sampler(sampler, report, model.config.vocab_size, pool.dtype, model.device)
    windows = model.config.sliding_windows
    rotary = RotaryEmbedding(model.config.rope, model.config.head_dim, model.device)
    if pool.dtype not in SERVED_DTYPES or pool.head_dim not in SERVED_HEAD_DIMS:
        return Backend(lora=lora, attention=TorchAttention(pool, windows, rotary), sampler=sampler)
    cores = len(os.sched_getaffinity(0))
    compile_modules(flashinfer_modules(pool.dtype, pool.head_dim, windows), report, cores=cores)
    model.use(CudaOps(model.config))
    table = rotary.table(context_tokens)
    compile_rotation(report, pool, model.config.heads, table)
    attention = FlashInferAttention(pool, windows, model.config.heads, table)

    def graph_set(shapes: Sequence[BatchShape]) -> GraphSet:
        recorded = RecordedAttention(pool, windows, model.config.heads, table, shapes)
        limits = {"max_sequences": config.max_running, "context_tokens": context_tokens}
        return GraphSet(model, pool, recorded, lora, shapes, **limits)

    batches = BatchGraphs(
        model, graph_set(batch_shapes(sizes.max_rows, config.max_running)), GraphRecorder(model.device)
    )
    shapes = pass_shapes(config.budget_tokens, config.max_running)
    passes = PassGraphSets(
        [PassGraphs(model, graph_set(shapes), GraphRecorder(model.device)) for _ in range(PASS_SETS)]
    )
    if config.record_ahead:
        batches.record_all(partial(report, "record CUDA graphs"))
        passes.record_all(partial(report, "record CUDA graphs of passes"))
    return Backend(lora=lora, attention=attention, batches=batches, passes=passes, sampler=sampler)

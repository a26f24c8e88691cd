"""What an engine on CUDA allocates beside the weights and the pool, in bytes, reckoned before any of it is there."""

from __future__ import annotations

from collections.abc import Sequence

from segue.engine.config import EngineConfig
from segue.engine.cuda.adapter_tables import RowLayout
from segue.engine.cuda.batch_shapes import (
    ATTENTION_BYTES,
    PASS_SETS,
    PLAN_BYTES,
    BatchShape,
    batch_shapes,
    pass_shapes,
    workspace_bytes,
)
from segue.engine.device import CudaStreams
from segue.engine.lora.points import POINT_PROJECTIONS
from segue.engine.memory.adapter_layout import choose_chunk_elems
from segue.engine.models.config import ModelConfig
from segue.engine.pool_size import staging_bytes
from segue.gpu_kernels.lora_tiles import PointShape, Regime, choose_tiles
from segue.gpu_kernels.lora_work import plan_capacity
from segue.scheduler.plan import pages_for

MAX_TABLE_ROWS = 4096
# Kernels' code, cuBLAS's workspaces and the nodes of some hundred graphs.
_CODE_BYTES = 2 << 30
# A layer's graph, of some 15 nodes; and how many of each shape there may be: by LoRA points and kinds of tiles.
_LAYER_GRAPH_BYTES = 64 << 10
_PASS_KINDS = 6
# Sampling holds logits, those of its rows, edited ones, keys, and what torch takes to find the most likely tokens.
_LOGIT_COPIES = 6


def max_rows(config: EngineConfig) -> int:
    """Rows of the largest batch or pass."""
    return max(config.budget_tokens, config.chunk_tokens + config.max_running)


def device_reserve(
    config: EngineConfig, model: ModelConfig, *, item_bytes: int, context_tokens: int, processors: int
) -> dict[str, int]:
    """Bytes by what they are for. ``processors`` are the device's multiprocessors."""
    shapes = batch_shapes(max_rows(config), config.max_running)
    of_passes = pass_shapes(config.budget_tokens, config.max_running)
    windows = len(set(model.sliding_windows))
    wrappers = windows * (2 + config.max_passes + PASS_SETS)
    recorded = _workspace_bytes(shapes, model, processors) + PASS_SETS * _workspace_bytes(of_passes, model, processors)
    attention = ATTENTION_BYTES * (1 + config.max_passes) + context_tokens * model.head_dim * 4
    logit_rows = _LOGIT_COPIES * (config.max_running + config.max_passes)
    logit_rows += max(shape.sequences for shape in shapes)
    logit_rows += PASS_SETS * max(shape.sequences for shape in of_passes)
    context_pages = pages_for(context_tokens, config.page_tokens)
    return {
        "activations": _activation_bytes(config, model, item_bytes),
        "logits": logit_rows * model.vocab_size * 4,
        "attention": attention + recorded + wrappers * PLAN_BYTES,
        "page tables": 4 * context_pages * (config.max_running * (1 + PASS_SETS) + config.max_passes),
        "LoRA plans and tables": _lora_bytes(config, model, item_bytes, processors),
        "staging": CudaStreams.staging_slots * staging_bytes(config, model, item_bytes),
        "code": _CODE_BYTES,
        "layers' graphs": PASS_SETS * len(of_passes) * _PASS_KINDS * (model.layers + 2) * _LAYER_GRAPH_BYTES,
    }


def _workspace_bytes(shapes: Sequence[BatchShape], model: ModelConfig, processors: int) -> int:
    """Of the attention of recorded passes of these shapes, one after the other."""
    return max(workspace_bytes(shape, model.heads, model.kv_heads, model.head_dim, processors) for shape in shapes)


def _activation_bytes(config: EngineConfig, model: ModelConfig, item_bytes: int) -> int:
    """A pass that runs, as the recorded ones may all do, holds residual, hidden states and both sides of every product;
    one that rests, what it needs to go on: residual, hidden states and the output of the point that it rests at."""
    q, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim
    hidden, inner = model.hidden_size, model.intermediate_size
    recorded = PASS_SETS * max(shape.rows for shape in pass_shapes(config.budget_tokens, config.max_running))
    running = (max_rows(config) + recorded) * (4 * hidden + 2 * q + 2 * kv + 3 * inner)
    resting = config.max_passes * config.budget_tokens * (2 * hidden + max(q + 2 * kv, 2 * inner))
    return (running + resting) * item_bytes


def _lora_bytes(config: EngineConfig, model: ModelConfig, item_bytes: int, processors: int) -> int:
    """The partials of the largest plan, for batches and for each pass; plans for each point, and adapters' tables."""
    shapes = dict(model.projection_shapes())
    page_elems = 2 * config.page_tokens * model.kv_heads * model.head_dim
    chunk_elems = choose_chunk_elems(page_elems, {width for shape in shapes.values() for width in shape})
    partials = plans = 0
    for projections in POINT_PROJECTIONS.values():
        point = PointShape(
            in_features=shapes[projections[0]][0],
            out_features=tuple(shapes[projection][1] for projection in projections),
        )
        capacities = [
            plan_capacity(
                point,
                choose_tiles(
                    regime,
                    chunk_elems=chunk_elems,
                    page_elems=page_elems,
                    element_bytes=item_bytes,
                    multiprocessors=processors,
                ),
                max_segments=max_rows(config),
                max_rows=max_rows(config),
                max_rank=config.max_lora_rank,
            )
            for regime in Regime
        ]
        partials = max(partials, *(capacity.workspace_elems for capacity in capacities))
        plans += max(capacity.words for capacity in capacities)
    table = RowLayout.plan(adapter_pages(config, model, page_elems, chunk_elems), model.layers).words
    recorded = 1 + PASS_SETS
    return 4 * (partials * (1 + recorded + config.max_passes) + recorded * plans + MAX_TABLE_ROWS * table)


def adapter_pages(config: EngineConfig, model: ModelConfig, page_elems: int, chunk_elems: int) -> int:
    """Pages of the largest adapter that is served: every projection in the largest rank."""
    widths = (width for shape in model.projection_shapes().values() for width in shape)
    return -(-config.max_lora_rank * sum(-(-width // chunk_elems) * chunk_elems for width in widths) // page_elems)

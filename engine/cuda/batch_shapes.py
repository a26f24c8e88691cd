"""How large recorded batches are. Pure integers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

# FlashInfer's workspace for partial results where no shape bounds them, and what its wrappers take for a plan.
ATTENTION_BYTES = 256 << 20
PLAN_BYTES = 8 << 20
# Query heads for each head of KV that FlashInfer's kernel for decode is compiled for.
DECODE_GROUPS = (1, 2, 3, 4, 8)
# Decode: from so many sequences on, and up to so many tokens of KV each on average, rows are served one by one.
_LARGE_DECODE = 96
_SHORT_KV_TOKENS = 256
# Rows of large prompts: KV up to here is not split. There is enough to do, and merging takes more than it saves.
_WHOLE_KV_TOKENS = 4096
# At most so many programs of 128 threads are on a multiprocessor.
_DECODE_PROGRAMS = 16


@dataclass(frozen=True, slots=True, order=True)
class BatchShape:
    """How many rows and sequences a recorded batch has room for. In one that ``decodes`` each sequence has one row."""

    rows: int
    sequences: int
    decodes: bool = False

    def holds(self, rows: int, sequences: int) -> bool:
        """Whether a batch fits. Rows that are not used belong to a sequence that is not used."""
        if self.decodes:
            return rows == sequences <= self.sequences
        return rows <= self.rows and (sequences < self.sequences or (sequences == self.sequences and rows == self.rows))


class AttentionKind(Enum):
    """How a batch's attention is computed: tiles of rows with the KV of each sequence SPLIT among programs or WHOLE, or
    single ROWS without tensor cores."""

    SPLIT = "split"
    WHOLE = "whole"
    ROWS = "rows"


def attention_kinds(shape: BatchShape, group: int) -> tuple[AttentionKind, ...]:
    """What serves a shape with ``group`` query heads for each of KV, but for batches of prompts with long KV."""
    if not shape.decodes:
        return (AttentionKind.SPLIT if shape.sequences == shape.rows else AttentionKind.WHOLE,)
    served = group in DECODE_GROUPS and shape.sequences >= _LARGE_DECODE
    return (AttentionKind.SPLIT, AttentionKind.ROWS) if served else (AttentionKind.SPLIT,)


def attention_kind(shape: BatchShape, group: int, total_tokens: Sequence[int]) -> AttentionKind:
    """What serves sequences with so many tokens in KV best, as measured on an H200: docs/notes-cuda-engine.md."""
    kinds = attention_kinds(shape, group)
    if AttentionKind.ROWS in kinds and sum(total_tokens) <= _SHORT_KV_TOKENS * len(total_tokens):
        return AttentionKind.ROWS
    return AttentionKind.SPLIT if max(total_tokens) > _WHOLE_KV_TOKENS else kinds[0]


# Up to so many rows a shape has a sequence for each: FlashInfer's kernel then takes 16 query rows at a time, and there
# are programs for all multiprocessors. Beyond, it takes 128.
_SMALL_TILE_ROWS = 128


def batch_shapes(max_rows: int, max_sequences: int) -> tuple[BatchShape, ...]:
    """The shapes that are recorded, in the order in which they are tried.

    First those of batches that only decode: 1, 2, 4, then every 8 sequences to 64, every 16 to 256, every 64 beyond.
    Then those with rows of prompts: every 16 rows to 64, every 32 to 256, every 64 to 512, every 256 beyond; above 128
    a quarter of them is free for rows behind each sequence's first.
    """
    decodes = {1, 2, 4, *range(8, 65, 8), *range(80, 257, 16), *range(320, max_sequences, 64)}
    sizes = [*sorted(size for size in decodes if size < max_sequences), max_sequences]
    mixed = {*range(16, 65, 16), *range(96, 257, 32), *range(320, 513, 64), *range(768, max_rows, 256)}
    rows = [*sorted(size for size in mixed if size < max_rows), max_rows]
    return (
        *(BatchShape(size, size, decodes=True) for size in sizes),
        *(BatchShape(count, _mixed_sequences(count, max_sequences)) for count in rows if count > 1),
    )


# Passes of loading adapters that have memory of their own for graphs of their layers.
PASS_SETS = 2
# Beyond the last, a layer takes the device longer than it takes the host to enqueue it operation by operation.
_PASS_ROWS = (16, 32, 64, 96, 128, 192, 256, 384, 512)


def pass_shapes(max_rows: int, max_sequences: int) -> tuple[BatchShape, ...]:
    """The shapes of passes whose layers are recorded, in the order in which they are tried."""
    rows = [*(count for count in _PASS_ROWS if count < max_rows), min(max_rows, _PASS_ROWS[-1])]
    return tuple(BatchShape(count, _mixed_sequences(count, max_sequences)) for count in dict.fromkeys(rows))


def _mixed_sequences(rows: int, max_sequences: int) -> int:
    return rows if rows <= _SMALL_TILE_ROWS else min(max_sequences + 1, 3 * rows // 4)


def prompt_tiles(shape: BatchShape, heads: int, kv_heads: int, head_dim: int, multiprocessors: int) -> tuple[int, int]:
    """Query rows of a tile, and programs for each head of KV, of FlashInfer's kernel for prompts.

    As PrefillPlan in FlashInfer 0.6 reckons for graphs.
    """
    group = heads // kv_heads
    longest = max(0, shape.rows - shape.sequences + 1) * group
    tile_rows = 16 if longest <= 16 else 64 if longest <= 64 or head_dim >= 256 else 128
    tiles = -(-shape.rows * group // tile_rows) + shape.sequences - 1
    return tile_rows, max(2 * multiprocessors // kv_heads, tiles)


def workspace_bytes(shape: BatchShape, heads: int, kv_heads: int, head_dim: int, multiprocessors: int) -> int:
    """What FlashInfer's plan of a shape takes of its workspace: float32 partial results of all parts of the work.

    As DecodePlan and PrefillPlan in FlashInfer 0.6 reckon for graphs, with a kilobyte for alignment.
    """
    tile_rows, programs = prompt_tiles(shape, heads, kv_heads, head_dim, multiprocessors)
    rows = programs * tile_rows
    if shape.decodes and heads // kv_heads in DECODE_GROUPS:
        rows = max(rows, _DECODE_PROGRAMS * multiprocessors // kv_heads)
    return heads * rows * (head_dim + 1) * 4 + 1024

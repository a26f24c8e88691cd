"""How large recorded batches are. Pure integers."""

from __future__ import annotations

from dataclasses import dataclass

# FlashInfer's workspace for partial results where no shape bounds them, and what its wrappers take for a plan.
ATTENTION_BYTES = 256 << 20
PLAN_BYTES = 8 << 20
# Query heads for each head of KV that FlashInfer's kernel for decode is compiled for.
DECODE_GROUPS = (1, 2, 3, 4, 8)
# At most so many programs of 128 threads are on a multiprocessor.
_DECODE_PROGRAMS = 16


@dataclass(frozen=True, slots=True, order=True)
class BatchShape:
    """How many rows and sequences a recorded batch has room for. Where they are equal, it ``decodes``: each sequence
    has one row."""

    rows: int
    sequences: int

    @property
    def decodes(self) -> bool:
        return self.rows == self.sequences

    def holds(self, rows: int, sequences: int) -> bool:
        """Whether a batch fits. Rows that are not used belong to a sequence that is not used."""
        if self.decodes:
            return rows == sequences <= self.sequences
        return rows <= self.rows and (sequences < self.sequences or (sequences == self.sequences and rows == self.rows))


def batch_shapes(max_rows: int, max_sequences: int) -> tuple[BatchShape, ...]:
    """The shapes that are recorded, in the order in which they are tried.

    First those of batches that only decode: 1, 2, 4, then every 8 sequences to 64, every 16 to 256, every 64 beyond.
    Then those with rows of prompts: every 16 rows to 64, every 32 to 256, every 64 to 512, every 256 beyond, a quarter
    of them free for rows behind each sequence's first.
    """
    decodes = {1, 2, 4, *range(8, 65, 8), *range(80, 257, 16), *range(320, max_sequences, 64)}
    sizes = [*sorted(size for size in decodes if size < max_sequences), max_sequences]
    mixed = {*range(16, 65, 16), *range(96, 257, 32), *range(320, 513, 64), *range(768, max_rows, 256)}
    rows = [*sorted(size for size in mixed if size < max_rows), max_rows]
    return (
        *(BatchShape(size, size) for size in sizes),
        *(BatchShape(count, min(max_sequences + 1, 3 * count // 4)) for count in rows if count > 1),
    )


def workspace_bytes(shape: BatchShape, heads: int, kv_heads: int, head_dim: int, multiprocessors: int) -> int:
    """What FlashInfer's plan of a shape takes of its workspace: float32 partial results of all parts of the work.

    As DecodePlan and PrefillPlan in FlashInfer 0.6 reckon for graphs, with a kilobyte for alignment.
    """
    group = heads // kv_heads
    if shape.decodes and group in DECODE_GROUPS:
        rows = _DECODE_PROGRAMS * multiprocessors // kv_heads
    else:
        longest = max(0, shape.rows - shape.sequences + 1) * group
        tile_rows = 16 if longest <= 16 else 64 if longest <= 64 or head_dim >= 256 else 128
        tiles = -(-shape.rows * group // tile_rows) + shape.sequences - 1
        rows = max(2 * multiprocessors // kv_heads, tiles) * tile_rows
    return heads * rows * (head_dim + 1) * 4 + 1024

"""Recorded batches without a GPU: a recorder that does everything again, and attention in torch on the same buffers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from segue.engine.attention import write_kv
from segue.engine.cuda.batch_inputs import BatchInputs
from segue.engine.cuda.batch_shapes import AttentionKind
from segue.engine.memory.pool import PagePool
from segue.engine.models.rope import RotaryEmbedding, apply_rotary


class FakeRecorder:
    """Runs a pass again where a CUDA graph would be replayed. ``replays`` counts, by rows."""

    def __init__(self) -> None:
        self.recorded: list[int] = []
        self.replays: list[int] = []

    def record(self, run: Callable[[], None], rows: int) -> Callable[[], None]:
        self.recorded.append(rows)
        run()

        def replay() -> None:
            self.replays.append(rows)
            run()

        return replay


class FakeBatchAttention:
    """See BatchAttention; ``windows`` has each layer's."""

    def __init__(self, pool: PagePool, windows: Sequence[int | None], rotary: RotaryEmbedding) -> None:
        self._pool = pool
        self._windows = tuple(windows)
        self._rotary = rotary

    def begin(self, inputs: BatchInputs, kind: AttentionKind) -> FakeRecordedAttention:
        return FakeRecordedAttention(self._pool, self._windows, self._rotary, inputs, kind)


class FakeRecordedAttention:
    """Reads what FlashInfer's kernels read: the inputs' buffers on the device. Rows that are not used get NaN."""

    def __init__(
        self,
        pool: PagePool,
        windows: tuple[int | None, ...],
        rotary: RotaryEmbedding,
        inputs: BatchInputs,
        kind: AttentionKind,
    ) -> None:
        self._pool = pool
        self._windows = windows
        self._rotary = rotary
        self._inputs = inputs
        self._kind = kind
        self._planned: list[int] = []

    def plan(self) -> None:
        self._planned = self._inputs.host.row_indptr.tolist()
        if self._kind is AttentionKind.ROWS:
            assert max(stop - start for start, stop in zip(self._planned, self._planned[1:], strict=False)) <= 1

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        at, kv, page_tokens = self._inputs.on_device, self._pool.kv(layer), self._pool.page_tokens
        assert at.row_indptr.tolist() == self._planned, "planned for another batch"
        cos, sin = self._rotary.cos_sin(at.positions.long(), q.dtype)
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        write_kv(kv, at.slots.long() // page_tokens, at.slots.long() % page_tokens, k, v)
        out = torch.full_like(q, torch.nan)
        bounds = zip(self._planned, self._planned[1:], strict=False)
        for index, (start, stop) in enumerate(bounds):
            if start < stop:
                pages = at.indices[int(at.indptr[index]) : int(at.indptr[index + 1])].long()
                tokens = (len(pages) - 1) * page_tokens + int(at.last_page_tokens[index])
                own = kv[pages].transpose(0, 1).flatten(1, 2)[:, :tokens]
                out[start:stop] = _attend(q[start:stop], own[0], own[1], self._windows[layer])
        return out

    def close(self) -> None:
        """It is used again."""


def _attend(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """The last rows of a sequence: q [rows, heads, dim], k and v [tokens, kv_heads, dim]."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    query = torch.arange(len(k) - len(q), len(k))[:, None]
    key = torch.arange(len(k))[None, :]
    hidden = (key > query) if window is None else (key > query) | (key <= query - window)
    scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v)

"""What recorded passes share: shapes, inputs, LoRA plans, attention and logits, in memory that stays."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor

from segue.engine.attention import AttentionStep
from segue.engine.batch import RowBatch
from segue.engine.cuda.batch_inputs import BatchInputs, BatchMemory
from segue.engine.cuda.batch_shapes import AttentionKind, BatchShape, attention_kind, attention_kinds
from segue.engine.cuda.lora import GraphLora, GraphPlans, KernelLora, regime_of
from segue.engine.forward_pass import RequestRows
from segue.engine.lora.device_lora import LoraSegment
from segue.engine.lora.points import LoraPoint
from segue.engine.memory.pool import PagePool
from segue.engine.models.decoder import DecoderModel
from segue.gpu_kernels.lora_tiles import Regime


class RecordableAttention(AttentionStep, Protocol):
    """Attention whose launches find all that changes from run to run in buffers that stay."""

    def plan(self) -> None:
        """Divide the work of the inputs, which are filled. All runs but the last must have ended."""
        ...


class BatchAttention(Protocol):
    """Makes the attention of recorded passes, which share memory, since one runs after the other."""

    def begin(self, inputs: BatchInputs, kind: AttentionKind) -> RecordableAttention:
        """The attention of the batches that these inputs bring."""
        ...


class Recorder(Protocol):
    """Records what a pass enqueues, to do it again by one call."""

    def record(self, run: Callable[[], None], rows: int) -> Callable[[], None]:
        """What does again what ``run``, work of ``rows`` rows, enqueues: on the same memory. Runs it, too."""
        ...


class Variant(Enum):
    """Which LoRA points a graph has launches for: a point without work costs its launches all the same."""

    BASE = frozenset[LoraPoint]()
    ATTENTION = frozenset({LoraPoint.QKV, LoraPoint.O})
    ALL = frozenset(LoraPoint)


@dataclass(frozen=True, slots=True)
class GraphKind:
    """What is recorded once. Without LoRA all regimes are alike: it is FEW then."""

    shape: BatchShape
    attention: AttentionKind
    variant: Variant
    regime: Regime


@dataclass(frozen=True, slots=True)
class GraphParts:
    """What the graphs of a kind read: all but the weights."""

    inputs: BatchInputs
    batch: RowBatch
    attention: RecordableAttention
    lora: GraphLora
    logits: Tensor

    def fill(self, rows: Sequence[RequestRows]) -> None:
        """Bring these rows to where the graphs look for them. All runs but the last have ended."""
        self.inputs.fill(rows)
        self.attention.plan()


class GraphSet:
    """The parts of the graphs of some shapes, of which one runs at a time."""

    def __init__(
        self,
        model: DecoderModel,
        pool: PagePool,
        attention: BatchAttention,
        lora: KernelLora,
        shapes: Sequence[BatchShape],
        *,
        max_sequences: int,
        context_tokens: int,
    ) -> None:
        """``shapes`` in the order in which they are tried; ``context_tokens`` bounds each sequence."""
        self._pool = pool
        self._lora = lora
        self._attention = attention
        self._group = model.config.heads // model.config.kv_heads
        self.shapes = tuple(shapes)
        largest = BatchShape(max(item.rows for item in self.shapes), max(item.sequences for item in self.shapes))
        self._plans = GraphPlans(lora, largest.rows)
        max_pages = pool.token_pages(context_tokens) * max_sequences
        self._memory = BatchMemory(largest, max_pages, model.device)
        self._inputs: dict[BatchShape, BatchInputs] = {}
        self._attentions: dict[tuple[BatchShape, AttentionKind], RecordableAttention] = {}
        self._logits = torch.empty(largest.sequences, model.config.vocab_size, dtype=pool.dtype, device=model.device)

    def choose(self, rows: Sequence[RequestRows], segments: Sequence[LoraSegment]) -> GraphKind | None:
        """What runs these rows, whose LoRA plans are the graphs' from now on; None where no shape holds them."""
        row_count = sum(item.count for item in rows)
        shape = next((shape for shape in self.shapes if shape.holds(row_count, len(rows))), None)
        if shape is None:
            return None
        located = self._lora.locate(segments)
        regime = self._lora.regime(located)
        used = self._plans.fill(located, regime)
        variant = next(item for item in Variant if used <= item.value)
        attention = attention_kind(shape, self._group, [item.start + item.count for item in rows])
        return GraphKind(shape, attention, variant, Regime.FEW if variant is Variant.BASE else regime)

    def prepare(self, kind: GraphKind) -> GraphParts:
        """The parts of a kind, filled with a batch of nothing, to be recorded. No run is under way."""
        inputs, shape = self._inputs_of(kind.shape), kind.shape
        attention = self._attentions.get((shape, kind.attention))
        if attention is None:
            attention = self._attentions[shape, kind.attention] = self._attention.begin(inputs, kind.attention)
        at = inputs.on_device
        parts = GraphParts(
            inputs=inputs,
            batch=RowBatch(
                token_ids=at.token_ids,
                positions=at.positions,
                sequences=(),
                slot_pages=at.positions,
                slot_offsets=at.positions,
                logit_rows=None if shape.decodes else at.logit_rows,
            ),
            attention=attention,
            lora=GraphLora(self._lora, self._plans, kind.variant.value, kind.regime),
            logits=self._logits[: shape.sequences],
        )
        parts.fill(())
        return parts

    def clear_lora(self, regime: Regime) -> None:
        """Have the LoRA plans be those of a batch of the base model."""
        self._plans.fill(self._lora.locate(()), regime)

    def kinds(self) -> Iterator[GraphKind]:
        """All that batches without long KV can need."""
        for shape in self.shapes:
            # Of segments with one row each and of one with all, of low and of high ranks.
            regimes = {regime_of(shape.rows, [rank] * count) for rank in (1, 256) for count in (1, shape.sequences)}
            for attention in attention_kinds(shape, self._group):
                yield GraphKind(shape, attention, Variant.BASE, Regime.FEW)
                for regime in sorted(regimes, key=lambda item: item.value):
                    yield GraphKind(shape, attention, Variant.ATTENTION, regime)
                    yield GraphKind(shape, attention, Variant.ALL, regime)

    def _inputs_of(self, shape: BatchShape) -> BatchInputs:
        inputs = self._inputs.get(shape)
        if inputs is None:
            inputs = BatchInputs(shape, self._memory, self._pool.page_tokens, self._pool.padding_page)
            self._inputs[shape] = inputs
        return inputs

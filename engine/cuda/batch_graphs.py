"""Batches as recorded passes, CUDA graphs: one for each shape and kind of work, replayed whatever is in the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from segue.engine.cuda.graph_set import GraphKind, GraphParts, GraphSet, Recorder
from segue.engine.forward_pass import RequestRows
from segue.engine.lora.device_lora import LoraSegment
from segue.engine.models.decoder import DecoderModel


class BatchGraph:
    """One kind of batch."""

    def __init__(self, model: DecoderModel, parts: GraphParts, recorder: Recorder) -> None:
        """Record the pass."""
        self._parts = parts
        self._replay = recorder.record(lambda: _drain(model, parts), parts.inputs.shape.rows)

    def run(self, rows: Sequence[RequestRows]) -> Tensor:
        """Logits [len(rows), vocab], valid until the next run of any graph.

        All runs but the last have ended.
        """
        self._parts.fill(rows)
        self._replay()
        return self._parts.logits[: len(rows)]


class BatchGraphs:
    """The graphs of a model, each recorded when a batch first needs it, or ahead by ``record_all``."""

    def __init__(self, model: DecoderModel, graphs: GraphSet, recorder: Recorder) -> None:
        """``graphs`` has the shapes; nobody else uses it."""
        self._model = model
        self._set = graphs
        self._recorder = recorder
        self._graphs: dict[GraphKind, BatchGraph] = {}

    def run(self, rows: Sequence[RequestRows], segments: Sequence[LoraSegment]) -> Tensor | None:
        """Logits [len(rows), vocab] of each request's last row, valid until the next run; None where no shape
        holds the batch."""
        kind = self._set.choose(rows, segments)
        return None if kind is None else self._graph(kind).run(rows)

    @torch.inference_mode()
    def record_all(self, report: Callable[[int, int], None]) -> None:
        """Record the graphs of all batches without long KV; ``report`` is told how many of how many there are."""
        kinds = list(self._set.kinds())
        for done, kind in enumerate(kinds):
            report(done, len(kinds))
            self._set.clear_lora(kind.regime)
            self._graph(kind)
        report(len(kinds), len(kinds))

    def _graph(self, kind: GraphKind) -> BatchGraph:
        graph = self._graphs.get(kind)
        if graph is None:
            graph = self._graphs[kind] = BatchGraph(self._model, self._set.prepare(kind), self._recorder)
        return graph


def _drain(model: DecoderModel, parts: GraphParts) -> None:
    """Run a pass that waits for nothing."""
    for _ in model.forward(parts.batch, parts.attention, parts.lora, logits=parts.logits):
        pass

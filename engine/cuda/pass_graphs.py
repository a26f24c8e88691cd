"""Passes of loading adapters as graphs, one for each layer: between two layers a pass still chooses, waits and rests.

Each pass has a set to itself, since it runs beside batches and other passes: hidden states, inputs, plans, workspaces
and logits. A layer that takes deltas from the CPU runs operation by operation on the same memory, so that a pass may go
from the one to the other at any layer.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from segue.engine.cuda.graph_set import GraphKind, GraphParts, GraphSet, Recorder
from segue.engine.forward_pass import RequestRows
from segue.engine.lora.device_lora import LoraSegment
from segue.engine.lora.points import LoraHook
from segue.engine.models.decoder import DecoderModel


class PassLora(LoraHook, Protocol):
    """The hook of a pass."""

    @property
    def is_on_device(self) -> bool:
        """Whether all deltas of the layer that was entered last come from the device's pages."""
        ...


class LayerGraphs:
    """One kind of pass: a graph of what comes before the layers, one of each layer, one of what comes behind them.

    ``x`` and ``residual`` [rows, hidden] are what each of them finds and leaves. Behind the last layer the first rows
    of ``x`` are those whose logits are wanted.
    """

    def __init__(self, model: DecoderModel, parts: GraphParts, x: Tensor, residual: Tensor, recorder: Recorder) -> None:
        """Record all of it."""
        self.parts = parts
        self._model = model
        self._x = x
        self._residual = residual
        rows = parts.inputs.shape.rows
        self.first = recorder.record(self._first, rows)
        self.layers = [recorder.record(partial(self._recorded, layer), rows) for layer in range(model.config.layers)]
        self.last = recorder.record(self._last, rows)

    def by_operations(self, layer: int, lora: LoraHook) -> Generator[None, None, None]:
        """A layer that is not recorded, with other deltas. Yields while ``lora`` waits at a point."""
        x, residual = yield from self._model.layer(
            layer, self._x, self._residual, self.parts.batch, self.parts.attention, lora, in_place=True
        )
        self._keep(x, residual)

    def _first(self) -> None:
        self._keep(*self._model.first(self.parts.batch.token_ids))

    def _recorded(self, layer: int) -> None:
        for _ in self.by_operations(layer, self.parts.lora):
            raise RuntimeError("a layer whose deltas are on the device never waits")

    def _last(self) -> None:
        self._model.last(self._x[: len(self.parts.logits)], self.parts.logits)

    def _keep(self, x: Tensor, residual: Tensor) -> None:
        for target, value in ((self._x, x), (self._residual, residual)):
            # Operations that work in place have left it there.
            if value.data_ptr() != target.data_ptr():
                target[: len(value)].copy_(value)


class RecordedPass:
    """See ``segue.engine.runner.PreparedPass``."""

    def __init__(self, graphs: LayerGraphs, row_count: int, end: Callable[[], None]) -> None:
        self._graphs = graphs
        self._row_count = row_count
        self._end = end

    def forward(self, lora: PassLora) -> Generator[None, None, Tensor]:
        """See ``DecoderModel.forward``. The logits are valid until another pass begins."""
        graphs = self._graphs
        graphs.first()
        for layer, replay in enumerate(graphs.layers):
            if layer:
                yield
            yield from lora.enter_layer(layer)
            if lora.is_on_device:
                replay()
            else:
                yield from graphs.by_operations(layer, lora)
            lora.leave_layer(layer)
        graphs.last()
        return graphs.parts.logits[: self._row_count]

    def end(self) -> None:
        """The device has done all of it."""
        self._end()


class PassGraphs:
    """What one pass after the other runs on. Graphs are recorded when a pass first needs them, or by ``record_all``."""

    def __init__(self, model: DecoderModel, graphs: GraphSet, recorder: Recorder) -> None:
        """``graphs`` has the shapes. Nobody else uses it, and no graph of another recorder shares memory with these."""
        self._model = model
        self._set = graphs
        self._recorder = recorder
        self._graphs: dict[GraphKind, LayerGraphs] = {}
        rows, hidden = max(shape.rows for shape in graphs.shapes), model.config.hidden_size
        dtype, device = model.weights.embedding.dtype, model.device
        self._x, self._residual = (torch.zeros(rows, hidden, dtype=dtype, device=device) for _ in range(2))

    @torch.inference_mode()
    def begin(self, rows: Sequence[RequestRows], segments: Sequence[LoraSegment]) -> LayerGraphs | None:
        """The graphs for these rows, which they will find; None where no shape holds them. No pass is under way."""
        kind = self._set.choose(rows, segments)
        if kind is None:
            return None
        graphs = self._graph(kind)
        graphs.parts.fill(rows)
        return graphs

    @torch.inference_mode()
    def record_all(self, report: Callable[[int, int], None]) -> None:
        """Record the graphs of all passes without long KV; ``report`` is told how many of how many kinds there are."""
        kinds = [kind for kind in self._set.kinds() if kind.variant.value]
        for done, kind in enumerate(kinds):
            report(done, len(kinds))
            self._set.clear_lora(kind.regime)
            self._graph(kind)
        report(len(kinds), len(kinds))

    def _graph(self, kind: GraphKind) -> LayerGraphs:
        graph = self._graphs.get(kind)
        if graph is None:
            parts, rows = self._set.prepare(kind), kind.shape.rows
            x, residual = self._x[:rows], self._residual[:rows]
            graph = self._graphs[kind] = LayerGraphs(self._model, parts, x, residual, self._recorder)
        return graph


class PassGraphSets:
    """See ``segue.engine.runner.PassPreparer``: as many passes at once as there are sets."""

    def __init__(self, sets: Sequence[PassGraphs]) -> None:
        self._sets = tuple(sets)
        self._idle = list(reversed(self._sets))

    @property
    def idle(self) -> int:
        """How many more passes can run at once."""
        return len(self._idle)

    def begin(self, rows: Sequence[RequestRows], segments: Sequence[LoraSegment]) -> RecordedPass | None:
        """A pass over these rows, with all that the host must bring for it on its way; None where none can be had."""
        if not self._idle:
            return None
        own = self._idle[-1]
        graphs = own.begin(rows, segments)
        if graphs is None:
            return None
        self._idle.pop()
        return RecordedPass(graphs, len(rows), lambda: self._idle.append(own))

    def record_all(self, report: Callable[[int, int], None]) -> None:
        """Record ahead; ``report`` is told how many of how many kinds there are."""
        for place, item in enumerate(self._sets):
            # One set's kinds are those of all.
            item.record_all(lambda done, total, place=place: report(place * total + done, len(self._sets) * total))  # type: ignore[misc]

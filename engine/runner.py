"""Turns rows of requests into forward passes over the model, the page pool and the adapters."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from segue.engine.attention import AttentionBackend
from segue.engine.batch import SequenceInput, build_batch
from segue.engine.forward_pass import ForwardPass, PassResult, PassState, RequestRows, Sample, pending_rows
from segue.engine.lanes import Lane, Lanes, LoopLane
from segue.engine.lora.apply import LoraApplier, LoraResources
from segue.engine.lora.device_lora import LoraSegment
from segue.engine.memory.pool import PagePool
from segue.engine.models.decoder import DecoderModel
from segue.engine.pending import fill_pending


class BatchRunner(Protocol):
    """Runs batches of which all adapters have landed faster than pass by pass."""

    def run(self, rows: Sequence[RequestRows], segments: Sequence[LoraSegment]) -> Tensor | None:
        """Logits [len(rows), vocab] of each request's last row; None for a batch that it does not run."""
        ...


class PreparedPass(Protocol):
    """A pass that finds all that the host must bring for it. Nothing of it runs before ``forward`` is advanced."""

    def forward(self, lora: LoraApplier) -> Generator[None, None, Tensor]:
        """See ``DecoderModel.forward``. The logits are valid until another pass begins."""
        ...

    def end(self) -> None:
        """The pass has ended, on the device as well."""
        ...


class PassPreparer(Protocol):
    """Prepares passes that run faster than operation by operation."""

    @property
    def idle(self) -> int:
        """How many more passes it can run beside those under way."""
        ...

    def begin(self, rows: Sequence[RequestRows], segments: Sequence[LoraSegment]) -> PreparedPass | None:
        """A pass over these rows, behind all that the loop thread has enqueued; None for one that it does not run.

        The adapters have been given their pages.
        """
        ...


class PassRunner:
    """Starts passes. It decides nothing: which rows, and when they advance, comes from the scheduler's plan."""

    def __init__(
        self,
        model: DecoderModel,
        pool: PagePool,
        attention: AttentionBackend,
        resources: LoraResources,
        batches: BatchRunner | None = None,
        passes: PassPreparer | None = None,
    ) -> None:
        """What ``batches`` and ``passes`` do not run is run operation by operation."""
        self._batches = batches
        self._passes = passes
        self._model = model
        self._pool = pool
        self._attention = attention
        self._resources = resources
        self._lanes = Lanes.on(model.device)

    @property
    def idle_sets(self) -> int | None:
        """How many more passes can be recorded ones; None where none ever is."""
        return None if self._passes is None else self._passes.idle

    def start(self, rows: Sequence[RequestRows], *, cpu_allowed: bool, sample: Sample) -> ForwardPass:
        """A pass over these rows that has not run yet, beside the loop's work; their adapters are still loading."""
        lane = self._lanes.take()
        ordered = _by_version(rows)
        segments = _segments(ordered)
        # What it writes to tables that batches read as well belongs to the loop's own order.
        applier = LoraApplier(segments, self._resources, lane, cpu_allowed=cpu_allowed)
        prepared = self._prepared(ordered, segments)
        lane.begin()
        if prepared is None:
            return self._pass(ordered, applier, lane, sample, lambda: self._lanes.give_back(lane))

        def end() -> None:
            prepared.end()
            self._lanes.give_back(lane)

        return ForwardPass(ordered, applier, None, prepared.forward(applier), lane, sample, end)

    @torch.inference_mode()
    def run(self, rows: Sequence[RequestRows]) -> PassResult:
        """Run these rows, whose adapters have all landed, to the end."""
        ordered = _by_version(rows)
        segments = _segments(ordered)
        if self._batches is not None:
            logits = self._batches.run(ordered, segments)
            if logits is not None:
                return PassResult(ordered, logits, {})
        lane = LoopLane()
        applier = LoraApplier(segments, self._resources, lane, cpu_allowed=False)
        forward_pass = self._pass(ordered, applier, lane, None, lambda: None)
        state = forward_pass.advance(None)
        if state is not PassState.DONE:
            raise RuntimeError(f"a batch is {state.value}: it must never wait")
        return forward_pass.result

    def _prepared(self, rows: Sequence[RequestRows], segments: Sequence[LoraSegment]) -> PreparedPass | None:
        has_pages = self._resources.store.has_pages
        if self._passes is None or not all(has_pages(segment.version_id) for segment in segments):
            return None
        return self._passes.begin(rows, segments)

    def _pass(
        self,
        rows: tuple[RequestRows, ...],
        applier: LoraApplier,
        lane: Lane,
        sample: Sample | None,
        end: Callable[[], None],
    ) -> ForwardPass:
        """One that runs operation by operation, in a lane that has begun."""
        batch = build_batch(
            [
                SequenceInput(token_ids=item.token_ids, context_tokens=item.start, pages=item.request.pages)
                for item in rows
            ],
            page_tokens=self._pool.page_tokens,
        )
        with lane.enter():
            attention = self._attention.begin(batch)
            on_device = batch.to(self._model.device)
            fill_pending(on_device.token_ids, pending_rows(rows))
        run = self._model.forward(on_device, attention, applier)
        return ForwardPass(rows, applier, attention, run, lane, sample, end)


def _by_version(rows: Sequence[RequestRows]) -> tuple[RequestRows, ...]:
    return tuple(sorted(rows, key=lambda item: -1 if item.request.version_id is None else item.request.version_id))


def _segments(rows: Sequence[RequestRows]) -> tuple[LoraSegment, ...]:
    """One segment for each run of rows with the same adapter; rows of the base model have none."""
    segments: list[LoraSegment] = []
    stop = 0
    for item in rows:
        start, stop = stop, stop + item.count
        version_id = item.request.version_id
        if version_id is None:
            continue
        if segments and segments[-1].version_id == version_id:
            segments[-1] = LoraSegment(segments[-1].row_start, stop, version_id)
        else:
            segments.append(LoraSegment(start, stop, version_id))
    return tuple(segments)

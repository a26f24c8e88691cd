"""Turns rows of requests into forward passes over the model, the page pool and the adapters."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from segue.engine.batch import SequenceInput, build_batch
from segue.engine.forward_pass import ForwardPass, PassState, RequestRows
from segue.engine.lora.apply import LoraApplier, LoraResources, LoraSegment
from segue.engine.memory.pool import PagePool
from segue.engine.models.decoder import DecoderModel


class PassRunner:
    """Starts passes. It decides nothing: which rows, and when they advance, comes from the scheduler's plan."""

    def __init__(self, model: DecoderModel, pool: PagePool, resources: LoraResources) -> None:
        self._model = model
        self._pool = pool
        self._resources = resources
        self._layer_pages = [pool.layer(layer) for layer in range(model.config.layers)]

    def start(self, rows: Sequence[RequestRows], version_id: int | None, *, cpu_allowed: bool) -> ForwardPass:
        """A pass over these rows that has not run yet. ``version_id`` is the adapter still loading, if one is."""
        ordered = tuple(
            sorted(rows, key=lambda item: -1 if item.request.version_id is None else item.request.version_id)
        )
        batch = build_batch(
            [
                SequenceInput(
                    token_ids=item.request.token_ids[item.start : item.start + item.count],
                    context_tokens=item.start,
                    pages=item.request.pages,
                )
                for item in ordered
            ],
            page_tokens=self._pool.page_tokens,
        )
        applier = LoraApplier(_segments(ordered), self._layer_pages, self._resources, cpu_allowed=cpu_allowed)
        return ForwardPass(ordered, version_id, applier, self._model.forward(batch, self._pool, applier))

    @torch.inference_mode()
    def run(self, rows: Sequence[RequestRows]) -> ForwardPass:
        """Run these rows, whose adapters have all landed, to the end."""
        forward_pass = self.start(rows, None, cpu_allowed=False)
        state = forward_pass.advance(None)
        if state is not PassState.DONE:
            raise RuntimeError(f"a batch is {state.value}: it must never wait")
        return forward_pass


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

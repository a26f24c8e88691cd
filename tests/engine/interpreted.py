"""Engines as on CUDA, without a GPU: LoRA kernels in Triton's interpreter, recordings that are run again, late lanes.

What is faked is the recording, FlashInfer, and the streams. Inputs, shapes, plans and the kernels are real.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from segue.cpu_lora import JobRing
from segue.engine.attention import TorchAttention
from segue.engine.backend import Backend
from segue.engine.cuda.batch_graphs import BatchGraphs
from segue.engine.cuda.batch_shapes import BatchShape, batch_shapes
from segue.engine.cuda.bridge import StreamTransport
from segue.engine.cuda.graph_set import GraphSet
from segue.engine.cuda.lora import KernelLora, LoraSizes
from segue.engine.cuda.pass_graphs import PassGraphs, PassGraphSets
from segue.engine.instance import EngineInstance
from segue.engine.lanes import Lanes
from segue.engine.lora.bridge import RowTransport
from segue.engine.models.decoder import DecoderModel
from segue.engine.models.rope import RotaryEmbedding
from tests.checkpoints import TinyModel, write_random_adapter, write_random_model
from tests.engine.fake_flags import FakeFlags
from tests.engine.fake_lanes import FakeLateLane
from tests.engine.fake_recording import FakeBatchAttention, FakeRecorder
from tests.engine.worlds import World

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled where there is a GPU")


def small_world(root: Path, shape: TinyModel, adapters: Mapping[str, Mapping[str, Any]], *, seed: int) -> World:
    """A model and these adapters; the n-th of them is drawn with seed n."""
    model_dir = write_random_model(root / "model", shape, seed=seed)
    for number, (name, options) in enumerate(adapters.items()):
        write_random_adapter(root / "adapters" / name, model_dir, seed=number, **options)
    return World(model_dir, root / "adapters", shape.layers)


@dataclass(kw_only=True)
class FakeCuda:
    """What engines made after ``install`` compute with. ``flags`` are those of each engine.

    Fewer ``table_rows`` than adapters have rows of the tables given to others. Batches are recorded where
    ``records_batches``, and so are passes of ``pass_shapes``, in as many sets as there are ``pass_recorders``.
    """

    max_rank: int
    max_rows: int
    table_rows: int
    max_sequences: int = 8
    records_batches: bool = False
    pass_shapes: Sequence[BatchShape] = ()
    batch_recorder: FakeRecorder = field(default_factory=FakeRecorder)
    pass_recorders: Sequence[FakeRecorder] = ()
    flags: list[FakeFlags] = field(default_factory=list)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Have engines compute with it."""
        monkeypatch.setattr(EngineInstance, "_backend", lambda *parts: self._backend(*parts))

    def install_streams(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Have passes of engines run in lanes that are late, and hand rows over in their order."""
        monkeypatch.setattr(EngineInstance, "_transport", lambda *parts: self._transport(*parts))
        monkeypatch.setattr(Lanes, "on", lambda _device: Lanes(FakeLateLane))

    def _transport(self, instance: EngineInstance, ring: JobRing, _device: torch.device) -> RowTransport:
        self.flags.append(FakeFlags(instance._memory))
        return StreamTransport(ring, self.flags[-1])

    def _backend(self, instance: EngineInstance, model: DecoderModel, chunk_elems: int) -> Backend:
        pool, windows = instance._pool, model.config.sliding_windows
        rotary = RotaryEmbedding(model.config.rope, model.config.head_dim)
        sizes = LoraSizes(
            adapters=self.table_rows, adapter_pages=pool.pages, max_rank=self.max_rank, max_rows=self.max_rows
        )
        projections = dict(model.config.projection_shapes())
        lora = KernelLora(instance.store, pool, sizes, projections, chunk_elems, multiprocessors=2)

        def graph_set(shapes: Sequence[BatchShape]) -> GraphSet:
            recorded = FakeBatchAttention(pool, windows, rotary)
            limits = {"max_sequences": self.max_sequences, "context_tokens": 128}
            return GraphSet(model, pool, recorded, lora, shapes, **limits)

        batches = passes = None
        if self.records_batches:
            shapes = batch_shapes(self.max_rows, self.max_sequences)
            batches = BatchGraphs(model, graph_set(shapes), self.batch_recorder)
        if self.pass_shapes:
            passes = PassGraphSets(
                [PassGraphs(model, graph_set(self.pass_shapes), recorder) for recorder in self.pass_recorders]
            )
        return Backend(lora=lora, attention=TorchAttention(pool, windows, rotary), batches=batches, passes=passes)

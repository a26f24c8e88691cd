"""An adapter store over small memories, with reads and copies that go only as far as a test lets them."""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from segue.engine.device import CpuStreams, DeviceStreams
from segue.engine.lora.catalog import AdapterCatalog
from segue.engine.lora.events import StoreEvent
from segue.engine.lora.file_runs import ReadRuns, Target
from segue.engine.lora.landing import LandLayers
from segue.engine.lora.manifest import AdapterManifest, Projection
from segue.engine.lora.reader import ReadLimits
from segue.engine.lora.states import LayerState
from segue.engine.lora.store import AdapterStore
from segue.engine.lora.transfer import TransferOps
from segue.engine.memory.adapter_layout import choose_chunk_elems
from segue.engine.memory.pool import PagePool
from segue.gpu_kernels.landing import land_matrices
from segue.gpu_kernels.paged_lora import read_rows
from tests.engine.lora.adapter_folders import MODEL, SmallModel, tensor_name, write_folder
from tests.engine.lora.fake_streams import PATIENCE_SECONDS, FakeStreams

NEVER_SECONDS = 1e6
# In bytes per second: so slow that layers of these tests do not come by one copy because they are small.
SLOW_LINK = 20e6
PATIENT_READS = ReadLimits(stall_seconds=NEVER_SECONDS, overdue_seconds=NEVER_SECONDS)


class FakeGate:
    """Lets operations pass one by one. Open at first; ``shut`` it, then ``allow`` some or ``open`` it again."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._allowed: int | None = None
        self.waiting = 0

    def shut(self) -> None:
        with self._condition:
            self._allowed = 0

    def allow(self, count: int) -> None:
        with self._condition:
            assert self._allowed is not None
            self._allowed += count
            self._condition.notify_all()

    def open(self) -> None:
        with self._condition:
            self._allowed = None
            self._condition.notify_all()

    def pass_through(self) -> None:
        with self._condition:
            self.waiting += 1
            assert self._condition.wait_for(lambda: self._allowed is None or self._allowed > 0, PATIENCE_SECONDS)
            self.waiting -= 1
            if self._allowed is not None:
                self._allowed -= 1


class FakeSharedMemory:
    """Plain memory in place of the memfd; records how far it was made touchable."""

    extent_bytes = 1000

    def __init__(self, size_bytes: int) -> None:
        self.store: npt.NDArray[np.uint8] = np.zeros(size_bytes, dtype=np.uint8)
        self.touchable_bytes = 0

    @property
    def ready_bytes(self) -> int:
        return self.touchable_bytes

    def wait_until_ready(self, stop_bytes: int) -> None:
        self.touchable_bytes = max(self.touchable_bytes, stop_bytes)


class Wakes:
    """What the store makes readable when there is something to drain."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def clear(self) -> None:
        if self.wait(0):
            os.eventfd_read(self.fd)

    def wait(self, seconds: float) -> bool:
        return bool(select.select([self.fd], [], [], seconds)[0])

    def close(self) -> None:
        """May be called twice."""
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1


@dataclass(kw_only=True)
class StoreRig:
    """A store with its surroundings. ``reads`` and ``copies`` gate each part of a layer that is read (a layer has one)
    and each matrix that is landed. ``enqueues``: copies for a device that works beside the host are enqueued whenever
    the store is drained. Without ``gates_reads`` parts are read as in an engine, in compiled code.
    """

    root: Path
    model: SmallModel = MODEL
    host_bytes: int = 1 << 20
    pages: int = 64
    dtype: torch.dtype = torch.float32
    copy_bytes_per_second: float | None = None
    expected_copy_bytes_per_second: float = 10e9
    staging_bytes: int = 0
    read_limits: ReadLimits = PATIENT_READS
    enqueues: bool = True
    reads: FakeGate = field(default_factory=FakeGate)
    copies: FakeGate = field(default_factory=FakeGate)
    streams: DeviceStreams = field(default_factory=CpuStreams)
    read_runs: ReadRuns | None = None
    gates_reads: bool = True
    land: LandLayers = land_matrices
    on_read: Callable[[], None] = lambda: None
    on_land: Callable[[], None] = lambda: None
    events: list[StoreEvent] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.wakes = Wakes()
        self.memory = self.make_memory()
        self.pool = PagePool(
            layers=self.model.layers,
            pages=self.pages,
            page_tokens=4,
            kv_heads=1,
            head_dim=16,
            dtype=self.dtype,
            device=self.streams.device,
            poison_freed=True,
        )
        self.chunk_elems = choose_chunk_elems(
            self.pool.page_elems, {width for shape in self.model.projection_shapes().values() for width in shape}
        )
        self.store = AdapterStore(
            memory=self.memory,
            pool=self.pool,
            chunk_elems=self.chunk_elems,
            wake_fd=self.wakes.fd,
            copy_bytes_per_second=self.copy_bytes_per_second,
            expected_copy_bytes_per_second=self.expected_copy_bytes_per_second,
            staging_bytes=self.staging_bytes,
            streams=self.streams,
            read_limits=self.read_limits,
            ops=TransferOps(read_runs=self._read if self.gates_reads else self.read_runs, land=self._land),
        )
        self.capacity_bytes = self.store.host_free_bytes
        self.catalog = AdapterCatalog(self.root, self.model, 256)

    def make_memory(self) -> FakeSharedMemory:
        return FakeSharedMemory(self.host_bytes)

    def add(self, name: str, tensors: dict[str, Tensor] | None = None, config: dict[str, object] | None = None) -> int:
        """Write a folder unless it is there, open it, hand it to the store; its version id."""
        if not (self.root / name).exists() or tensors is not None:
            write_folder(self.root / name, tensors=tensors, config=config)
        return self.hand_over(name).version_id

    def hand_over(self, name: str) -> AdapterManifest:
        with self.catalog.lookup(name) as opened:
            assert opened.fileno is not None
            self.store.register(opened.manifest, os.dup(opened.fileno))
            opened.handed_over()
            return opened.manifest

    def start_copy(self, version_id: int) -> None:
        self.store.start_copy(version_id, self.pool.allocate(self.store.device_pages(version_id), f"v{version_id}"))

    def drain(self) -> tuple[StoreEvent, ...]:
        """Drain once and check everything."""
        events = self.store.drain()
        while self.enqueues and self.store.enqueue_copies():
            pass
        self.events.extend(events)
        self.check()
        return events

    def states(self, version_id: int) -> list[LayerState]:
        """The state of every layer."""
        return [self.store.layer_state(version_id, layer) for layer in range(self.model.layers)]

    @property
    def host_bytes_held(self) -> int:
        return self.capacity_bytes - self.store.host_free_bytes

    def check(self) -> None:
        self.store.check()
        self.pool.check()
        assert self.pool.free_pages + self.store.device_pages_held == self.pool.pages

    def drain_until(self, condition: Callable[[], bool]) -> None:
        """Drain, checking after each time, until the condition holds."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            self.wakes.clear()
            self.drain()
            if condition():
                return
            if isinstance(self.streams, FakeStreams) and self.streams.driven_by_waiting:
                self.streams.go_on_as_far_as_possible()
            assert time.monotonic() < deadline, "the condition never came to hold"
            self.wakes.wait(0.001 if self.store.awaits_landings else 0.5)

    def wait_until_a_read_waits(self) -> None:
        self._wait(lambda: self.reads.waiting > 0)

    def wait_until_a_copy_waits(self) -> None:
        self._wait(lambda: self.copies.waiting > 0)

    def close(self) -> None:
        """Open the gates, close, and make sure that everything came back."""
        self.reads.open()
        self.copies.open()
        if isinstance(self.streams, FakeStreams):
            self.streams.run_free()
        self.store.close()
        self.wakes.close()
        self.pool.check()
        assert self.pool.free_pages == self.pool.pages

    def landed(self, version_id: int, layer: int) -> dict[tuple[Projection, str], Tensor]:
        """A landed layer's matrices, read back from the pages as A [rank, in] and B [out, rank].

        Of one that is enqueued, if the device has passed its event.
        """
        assert self.store.layer_state(version_id, layer) in (LayerState.ENQUEUED, LayerState.LANDED)
        pages, table, matrices = self.pool.layer(layer), self.store.page_table(version_id), {}
        for module in self.store.device_layout(version_id).layers[layer]:
            a = read_rows(pages, table, module.a_start, module.rank, module.in_features, self.chunk_elems)
            b = read_rows(pages, table, module.b_start, module.rank, module.out_features, self.chunk_elems)
            matrices[module.projection, "A"] = a.cpu()
            matrices[module.projection, "B"] = b.T.cpu()
        return matrices

    def in_host(self, version_id: int, layer: int) -> dict[tuple[Projection, str], Tensor]:
        """A layer's matrices in the host store."""
        matrices = {}
        store = torch.from_numpy(self.memory.store)
        for module in self.store.host_view(version_id, layer).modules:
            for matrix, offset, rows, columns in (
                ("A", module.a_offset_bytes, module.rank, module.in_features),
                ("B", module.b_offset_bytes, module.out_features, module.rank),
            ):
                size = rows * columns * self.dtype.itemsize
                matrices[module.projection, matrix] = (
                    store[offset : offset + size].view(self.dtype).view(rows, columns).clone()
                )
        return matrices

    def _wait(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            assert time.monotonic() < deadline, "nothing waits at the gate"
            time.sleep(0.001)

    def _read(self, target: Target, descriptor: int, runs: npt.NDArray[np.int64], offset: int) -> int:
        self.reads.pass_through()
        self.on_read()
        return (self.read_runs or Target.read)(target, descriptor, runs, offset)

    def _land(
        self, staging: Tensor, first_elem: int, table: Tensor, pool: Tensor, page_table: Tensor, chunk_elems: int
    ) -> None:
        for index in range(len(table)):
            for _ in "AB":
                self.copies.pass_through()
                self.on_land()
            self.land(staging, first_elem, table[index : index + 1], pool, page_table, chunk_elems)


def expected(tensors: dict[str, Tensor], layer: int, dtype: torch.dtype) -> dict[tuple[Projection, str], Tensor]:
    """A layer's matrices out of a checkpoint's tensors."""
    return {
        (projection, matrix): tensors[name].to(dtype)
        for projection in Projection
        for matrix in "AB"
        if (name := tensor_name(layer, projection, matrix)) in tensors
    }


def assert_same(found: dict[tuple[Projection, str], Tensor], wanted: dict[tuple[Projection, str], Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert torch.equal(found[key], tensor), key


MakeRig = Callable[..., StoreRig]

"""Landing on CUDA through the real streams, from registered memory: values, order, and events on other streams."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from segue.cpu_lora import CpuLoraConfig, SharedLayout, SharedMemory
from segue.cpu_lora.layout import PAGE_BYTES
from segue.engine.device import CudaStreams
from segue.engine.lora.manifest import Projection
from segue.engine.lora.states import LayerState
from segue.engine.memory.prepared_store import PreparedStore
from segue.gpu_kernels.paged_lora import read_rows
from tests.engine.lora.adapter_folders import ATTENTION, SmallModel, peft_config, random_tensors
from tests.engine.lora.store_rig import FakeSharedMemory, StoreRig, assert_same, expected

pytestmark = pytest.mark.gpu

MODEL = SmallModel(layers=12, hidden=256, kv=64, mlp=320)
HOST_BYTES = 32 << 20
# Most layers lie in several of them.
EXTENT_BYTES = 4 * PAGE_BYTES
ALL = tuple(Projection)
ADAPTERS: dict[str, dict[Projection, int]] = {
    "attention": dict.fromkeys(ATTENTION, 16),
    "ragged": dict(zip(ALL, (1, 24, 7, 64, 3, 8, 33), strict=True)),
    "one module": {Projection.DOWN: 5},
    "all": dict.fromkeys(ALL, 24),
}


class RegisteredMemory(FakeSharedMemory):
    """The real shared memory, registered with the device."""

    extent_bytes = EXTENT_BYTES

    def __init__(self, streams: CudaStreams) -> None:
        config = CpuLoraConfig(workers=1, row_bytes=1, delta_bytes=1, store_bytes=HOST_BYTES)
        self.shared = SharedMemory.create(SharedLayout.plan(config))
        self.prepared = PreparedStore(self.shared, streams, EXTENT_BYTES)
        self.store = self.prepared.store
        self.touchable_bytes = HOST_BYTES

    def wait_until_ready(self, stop_bytes: int) -> None:
        self.prepared.wait_until_ready(stop_bytes)

    def close(self) -> None:
        self.prepared.close()
        del self.store
        self.shared.close()


class CudaRig(StoreRig):
    """A store on the device, with its own kernel."""

    def make_memory(self) -> FakeSharedMemory:
        assert isinstance(self.streams, CudaStreams)
        self.registered = RegisteredMemory(self.streams)
        return self.registered

    def load(self, name: str, seed: int = 0) -> tuple[int, dict[str, Tensor]]:
        """A version in host memory, and its matrices."""
        ranks = ADAPTERS[name]
        tensors = random_tensors(MODEL, ranks=ranks, targets=ranks, seed=seed)
        pattern = {projection.value: rank for projection, rank in ranks.items()}
        version = self.add(f"{name} {seed}", tensors, peft_config(ranks, rank_pattern=pattern))
        self.store.start_load(version)
        self.drain_until(lambda: self.store.is_verified(version))
        return version, tensors

    def assert_landed(self, version: int, tensors: dict[str, Tensor]) -> None:
        self.drain_until(lambda: self.store.is_landed(version))
        for layer in range(MODEL.layers):
            assert_same(self.landed(version, layer), expected(tensors, layer, self.dtype))

    def _land(
        self, staging: Tensor, first_elem: int, table: Tensor, pool: Tensor, page_table: Tensor, chunk_elems: int
    ) -> None:
        self.land(staging, first_elem, table, pool, page_table, chunk_elems)


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[CudaRig]:
    from segue.gpu_kernels.land_layers import compile_landing, land_layers

    rig = CudaRig(
        root=tmp_path,
        model=MODEL,
        host_bytes=HOST_BYTES,
        pages=4096,
        dtype=request.param,
        streams=CudaStreams(),
        staging_bytes=1 << 20,
        land=land_layers,
    )
    compile_landing(rig.pool.data, rig.chunk_elems)
    yield rig
    rig.close()
    rig.registered.close()


def test_every_layer_lands_as_it_is_in_the_checkpoint(rig: CudaRig) -> None:
    loaded = [rig.load(name, seed) for seed, name in enumerate(ADAPTERS)]
    for version, _ in loaded:
        rig.start_copy(version)
    for version, tensors in loaded:
        rig.assert_landed(version, tensors)
    owned = sorted(rig.pool.owned())
    others = [page for page in range(rig.pool.pages + 1) if page not in set(owned)]
    assert rig.pool.data[:, others].isnan().all(), "a page that nobody was given was written"


def test_pages_go_from_adapter_to_adapter(rig: CudaRig) -> None:
    """Evicted while copies are under way, and given to the next at once."""
    loaded = [rig.load(name, seed) for seed, name in enumerate([*ADAPTERS, *ADAPTERS])]
    for version, _ in loaded:
        rig.start_copy(version)
        rig.store.evict_device(version)
        rig.drain()
    rig.drain_until(lambda: rig.pool.free_pages == rig.pool.pages)
    for version, tensors in loaded:
        rig.start_copy(version)
        rig.assert_landed(version, tensors)
        rig.store.evict_device(version)


class Gate:
    """The current stream stands still until it is opened."""

    def __init__(self) -> None:
        driver: Any = pytest.importorskip("cuda.bindings.driver")
        self._flag = torch.zeros(1, dtype=torch.int32).pin_memory()
        stream = driver.CUstream(torch.cuda.current_stream().cuda_stream)
        at_least = int(driver.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_GEQ)
        (status,) = driver.cuStreamWaitValue32(stream, self._flag.data_ptr(), 1, at_least)
        assert status == driver.CUresult.CUDA_SUCCESS

    def open(self) -> None:
        self._flag.fill_(1)


def test_another_stream_finds_a_layer_behind_its_event(rig: CudaRig) -> None:
    """While the loop's stream stands still, with a write to the pages as what they were: the landing comes after it.

    Nothing that waits for the device may be called before the gate is open.
    """
    # So that no kernel is loaded and no memory allocated behind the gate.
    first, first_tensors = rig.load("all", seed=1)
    rig.start_copy(first)
    rig.assert_landed(first, first_tensors)
    version, tensors = rig.load("ragged", seed=2)
    seen = torch.empty_like(rig.pool.data)
    other = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    rig.pool.data.fill_(5.0)
    seen.fill_(6.0)
    torch.cuda.synchronize()

    gate = Gate()
    try:
        rig.pool.data.fill_(7.0)
        rig.start_copy(version)
        rig.drain_until(lambda: set(rig.states(version)) == {LayerState.ENQUEUED})
        events = [rig.store.landing_event(version, layer) for layer in range(MODEL.layers)]
        for layer, event in enumerate(events):
            assert event is not None
            assert not event.query()  # type: ignore[no-untyped-call]
            other.wait_event(event)
            with torch.cuda.stream(other):
                seen[layer].copy_(rig.pool.layer(layer), non_blocking=True)
        assert not rig.store.is_landed(version)
    finally:
        gate.open()
    other.synchronize()
    table = rig.store.page_table(version)
    for layer in range(MODEL.layers):
        found = {}
        for module in rig.store.device_layout(version).layers[layer]:
            a = read_rows(seen[layer], table, module.a_start, module.rank, module.in_features, rig.chunk_elems)
            b = read_rows(seen[layer], table, module.b_start, module.rank, module.out_features, rig.chunk_elems)
            found[module.projection, "A"], found[module.projection, "B"] = a.cpu(), b.T.cpu()
        assert_same(found, expected(tensors, layer, rig.dtype))
    rig.assert_landed(version, tensors)
    others = [page for page in range(rig.pool.pages) if page not in set(table.tolist())]
    assert (rig.pool.data[:, others] == 7.0).all()


def test_the_store_is_registered_until_it_is_closed() -> None:
    streams = CudaStreams()
    memory = RegisteredMemory(streams)
    memory.wait_until_ready(HOST_BYTES)
    octets = torch.from_numpy(memory.shared.octets)
    places = [0, memory.shared.layout.store_offset - 1, *range(memory.shared.layout.store_offset, len(octets), 3000)]
    assert all(octets[place : place + 1].is_pinned() for place in places)
    memory.prepared.close()
    assert not any(octets[place : place + 1].is_pinned() for place in places)
    del octets
    memory.close()

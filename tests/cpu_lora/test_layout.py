"""The shared memory's layout, and attaching to it."""

from __future__ import annotations

import itertools
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from segue.config import ConfigError
from segue.cpu_lora import CpuLoraConfig, SharedLayout, SharedMemory
from segue.cpu_lora.layout import HEADER_BYTES, LINE_BYTES, PAGE_BYTES

CONFIGS = st.builds(
    CpuLoraConfig,
    workers=st.integers(0, 40),
    slots=st.integers(1, 40),
    max_tasks=st.integers(1, 300),
    row_bytes=st.integers(1, 1 << 22),
    delta_bytes=st.integers(1, 1 << 22),
    store_bytes=st.integers(1, 1 << 40),
)


@given(CONFIGS)
def test_regions_neither_overlap_nor_leave_the_memory(config: CpuLoraConfig) -> None:
    layout = SharedLayout.plan(config)
    spans = sorted(layout.regions().values())
    assert spans[0][0] == 0
    for (_, end), (begin, _) in itertools.pairwise(spans):
        assert end <= begin
    assert spans[-1][1] <= layout.total_bytes
    assert len(layout.header()) * 8 <= HEADER_BYTES


@given(CONFIGS)
def test_regions_are_aligned_and_large_enough(config: CpuLoraConfig) -> None:
    layout = SharedLayout.plan(config)
    for name, (begin, end) in layout.regions().items():
        assert begin % LINE_BYTES == 0, name
        if name.startswith(("rows", "deltas", "store")):
            assert begin % PAGE_BYTES == 0, name
        if name.startswith("rows"):
            assert end - begin >= config.row_bytes
        if name.startswith("deltas"):
            assert end - begin >= config.delta_bytes
    begin, end = layout.regions()["store"]
    assert end - begin == config.store_bytes


@given(CONFIGS)
def test_header_round_trip(config: CpuLoraConfig) -> None:
    layout = SharedLayout.plan(config)
    assert SharedLayout.from_header(layout.header()) == layout


def small_layout() -> SharedLayout:
    return SharedLayout.plan(CpuLoraConfig(workers=2, row_bytes=100, delta_bytes=100, store_bytes=1000, slots=2))


def test_attached_memory_is_the_same_memory() -> None:
    memory = SharedMemory.create(small_layout())
    memory.allocate_store(1000)
    other = SharedMemory.attach(os.dup(memory.fd))
    memory.store[:4] = (1, 2, 3, 4)
    assert other.layout == memory.layout
    np.testing.assert_array_equal(other.store[:5], [1, 2, 3, 4, 0])
    assert memory.store.size == 1000
    assert memory.address % PAGE_BYTES == 0
    other.close()
    memory.close()


@pytest.mark.parametrize(("word", "message"), [(0, "magic"), (1, "version 7")])
def test_attach_refuses_foreign_memory(word: int, message: str) -> None:
    memory = SharedMemory.create(small_layout())
    memory.longs[word] = 7
    with pytest.raises(ValueError, match=message):
        SharedMemory.attach(memory.fd)
    memory.close()


def test_attach_refuses_truncated_memory() -> None:
    layout = small_layout()
    fd = os.memfd_create("test", os.MFD_CLOEXEC)
    os.pwrite(fd, np.array(layout.header(), np.int64).tobytes(), 0)
    os.ftruncate(fd, layout.total_bytes - PAGE_BYTES)
    with pytest.raises(ValueError, match=f"its header says {layout.total_bytes}"):
        SharedMemory.attach(fd)
    os.ftruncate(fd, 8)
    with pytest.raises(ValueError, match="magic"):
        SharedMemory.attach(fd)
    os.close(fd)


def test_memory_is_allocated_before_it_is_touched() -> None:
    layout = SharedLayout.plan(CpuLoraConfig(workers=1, row_bytes=1 << 20, delta_bytes=1 << 20, store_bytes=1 << 24))
    memory = SharedMemory.create(layout)
    assert os.fstat(memory.fd).st_blocks * 512 >= layout.store_offset
    assert os.fstat(memory.fd).st_blocks * 512 < layout.store_offset + (1 << 23)
    memory.allocate_store(1 << 23)
    memory.allocate_store(1 << 22)
    assert memory.allocated_store_bytes == 1 << 23
    memory.allocate_store(1 << 24)
    assert os.fstat(memory.fd).st_blocks * 512 >= layout.total_bytes
    with pytest.raises(ValueError, match="beyond the store"):
        memory.allocate_store((1 << 24) + 1)
    memory.close()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("workers", -1),
        ("slots", 0),
        ("max_tasks", 0),
        ("row_bytes", 0),
        ("delta_bytes", -5),
        ("store_bytes", 0),
        ("min_rows_per_share", 0),
        ("stall_seconds", 0.0),
        ("cores", (1,)),
        ("cores", (0, -1)),
    ],
)
def test_configuration_errors_name_the_field(field: str, value: object) -> None:
    settings: dict[str, object] = {"workers": 2, "row_bytes": 1, "delta_bytes": 1, "store_bytes": 1}
    with pytest.raises(ConfigError, match=rf"^{field}: "):
        CpuLoraConfig(**(settings | {field: value}))  # type: ignore[arg-type]

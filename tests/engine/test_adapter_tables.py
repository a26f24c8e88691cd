"""The rows of integers that the LoRA kernels read of each adapter."""

from __future__ import annotations

import pytest
import torch

from segue.engine.cuda.adapter_tables import AdapterTables
from segue.engine.lora.manifest import Projection
from segue.engine.lora.points import POINT_PROJECTIONS, LoraPoint
from segue.engine.memory.adapter_layout import AdapterLayout, ModuleLayout

LAYERS, CHUNK_ELEMS = 3, 8


def module(projection: Projection, rank: int, scale: float, start: int) -> ModuleLayout:
    return ModuleLayout(
        projection=projection,
        rank=rank,
        scale=scale,
        in_features=64,
        out_features=64,
        a_start=start * CHUNK_ELEMS,
        b_start=(start + 100) * CHUNK_ELEMS,
    )


def layout(*layers: tuple[ModuleLayout, ...]) -> AdapterLayout:
    return AdapterLayout(layers=layers, page_elems=256, chunk_elems=CHUNK_ELEMS, pages=2)


class FakePagedAdapters:
    """Adapters whose pages a test gives and takes."""

    def __init__(self) -> None:
        self.layouts: dict[int, AdapterLayout] = {}
        self.pages: dict[int, tuple[int, ...]] = {}

    def page_ids(self, version_id: int) -> tuple[int, ...]:
        return self.pages[version_id]

    def device_layout(self, version_id: int) -> AdapterLayout:
        return self.layouts[version_id]

    def has_pages(self, version_id: int) -> bool:
        return version_id in self.pages


@pytest.fixture
def adapters() -> FakePagedAdapters:
    made = FakePagedAdapters()
    made.layouts = {
        1: layout(
            (module(Projection.K, 4, 0.5, 1), module(Projection.DOWN, 9, 2.0, 2)),
            (),
            (module(Projection.K, 7, 0.25, 3),),
        ),
        2: layout((module(Projection.Q, 2, 1.0, 4),), (module(Projection.UP, 3, 1.5, 5),), ()),
    }
    made.pages = {1: (10, 11), 2: (20,)}
    return made


def tables_of(adapters: FakePagedAdapters, rows: int) -> AdapterTables:
    return AdapterTables(
        adapters, rows=rows, adapter_pages=2, layers=LAYERS, chunk_elems=CHUNK_ELEMS, device=torch.device("cpu")
    )


def check_row(tables: AdapterTables, adapters: FakePagedAdapters, version_id: int) -> None:
    """All that the tables say of a version, against its layout."""
    row, pages, made = tables.row(version_id), adapters.pages[version_id], adapters.layouts[version_id]
    assert tables.page_tables[row, : len(pages)].tolist() == list(pages)
    ranks: list[int] = []
    for point, projections in POINT_PROJECTIONS.items():
        for place, projection in enumerate(projections):
            own = [{item.projection: item for item in modules}.get(projection) for modules in made.layers]
            for layer, item in enumerate(own):
                wanted = (0, 0, 0) if item is None else (item.rank, item.a_start // 8, item.b_start // 8)
                assert tuple(tables.modules[point][layer][row, place].tolist()) == wanted
                assert float(tables.scales[point][layer][row, place]) == (0.0 if item is None else item.scale)
            ranks.append(max((item.rank for item in own if item is not None), default=0))
            assert tables.ranks[point][row, place] == ranks[-1]
    assert tables.largest_ranks[row] == max(ranks)


def test_rows_say_what_the_layouts_say(adapters: FakePagedAdapters) -> None:
    tables = tables_of(adapters, rows=2)
    for version_id in (1, 2, 1):
        check_row(tables, adapters, version_id)
    adapters.pages[1] = (30, 31)
    check_row(tables, adapters, 1)


def test_nothing_is_left_of_the_version_that_had_the_row(adapters: FakePagedAdapters) -> None:
    tables = tables_of(adapters, rows=1)
    for version_id, other in ((1, 2), (2, 1), (1, 2)):
        adapters.pages = {version_id: (version_id, version_id + 1)}
        check_row(tables, adapters, version_id)
        assert not adapters.has_pages(other)
    assert tables.ranks[LoraPoint.QKV].tolist() == [[0, 7, 0]]


def test_more_adapters_than_rows_are_refused(adapters: FakePagedAdapters) -> None:
    tables = tables_of(adapters, rows=1)
    tables.row(1)
    with pytest.raises(RuntimeError, match="no more rows"):
        tables.row(2)

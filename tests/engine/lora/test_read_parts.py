from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from segue.engine.lora.host_plan import HostPlan, PlannedLayer
from segue.engine.lora.manifest import AdapterManifest, ModuleWeights, Projection, TensorSpan
from segue.engine.lora.read_parts import PartTable, ReadPart

# In a safetensors file matrices are in the order of their names.
BY_NAME = sorted(Projection, key=lambda projection: projection.value)


def layer_of(modules: list[tuple[Projection, int, int, int, str]], gaps: list[int]) -> PlannedLayer:
    """Modules (projection, rank, in, out, dtype) in the order of the file, with gaps between matrices."""
    (planned,) = plan_of(modules, gaps, layers=1).layers
    return planned


def plan_of(modules: list[tuple[Projection, int, int, int, str]], gaps: list[int], layers: int) -> HostPlan:
    """Layers that read the same matrices of the file."""
    place, jumps, weights = 100, iter(gaps), []
    for projection, rank, width_in, width_out, dtype in modules:
        spans = []
        for rows, columns in ((rank, width_in), (width_out, rank)):
            spans.append(TensorSpan(file_offset=place, rows=rows, columns=columns, dtype=dtype))
            place += spans[-1].nbytes + next(jumps)
        weights.append(ModuleWeights(projection=projection, rank=rank, scale=1.0, a=spans[0], b=spans[1]))
    in_order = tuple(sorted(weights, key=lambda module: list(Projection).index(module.projection)))
    manifest = AdapterManifest(version_id=1, version="v", name="n", identity=(0,) * 5, layers=(in_order,) * layers)
    return HostPlan.of(manifest, 2)


def parts_of(planned: PlannedLayer, file_dtype: str, part_bytes: int) -> list[ReadPart]:
    table = PartTable.of(HostPlan(layers=(planned,), host_bytes=planned.host_bytes), file_dtype, part_bytes)
    assert table.layer_parts.tolist() == [len(table)]
    return [table.part(index) for index in range(len(table))]


@given(
    st.lists(st.sampled_from(list(Projection)), unique=True, min_size=1, max_size=7),
    st.lists(st.sampled_from([0, 0, 0, 2, 50]), min_size=14, max_size=14),
    st.lists(st.sampled_from(["BF16", "BF16", "F32", "F16"]), min_size=7, max_size=7),
    st.integers(1, 70),
    st.integers(1, 9000),
)
def test_every_byte_is_read_once_into_its_place(
    projections: list[Projection], gaps: list[int], dtypes: list[str], rank: int, part_bytes: int
) -> None:
    modules = [(item, rank, 7 + index, 90 - index, dtypes[index]) for index, item in enumerate(projections)]
    planned = layer_of(modules, gaps)
    wanted = {}
    for tensor in (tensor for module in planned.modules for tensor in (module.a, module.b)):
        if tensor.span.dtype == "BF16":
            for index in range(tensor.host_bytes):
                wanted[tensor.host_start + index] = tensor.span.file_offset + index
    parts = parts_of(planned, "BF16", part_bytes)
    found: dict[int, int] = {}
    for part in parts:
        assert part.layer == 0
        assert part.size_bytes == part.runs[2::3].sum()
        if part.converted is None:
            assert part.size_bytes <= -(-part_bytes // 64) * 64
            for source, target, size in part.runs.reshape(-1, 3).tolist():
                assert size > 0
                assert size % 2 == 0
                found.update(zip(range(target, target + size), range(source, source + size), strict=True))
    assert found == wanted
    assert sum(part.size_bytes for part in parts if part.converted is None) == len(wanted)
    converted = [part.converted.label for part in parts if part.converted is not None]
    other = [m for m in planned.modules if m.a.span.dtype != "BF16"]
    assert sorted(converted) == sorted(label for m in other for label in (m.a.label, m.b.label))


@pytest.mark.parametrize(("projections", "runs"), [(BY_NAME[1:2], 1), (BY_NAME, 7)])
def test_matrices_that_follow_one_another_are_one_run(projections: list[Projection], runs: int) -> None:
    planned = layer_of([(item, 8, 64, 64, "BF16") for item in projections], [0] * 14)
    (part,) = parts_of(planned, "BF16", 1 << 20)
    assert len(part.runs) == 3 * runs


def test_a_layer_is_cut_into_parts_of_about_the_same_size() -> None:
    planned = layer_of([(item, 64, 256, 256, "BF16") for item in BY_NAME], [0] * 14)
    sizes = [part.size_bytes for part in parts_of(planned, "BF16", 100_000)]
    assert sum(sizes) == planned.host_bytes
    assert len(sizes) == -(-planned.host_bytes // 100_000)
    assert max(sizes) - min(sizes) <= 64 * len(sizes)


def test_a_layer_without_matrices_is_one_part_of_nothing() -> None:
    (part,) = parts_of(PlannedLayer(modules=(), host_start=0, host_bytes=0), "BF16", 1000)
    assert (part.layer, part.size_bytes, part.converted) == (0, 0, None)
    np.testing.assert_array_equal(part.runs, [])


def test_parts_go_through_the_file_from_its_beginning() -> None:
    planned = layer_of([(item, 8, 64, 64, "BF16") for item in BY_NAME], [0] * 14)
    parts = parts_of(planned, "BF16", 2000)
    places = list(itertools.chain.from_iterable(part.runs[0::3].tolist() for part in parts))
    assert places == sorted(places)


def test_layers_follow_one_another_and_each_part_knows_its_own() -> None:
    modules = [(item, 8, 64, 64, "F32" if item is Projection.Q else "BF16") for item in BY_NAME]
    plan = plan_of(modules, [0] * 14, layers=3)
    table = PartTable.of(plan, "BF16", 2000)
    parts = [table.part(index) for index in range(len(table))]
    assert [part.layer for part in parts] == sorted(part.layer for part in parts)
    assert table.layer_parts.tolist() == [sum(part.layer == layer for part in parts) for layer in range(3)]
    for layer, planned in enumerate(plan.layers):
        mine = [part for part in parts if part.layer == layer]
        assert [part.converted.label for part in mine if part.converted is not None] == [
            f"layer {layer} q_proj lora_A",
            f"layer {layer} q_proj lora_B",
        ]
        places = [place for part in mine if part.converted is None for place in part.runs[1::3].tolist()]
        assert min(places) >= planned.host_start
        assert max(places) < planned.host_start + planned.host_bytes

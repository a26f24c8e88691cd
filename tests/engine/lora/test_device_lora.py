"""The CPU device's deltas of a pass: segments in groups, against dense float64 arithmetic."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from segue.engine.lora import device_lora
from segue.engine.lora.device_lora import LoraSegment, TorchDeviceLora
from segue.engine.lora.points import POINT_PROJECTIONS, LoraPoint
from tests.engine.lora.adapter_folders import ATTENTION, MODEL, peft_config, random_tensors
from tests.engine.lora.store_rig import StoreRig

SHAPES = MODEL.projection_shapes()
# Rank, alpha and targets: of the five adapters, those of one row have one layout.
ADAPTERS = {
    **dict.fromkeys(("a", "b", "c"), (4, 8, ATTENTION)),
    "louder": (4, 12, ATTENTION),
    "narrow": (2, 4, ATTENTION[2:]),
}
# Adapter and rows of each segment; None is the base model. No two of one group lie side by side, but b and c.
PASS = [("a", 2), (None, 1), ("louder", 2), ("b", 2), ("c", 2), ("narrow", 3), (None, 2)]
TOKENS = sum(count for _, count in PASS)


def make_lora(rig: StoreRig) -> TorchDeviceLora:
    pool = [rig.pool.layer(layer) for layer in range(MODEL.layers)]
    return TorchDeviceLora(rig.store, pool, SHAPES, rig.chunk_elems)


def load(rig: StoreRig) -> dict[str, int]:
    """The adapters' version ids by name; all on the device."""
    versions = {}
    for seed, (name, (rank, alpha, targets)) in enumerate(ADAPTERS.items()):
        tensors = random_tensors(rank=rank, targets=targets, seed=seed)
        version = rig.add(name, tensors, peft_config(targets, r=rank, lora_alpha=alpha))
        rig.store.acquire(version)
        rig.store.start_load(version)
        rig.start_copy(version)
        versions[name] = version
    rig.drain_until(lambda: all(rig.store.is_landed(version) for version in versions.values()))
    return versions


def segments(versions: dict[str, int]) -> list[LoraSegment]:
    stops = itertools.accumulate(count for _, count in PASS)
    return [
        LoraSegment(stop - count, stop, versions[name])
        for (name, count), stop in zip(PASS, stops, strict=True)
        if name is not None
    ]


def exact_delta(rig: StoreRig, segment: LoraSegment, layer: int, point: LoraPoint, x: Tensor, scale: float) -> Tensor:
    """The segment's delta [rows, merged out] in float64."""
    matrices = rig.landed(segment.version_id, layer)
    rows = x[segment.row_start : segment.row_stop].double()
    parts = []
    for projection in POINT_PROJECTIONS[point]:
        if (projection, "A") in matrices:
            a, b = matrices[projection, "A"].double(), matrices[projection, "B"].double()
            parts.append(scale * (rows @ a.T @ b.T))
        else:
            parts.append(torch.zeros(len(rows), SHAPES[projection][1], dtype=torch.float64))
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("group_elems", [1, 1 << 20])
@pytest.mark.parametrize("left_out", [(), ("b", "narrow")])
def test_each_segment_gets_its_own_deltas(
    rig: StoreRig, group_elems: int, left_out: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_lora, "_GROUP_ELEMS", group_elems)
    versions = load(rig)
    scales = {versions[name]: alpha / rank for name, (rank, alpha, _) in ADAPTERS.items()}
    step = make_lora(rig).begin(segments(versions))
    served = {version for name, version in versions.items() if name not in left_out}
    generator = torch.Generator().manual_seed(0)
    for layer in range(MODEL.layers):
        for point, projections in POINT_PROJECTIONS.items():
            x = torch.randn(TOKENS, SHAPES[projections[0]][0], generator=generator)
            base = torch.randn(TOKENS, sum(SHAPES[each][1] for each in projections), generator=generator)
            exact, out = base.double(), base.clone()
            for item in segments(versions):
                if item.version_id in served:
                    delta = exact_delta(rig, item, layer, point, x, scales[item.version_id])
                    exact[item.row_start : item.row_stop] += delta
            step.add(layer, point, x, out, served)
            torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)


def test_segments_of_one_layout_and_length_are_a_group(rig: StoreRig, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = load(rig)
    lora = make_lora(rig)
    together = lora.groups(segments(versions))
    assert [len(group.page_tables) for group in together] == [3, 1, 1]
    # Rows that lie side by side are a slice, which copies nothing.
    assert [isinstance(group.rows, slice) for group in together] == [False, True, True]
    layout = rig.store.device_layout(versions["a"])
    monkeypatch.setattr(device_lora, "_GROUP_ELEMS", 2 * layout.pages * layout.page_elems)
    assert [len(group.page_tables) for group in lora.groups(segments(versions))] == [2, 1, 1, 1]
    longer = [LoraSegment(0, 1, versions["a"]), LoraSegment(1, 3, versions["b"])]
    assert [len(group.page_tables) for group in lora.groups(longer)] == [1, 1]

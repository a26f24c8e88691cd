from __future__ import annotations

import dataclasses

import pytest

from segue.bench.coldstart.points import Axes, Mode, Point
from segue.bench.coldstart.predict import AdapterWidths, Predictor
from segue.bench.random_checkpoints import Targets
from segue.engine.lora.manifest import Projection
from segue.scheduler.cost_model import CopyCoefficients, CostProfile, CpuCoefficients, StepCoefficients
from segue.types import Tier

SHAPES = {
    Projection.Q: (64, 64),
    Projection.K: (64, 32),
    Projection.V: (64, 32),
    Projection.O: (64, 64),
    Projection.GATE: (64, 128),
    Projection.UP: (64, 128),
    Projection.DOWN: (128, 64),
}
# Of one rank of a layer's q, k, v and o: 448 elements. A layer of rank 10 copies for 4 x 448 x 10 x 1e-6 s = 17.92 ms.
PROFILE = CostProfile(
    name="made up",
    layers=4,
    decode=StepCoefficients(fixed_seconds=1e-3),
    prefill=StepCoefficients(fixed_seconds=40e-3),
    copy=CopyCoefficients(seconds_per_byte=1e-6),
    cpu=CpuCoefficients(fixed_seconds=5e-3, core_seconds_per_rank=1e-4),
)
PREDICTOR = Predictor(
    profile=PROFILE, shapes=SHAPES, item_bytes=4, cores=2, budget_tokens=64, read_bytes_per_second=0.5e6
)
POINT = Point(prompt=16, rank=10, targets=Targets.QKVO, adapters=1, tier=Tier.HOST)
COPY, COMPUTE, CPU = 17.92e-3, 10e-3, 6e-3


def test_widths_of_a_layer() -> None:
    assert AdapterWidths.of(SHAPES, Targets.QKVO) == AdapterWidths(
        rank_elems=448, qkvo_rank_elems=448, row_elems=(64 + 128) + (64 + 64)
    )
    assert AdapterWidths.of(SHAPES, Targets.ALL) == AdapterWidths(
        rank_elems=448 + 3 * 192, qkvo_rank_elems=448, row_elems=320 + (64 + 256) + (128 + 64)
    )


@pytest.mark.parametrize(
    ("mode", "seconds"),
    [
        (Mode.WARM, 4 * COMPUTE),
        (Mode.LOAD_FIRST, 4 * COPY + 4 * COMPUTE),
        (Mode.STREAM, 4 * COPY + COMPUTE),
        (Mode.CPU, 4 * (COMPUTE + CPU)),
        # On the CPU 16, 32, 48 ms after the beginning; the last layer's weights land at 71.7 ms, the CPU has it at 64.
        (Mode.PLANNER, 4 * (COMPUTE + CPU)),
    ],
)
def test_one_adapter_from_host_memory(mode: Mode, seconds: float) -> None:
    assert PREDICTOR.ttft_seconds(POINT, mode) == pytest.approx(seconds)


def test_the_planner_goes_over_to_the_device_where_layers_have_landed() -> None:
    """Of rank 1 a layer takes 1.792 ms to land; the first does so before the CPU would have its deltas."""
    point = dataclasses.replace(POINT, rank=1)
    assert PREDICTOR.ttft_seconds(point, Mode.PLANNER) == pytest.approx(1.792e-3 + 4 * COMPUTE)
    slow = dataclasses.replace(PREDICTOR, read_bytes_per_second=1e12)
    late = dataclasses.replace(POINT, tier=Tier.DISK, rank=5)
    # Layers land every 8.96 ms. The CPU has the first at 15.5 ms; the second lands at 17.92, before it would be needed
    # for the CPU to be faster, and the others while it computes.
    assert slow.ttft_seconds(late, Mode.PLANNER) == pytest.approx(2 * 8.96e-3 + 3 * COMPUTE, rel=1e-3)


def test_a_disk_and_a_throttled_link_come_before() -> None:
    disk = dataclasses.replace(POINT, tier=Tier.DISK)
    # Reading takes twice as long as the copy: 35.84 ms a layer.
    assert PREDICTOR.ttft_seconds(disk, Mode.STREAM) == pytest.approx(4 * 2 * COPY + COPY + COMPUTE)
    assert PREDICTOR.ttft_seconds(disk, Mode.CPU) == pytest.approx(4 * 2 * COPY + COMPUTE + CPU)
    throttled = dataclasses.replace(POINT, link_bytes_per_second=0.1e6)
    assert PREDICTOR.ttft_seconds(throttled, Mode.STREAM) == pytest.approx(4 * 10 * COPY + COMPUTE)
    # Rows are charged as well: 16 x 320 x 4 bytes a layer.
    assert PREDICTOR.ttft_seconds(throttled, Mode.CPU) == pytest.approx(4 * (COMPUTE + 0.2048))


def test_adapters_that_arrive_together_share_link_and_device() -> None:
    three = dataclasses.replace(POINT, adapters=3)
    ends = [4 * COPY * number + COMPUTE for number in (1, 2, 3)]
    assert PREDICTOR.ttft_seconds(three, Mode.STREAM) == pytest.approx(sum(ends) / 3)
    # Warm, as many as the budget of 64 tokens holds share a step.
    six = dataclasses.replace(POINT, adapters=6)
    assert PREDICTOR.ttft_seconds(six, Mode.WARM) == pytest.approx((4 * 40e-3 + 2 * 80e-3) / 6)


def test_the_planner_is_never_predicted_slower_than_the_others() -> None:
    for point in Axes().points():
        times = {mode: PREDICTOR.ttft_seconds(point, mode) for mode in Mode}
        assert times[Mode.PLANNER] <= min(times[Mode.LOAD_FIRST], times[Mode.STREAM], times[Mode.CPU]) + 1e-12

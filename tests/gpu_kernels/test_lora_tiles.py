"""Which tiles a device gets: Hopper's as they were measured, and everywhere such that a grid runs all at once."""

from __future__ import annotations

from dataclasses import replace

import pytest

from segue.gpu_kernels.lora_tiles import Architecture, LoraTiles, PointShape, Regime, choose_tiles
from segue.gpu_kernels.lora_work import plan_capacity

# Bytes of shared memory: of a multiprocessor, of one program at most, and what the system takes of each program.
SHARED_BYTES = {
    Architecture.SM_80: (164 << 10, 163 << 10),
    Architecture.SM_86: (100 << 10, 99 << 10),
    Architecture.SM_90: (228 << 10, 227 << 10),
}
SYSTEM_BYTES = 1 << 10
REGISTERS = 65_536
# The fewest that an architecture runs at once: sm_86.
THREADS = 1_536


def tiles_of(
    regime: Regime, architecture: Architecture, *, element_bytes: int = 2, chunk_elems: int = 1024
) -> LoraTiles:
    return choose_tiles(
        regime,
        chunk_elems=chunk_elems,
        page_elems=32_768,
        element_bytes=element_bytes,
        multiprocessors=1,
        architecture=architecture,
    )


@pytest.mark.parametrize("element_bytes", [2, 4])
@pytest.mark.parametrize("regime", Regime)
@pytest.mark.parametrize("architecture", Architecture)
def test_all_programs_of_a_grid_run_at_once(architecture: Architecture, regime: Regime, element_bytes: int) -> None:
    tiles = tiles_of(regime, architecture, element_bytes=element_bytes)
    stage_bytes = (tiles.rows + tiles.ranks) * tiles.step * element_bytes
    program_bytes = tiles.stages * stage_bytes + SYSTEM_BYTES
    of_multiprocessor, of_program = SHARED_BYTES[architecture]
    assert program_bytes <= of_program
    assert tiles.shrink_programs * program_bytes <= of_multiprocessor
    for programs, warps, registers in (
        (tiles.shrink_programs, tiles.shrink_warps, tiles.shrink_registers),
        (tiles.expand_programs, tiles.expand_warps, tiles.expand_registers),
    ):
        assert programs * warps * 32 * registers <= REGISTERS
        assert programs * warps * 32 <= THREADS


@pytest.mark.parametrize("regime", Regime)
def test_less_shared_memory_changes_shrinks_pipeline_alone(regime: Regime) -> None:
    hopper = tiles_of(regime, Architecture.SM_90)
    prefill = regime is Regime.PREFILL
    assert (hopper.step, hopper.stages) == ((64, 3) if prefill else (128, 3))
    pipelines = {
        Architecture.SM_80: (64, 3) if prefill else (128, 2),
        Architecture.SM_86: (64, 2) if prefill else (64, 3),
    }
    for architecture, (step, stages) in pipelines.items():
        assert tiles_of(regime, architecture) == replace(hopper, step=step, stages=stages)


@pytest.mark.parametrize("chunk_elems", [8, 32, 64, 128, 1024])
@pytest.mark.parametrize("regime", Regime)
def test_a_plan_has_the_same_room_on_every_architecture(regime: Regime, chunk_elems: int) -> None:
    shape = PointShape(in_features=4096, out_features=(4096, 1024, 1024))
    capacities = {
        plan_capacity(
            shape,
            tiles_of(regime, architecture, chunk_elems=chunk_elems),
            max_segments=128,
            max_rows=512,
            max_rank=64,
        )
        for architecture in Architecture
    }
    assert len(capacities) == 1


@pytest.mark.parametrize(
    ("capability", "architecture"),
    [
        ((8, 0), Architecture.SM_80),
        ((8, 6), Architecture.SM_86),
        ((8, 9), Architecture.SM_86),
        ((9, 0), Architecture.SM_90),
        ((10, 0), Architecture.SM_90),
        ((12, 0), Architecture.SM_86),
    ],
)
def test_a_device_takes_the_tiles_of_its_shared_memory(capability: tuple[int, int], architecture: Architecture) -> None:
    assert Architecture.of(capability) is architecture


def test_an_older_device_is_refused() -> None:
    with pytest.raises(ValueError, match=r"need compute capability 8\.0, the device has 7\.5"):
        Architecture.of((7, 5))

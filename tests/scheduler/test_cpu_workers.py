"""How many CPU workers share a job, by what was measured of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from segue.scheduler.cost_model import CpuCoefficients

seconds = st.floats(0, 1e-2)
coefficients = st.builds(
    CpuCoefficients,
    fixed_seconds=seconds,
    seconds_per_token=st.floats(0, 1e-4),
    seconds_per_worker=st.floats(0, 1e-3),
    core_seconds_per_rank=st.floats(0, 1e-4),
    core_seconds_per_token=st.floats(0, 1e-4),
    core_seconds_per_token_rank=st.floats(0, 1e-5),
)
tokens = st.integers(1, 4096)
ranks = st.integers(1, 256)
most = st.integers(1, 64)
adapters = st.integers(1, 40)


@given(coefficients, tokens, ranks, most, adapters)
def test_from_one_worker_to_all_and_never_more_than_rows(
    cpu: CpuCoefficients, tokens: int, rank: int, most: int, adapters: int
) -> None:
    assert 1 <= cpu.workers(tokens, rank, most, adapters) <= min(most, tokens)


@given(coefficients, tokens, st.integers(1, 512), ranks, most, adapters)
def test_more_rows_never_have_fewer_workers(
    cpu: CpuCoefficients, tokens: int, more: int, rank: int, most: int, adapters: int
) -> None:
    assert cpu.workers(tokens + more, rank, most, adapters) >= cpu.workers(tokens, rank, most, adapters)


@given(coefficients, tokens, ranks, most, most)
def test_of_fewer_workers_it_has_as_many_as_it_would_have_or_all(
    cpu: CpuCoefficients, tokens: int, rank: int, some: int, more: int
) -> None:
    assert cpu.workers(tokens, rank, some) == min(some, cpu.workers(tokens, rank, some + more))


@given(coefficients, tokens, ranks, st.integers(2, 64))
def test_each_worker_saves_a_fiftieth_and_another_would_not(
    cpu: CpuCoefficients, tokens: int, rank: int, most: int
) -> None:
    """The rows' ways there and back are no part of what is saved from."""

    def seconds_on(workers: int) -> float:
        return cpu.on_workers(tokens, rank, workers) - cpu.seconds_per_token * tokens

    count = cpu.workers(tokens, rank, most)
    for workers in range(1, count):
        assert seconds_on(workers) - seconds_on(workers + 1) > 0.02 * seconds_on(workers)
    if count < min(most, tokens):
        assert seconds_on(count) - seconds_on(count + 1) <= 0.020001 * seconds_on(count)


@pytest.mark.parametrize(("tokens", "workers"), [(1, 1), (8, 3), (32, 6), (128, 11), (1024, 12)])
def test_few_rows_have_few_workers(tokens: int, workers: int) -> None:
    """The figures of docs/benchmarks/profile-h200.toml, rank 64, twelve workers."""
    cpu = CpuCoefficients(
        fixed_seconds=1.27e-3,
        seconds_per_token=1.08e-6,
        core_seconds_per_rank=6.78e-6,
        core_seconds_per_token_rank=6.75e-7,
    )
    assert cpu.workers(tokens, 64, 12) == workers
    assert cpu.seconds(tokens, 64, 12) == cpu.on_workers(tokens, 64, workers)


def test_a_dear_worker_is_not_woken() -> None:
    cheap = CpuCoefficients(core_seconds_per_token_rank=1e-6)
    dear = CpuCoefficients(core_seconds_per_token_rank=1e-6, seconds_per_worker=1e-4)
    assert cheap.workers(32, 8, 16) == 16
    # 256 us of work: the second worker saves 128 less its own 100, the third would save 43.
    assert dear.workers(32, 8, 16) == 2
    assert dear.on_workers(32, 8, 1) == pytest.approx(356e-6)
    assert dear.on_workers(32, 8, 2) == pytest.approx(328e-6)


def test_workers_share_what_a_row_costs_and_not_its_way() -> None:
    assert CpuCoefficients(fixed_seconds=1e-4, core_seconds_per_token=1e-5).workers(64, 8, 4) == 4
    assert CpuCoefficients(fixed_seconds=1e-4, seconds_per_token=1e-5).workers(64, 8, 4) == 1


def test_rows_of_several_adapters_share_the_reading_of_their_weights() -> None:
    cpu = CpuCoefficients(core_seconds_per_rank=1e-5)
    assert cpu.workers(16, 64, 8) == 1
    assert cpu.workers(16, 64, 8, adapters=16) == 8
    assert cpu.on_workers(16, 64, 8, adapters=16) == pytest.approx(2 * 64e-5)
    assert cpu.on_workers(16, 64, 8, adapters=4) == pytest.approx(64e-5)

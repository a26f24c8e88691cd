"""The cost model: more never costs less, and each form of kernels costs what it says."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from segue.config import ConfigError, from_table, read_toml, to_toml
from segue.scheduler.cost_model import CostProfile, LoraForm, StepCoefficients, StepLoad
from tests.scheduler.cost_cases import COEFFICIENTS, PROFILE, RANK_BYTES, batch, ranks

EMPTY = StepLoad()


@given(some=ranks, more=ranks, form=st.sampled_from(LoraForm))
def test_more_rows_never_cost_less(some: list[int], more: list[int], form: LoraForm) -> None:
    profile = dataclasses.replace(PROFILE, decode=COEFFICIENTS[form], prefill=COEFFICIENTS[form])
    small, large = batch(some), batch(some).joined(batch(more))
    assert large == batch([*some, *more])
    assert profile.decode_seconds(small) < profile.decode_seconds(large)
    assert profile.prefill_seconds(small) < profile.prefill_seconds(large)
    assert profile.step_seconds(small, EMPTY) <= profile.step_seconds(small, batch(more))
    assert profile.step_seconds(EMPTY, small) <= profile.step_seconds(batch(more), small)
    assert profile.copy_seconds(small.adapter_bytes) <= profile.copy_seconds(large.adapter_bytes)


@given(tokens=st.integers(1, 4096), rank=st.sampled_from((1, 8, 64)), cores=st.integers(1, 64))
def test_the_cpus_help_costs_more_for_more_rows_and_ranks_and_less_with_more_cores(
    tokens: int, rank: int, cores: int
) -> None:
    seconds = PROFILE.cpu_delta_seconds(tokens, rank, cores)
    # With one worker more it may be less by what that must save.
    assert 0.98 * seconds < PROFILE.cpu_delta_seconds(tokens + 64, rank, cores)
    assert 0.98 * seconds < PROFILE.cpu_delta_seconds(tokens, rank + 1, cores)
    assert PROFILE.cpu_delta_seconds(tokens, rank, cores + 1) <= seconds


@given(tokens=st.integers(1, 2048), rank=st.sampled_from((1, 8, 64)), cores=st.integers(0, 16))
def test_a_cold_prefill_is_no_faster_than_a_warm_one_and_no_slower_than_loading_first(
    tokens: int, rank: int, cores: int
) -> None:
    load = StepLoad(tokens=tokens, adapters=1, adapter_bytes=rank * RANK_BYTES, max_rank=rank, rank_tokens=rank)
    warm = PROFILE.prefill_seconds(load)
    assert warm <= PROFILE.cold_prefill_seconds(load, cores) <= warm + PROFILE.copy_seconds(load.adapter_bytes)
    assert PROFILE.cold_prefill_seconds(load, cores + 1) <= PROFILE.cold_prefill_seconds(load, cores)


def test_each_form_of_kernels_pays_for_what_it_reads() -> None:
    mixed, narrow = [8, 8, 8, 64], [8, 8, 8, 8]
    lora = {form: (COEFFICIENTS[form].parts(batch(mixed))[2], COEFFICIENTS[form].parts(batch(narrow))[2])
            for form in LoraForm}  # fmt: skip
    assert lora[LoraForm.PRESENT_BYTES] == pytest.approx(
        (
            4e-4 + 4 * 4e-6 + 88 * (RANK_BYTES * 4e-13 + 2e-8),
            4e-4 + 4 * 4e-6 + 32 * (RANK_BYTES * 4e-13 + 2e-8),
        )
    )
    assert lora[LoraForm.MAX_RANK] == pytest.approx((4 * 64 * 4e-6, 4 * 8 * 4e-6))
    assert lora[LoraForm.SUM_OF_RANKS] == pytest.approx((88 * 3e-6, 32 * 3e-6))


def test_rows_of_one_adapter_read_its_weights_once() -> None:
    one = batch([64])
    both = one.joined(one, shared_adapter=True)
    assert (both.adapters, both.adapter_bytes, both.rank_tokens) == (1, 64 * RANK_BYTES, 128)


def test_the_fixed_part_is_paid_once_where_prompts_ride() -> None:
    decodes, prompts = batch([8, 8]), batch([16])
    apart = dataclasses.replace(PROFILE, prompts_ride=False)
    both = apart.step_seconds(decodes, prompts)
    assert both == pytest.approx(PROFILE.decode_seconds(decodes) + PROFILE.prefill_seconds(prompts), rel=1e-12)
    assert both - PROFILE.step_seconds(decodes, prompts) == pytest.approx(PROFILE.prefill.fixed_seconds)


def test_a_step_without_rows_costs_nothing() -> None:
    assert PROFILE.step_seconds(EMPTY, EMPTY) == 0.0


def test_there_is_no_help_without_cores() -> None:
    assert PROFILE.cpu_delta_seconds(4, 8, 0) == math.inf
    assert dataclasses.replace(PROFILE, cpu=None).cpu_delta_seconds(4, 8, 4) == math.inf


@pytest.mark.parametrize("value", [-1e-9, math.inf, math.nan, "much", True])
def test_a_coefficient_that_is_no_time_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match=r"^seconds_per_token: must be"):
        StepCoefficients(seconds_per_token=value)  # type: ignore[arg-type]


def test_a_profile_is_read_as_it_was_written(tmp_path: Path) -> None:
    for profile in (PROFILE, dataclasses.replace(PROFILE, cpu=None, name='odd "name" é')):
        path = tmp_path / "profile.toml"
        path.write_text(to_toml(profile))
        assert from_table(CostProfile, read_toml(path), where="profile") == profile


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ("layers = 32", "layers = 0", r"^layers: must be a whole number from 1 on, is 0"),
        ("layers = 32", "layer = 32", r"^profile\.layer: unknown; known are copy, cpu, decode"),
        ("[prefill]", "[prefil]", r"^profile\.prefil: unknown"),
        ("seconds_per_byte = 2e-11", 'seconds_per_byte = "fast"', r"^seconds_per_byte: must be a number, is 'fast'"),
        ("prompts_ride = true", "prompts_ride = 1", r"^prompts_ride: must be true or false, is 1"),
        ('name = "a machine"', "", r"^profile\.name: is missing"),
        ("fixed_seconds = 0.005", "fixed_seconds = 0", r"^decode\.fixed_seconds: must be greater than 0"),
        ("fixed_seconds = 0.005", "fixed_seconds 0.005", r"profile\.toml: Expected"),
    ],
)
def test_a_profile_that_is_wrong_is_refused_by_the_fields_name(tmp_path: Path, old: str, new: str, error: str) -> None:
    text = to_toml(PROFILE)
    assert old in text
    path = tmp_path / "profile.toml"
    path.write_text(text.replace(old, new))
    with pytest.raises(ConfigError, match=error):
        from_table(CostProfile, read_toml(path), where="profile")


@pytest.mark.parametrize(
    ("tokens", "seconds", "error"),
    [
        ((2, 1), (0.0, 1.0), "row_tokens: must be whole numbers from 1 on that rise"),
        ((0, 1), (0.0, 1.0), "row_tokens: must be whole numbers from 1 on that rise"),
        ((1, 2.5), (0.0, 1.0), "row_tokens: must be whole numbers from 1 on that rise"),
        ((1, 2), (1.0, 0.5), "row_seconds: must be finite numbers from 0 on that never fall"),
        ((1, 2), (-1.0, 0.5), "row_seconds: must be finite numbers from 0 on that never fall"),
        ((1, 2), (0.0, math.nan), "row_seconds: must be finite numbers from 0 on that never fall"),
        ((1, 2), (0.0, "1"), "row_seconds: must be finite numbers from 0 on that never fall"),
        ((1, 2), (0.0,), "row_seconds: must be 2 as row_tokens, is"),
    ],
)
def test_rows_that_are_no_rising_line_are_refused(tokens: object, seconds: object, error: str) -> None:
    with pytest.raises(ConfigError, match=f"^{error}"):
        StepCoefficients(row_tokens=tokens, row_seconds=seconds)  # type: ignore[arg-type]


def test_the_base_models_time_is_a_line_that_bends() -> None:
    bent = StepCoefficients(fixed_seconds=1.0, row_tokens=(2, 4, 8), row_seconds=(0.5, 1.0, 4.0))
    seconds = {rows: bent.base_seconds(rows) for rows in (0, 1, 2, 3, 4, 6, 8, 10)}
    assert seconds == {0: 0.0, 1: 1.5, 2: 1.5, 3: 1.75, 4: 2.0, 6: 3.5, 8: 5.0, 10: 6.5}


BENT = dataclasses.replace(
    COEFFICIENTS[LoraForm.PRESENT_BYTES], row_tokens=(1, 2, 64, 256), row_seconds=(0.0, 1e-3, 1e-3, 9e-3)
)


@pytest.mark.parametrize("tokens", [(0, 1), (2, 2), (1, 2.5), (True,)])
def test_paddings_that_do_not_rise_are_refused(tokens: object) -> None:
    with pytest.raises(ConfigError, match=r"^padded_tokens: must be whole numbers from 1 on that rise"):
        StepCoefficients(padded_tokens=tokens)  # type: ignore[arg-type]


def test_products_are_over_padded_rows_and_all_else_over_the_rows_that_there_are() -> None:
    padded = dataclasses.replace(COEFFICIENTS[LoraForm.PRESENT_BYTES], padded_tokens=(4, 8))
    assert [padded.padded(rows) for rows in (1, 4, 5, 8, 9, 100)] == [4, 4, 8, 8, 9, 100]
    assert padded.base_seconds(0) == 0.0
    load = batch([8, 0, 16, 64, 0])
    exact = dataclasses.replace(padded, padded_tokens=())
    assert padded.parts(load) == (exact.base_seconds(8), *exact.parts(load)[1:])
    profile = dataclasses.replace(PROFILE, prefill=padded)
    both = profile.step_parts(batch([0] * 3), batch([0], rows=3))
    assert both[0] >= exact.base_seconds(8), "six rows together are padded to eight"


@given(some=ranks, more=ranks, padded=st.sets(st.integers(1, 160), max_size=8))
def test_more_rows_of_either_kind_never_cost_less_where_lines_bend(
    some: list[int], more: list[int], padded: set[int]
) -> None:
    decode = dataclasses.replace(BENT, padded_tokens=tuple(sorted(padded)))
    prefill = dataclasses.replace(decode, fixed_seconds=2e-3)
    profile = dataclasses.replace(PROFILE, decode=decode, prefill=prefill)
    small, large = batch(some), batch(some).joined(batch(more))
    for other in (EMPTY, batch(more)):
        assert profile.step_seconds(small, other) <= profile.step_seconds(large, other) * (1 + 1e-12)
        assert profile.step_seconds(other, small) <= profile.step_seconds(other, large) * (1 + 1e-12)
    assert profile.step_seconds(small, batch(more)) >= max(
        profile.decode_seconds(small), profile.prefill_seconds(batch(more))
    ) * (1 - 1e-12)


def test_scaled_coefficients_scale_their_parts() -> None:
    load = batch([8, 64], rows=3)
    padded = dataclasses.replace(BENT, padded_tokens=(16,))
    scaled = padded.scaled(2.0, 3.0, 0.5)
    base, attention, lora = padded.parts(load)
    assert scaled.parts(load) == pytest.approx((2 * base, 3 * attention, 0.5 * lora))

"""Lengths have their means and bounds."""

from __future__ import annotations

import numpy as np
import pytest

from segue.bench.slo.lengths import LengthConfig, draw_lengths
from segue.config import ConfigError


def lengths(text: str, count: int = 20_000, recorded: tuple[int, ...] = ()) -> np.ndarray:
    return draw_lengths(LengthConfig.parse("prompt", text), count, np.random.default_rng(1), recorded)


def test_lengths_are_as_said() -> None:
    assert set(lengths("128")) == {128}
    drawn = lengths("lognormal:200:0.8")
    assert drawn.mean() == pytest.approx(200, rel=0.03)
    assert np.log(drawn).std() == pytest.approx(0.8, rel=0.03)
    assert drawn.min() >= 1
    cut = lengths("lognormal:200:0.8:300")
    assert cut.max() == 300
    assert (cut == np.minimum(drawn, 300)).all()


def test_a_traces_lengths_come_in_order_and_again() -> None:
    assert list(lengths("trace", 5, (7, 0, 9))) == [7, 1, 9, 7, 1]


@pytest.mark.parametrize("text", ["", "x", "1.5", "lognormal", "lognormal:1", "lognormal:a:1", "trace:1", "5:6", "-"])
def test_another_form_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match=r"prompt: must be N, lognormal:MEAN:SIGMA\[:MOST\] or trace"):
        LengthConfig.parse("prompt", text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0", "output: must be at least 1 token, is 0"),
        ("lognormal:10:-1", "output: sigma must not be negative"),
        ("lognormal:10:1:0", "output: must allow at least 1 token"),
    ],
)
def test_what_cannot_be_is_named(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LengthConfig.parse("output", text)

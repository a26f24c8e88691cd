"""The demo: its drawing of recorded events, and the whole of it with a real server."""

from __future__ import annotations

import subprocess
import sys

import pytest

from segue.demo.timeline import layer_line, span_seconds, verdict
from segue.types import LayerTiming, LoraSource, Tier, Timing


def timing(*sources: LoraSource, landed: float | None = 0.5) -> Timing:
    layers = tuple(
        LayerTiming(
            layer=layer,
            source=source,
            start_seconds=0.1 * layer,
            end_seconds=0.1 * layer + 0.1,
            landed_seconds=landed,
        )
        for layer, source in enumerate(sources)
    )
    return Timing(
        tier=Tier.DISK,
        queue_seconds=0.0,
        ttft_seconds=0.1 * len(sources),
        tpot_seconds=None,
        total_seconds=1.0,
        cpu_layers=sources.count(LoraSource.CPU),
        layers=layers,
    )


def test_a_line_marks_what_computed_the_layer_and_when_it_landed() -> None:
    drawn = timing(LoraSource.CPU, LoraSource.CPU, LoraSource.DEVICE)
    assert span_seconds(drawn) == 0.5
    line = layer_line(drawn.layers[1], span_seconds(drawn), 10).plain
    assert "··CCC····▼" in line
    assert "cpu" in line
    assert "landed    500 ms" in line


def test_a_layer_that_never_landed_says_so() -> None:
    drawn = timing(LoraSource.CPU, landed=None)
    line = layer_line(drawn.layers[0], span_seconds(drawn), 10).plain
    assert "▼" not in line
    assert "not landed" in line


@pytest.mark.parametrize(
    ("sources", "words"),
    [
        ((LoraSource.CPU, LoraSource.DEVICE), "hand-over to the device at layer 1"),
        ((LoraSource.CPU, LoraSource.CPU), "all 2 layers of the prefill ran on the CPU"),
        ((LoraSource.DEVICE, LoraSource.DEVICE), "every layer had landed"),
    ],
)
def test_the_verdict_follows_from_the_events(sources: tuple[LoraSource, ...], words: str) -> None:
    assert words in verdict(timing(*sources))


def test_the_whole_demo_runs_and_every_cold_answer_equals_the_warm_one() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "segue", "demo"], capture_output=True, text=True, check=False, timeout=170
    )
    assert result.returncode == 0, result.stderr
    rows = [line for line in result.stdout.splitlines() if "(cold)" in line and line.startswith("│")]
    assert len(rows) == 6
    assert not any("device" in row for row in rows)
    assert all("yes" in row for row in rows)

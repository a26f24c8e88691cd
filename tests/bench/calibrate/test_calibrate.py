"""A whole calibration of a tiny model, by the command; and what it says when it cannot."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from segue.bench.report import Report
from segue.cli.main import build_app
from segue.engine.profile import load_profile

SMALL = (
    "--shape", "tiny", "--batch", "1,4,8", "--context", "8", "--prompts", "4,8,16,24,32", "--ranks", "4,8",
    "--rounds", "1", "--seconds", "300",
)  # fmt: skip


def calibrate(*arguments: str) -> Result:
    return CliRunner().invoke(build_app(), ("calibrate", *arguments), env={"COLUMNS": "200"})


def test_a_profile_is_measured_and_can_be_served_with(tmp_path: Path) -> None:
    out, json = tmp_path / "profile.toml", tmp_path / "report.json"
    result = calibrate(*SMALL, "--cpu-workers", "1", "--out", str(out), "--json", str(json))
    assert (result.exit_code, result.stderr) == (0, "")
    assert f"wrote {out}" in result.stdout
    profile, report = load_profile(out, layers=4), Report.read(json)
    assert profile.decode.fixed_seconds > 0
    assert profile.copy.fixed_seconds + profile.copy.seconds_per_byte > 0
    assert profile.cpu is not None
    assert profile.name.startswith("tiny, float32, ")
    text = out.read_text()
    assert text.startswith("# What steps, copies and the CPU's help cost, as segue calibrate measured it.")
    assert "#   decode: R squared " in text
    assert report.benchmark == "calibrate"
    by_measure: dict[str, int] = {}
    for row in report.rows:
        by_measure[row.measure] = by_measure.get(row.measure, 0) + 1
        assert row.median > 0
        assert row.fit_value is not None
        assert row.fit_value >= 0
    assert set(by_measure) == {
        "decode_step_ms", "prompt_step_ms", "riding_step_ms", "copy_ms", "cpu_jobs_us", "cpu_handover_us"
    }  # fmt: skip
    decodes = [row for row in report.rows if row.measure == "decode_step_ms"]
    assert {row.held_out for row in decodes} == {True, False}
    assert {row.batch for row in decodes} == {1, 4, 8}
    # What the report says of a step is what the profile that was written says.
    row = next(row for row in decodes if row.batch == 8 and not row.adapters)
    assert row.fit_value == pytest.approx(
        1e3 * (profile.decode.base_seconds(8) + profile.decode.seconds_per_context_token * (row.context_tokens or 0))
    )


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--seconds", "0.01"), "segue: seconds: of 0.01 too few were left after warming up 0 of 4 cases\n"),
        (("--model", "none"), "segue: give --shape or --model, not both\n"),
        (("--ranks", "8,x"), "segue: --ranks: must be whole numbers with commas between them, is '8,x'\n"),
        (("--out", "none/profile.toml"), "segue: --out: "),
        (("--json", "none/report.json"), "segue: --json: "),
    ],
)
def test_what_goes_wrong_is_one_line(arguments: tuple[str, ...], line: str, tmp_path: Path) -> None:
    result = calibrate(*SMALL, "--cpu-workers", "0", "--out", str(tmp_path / "profile.toml"), *arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith(line)
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "profile.toml").exists()

"""A profile as a file that a person can read."""

from __future__ import annotations

from segue.bench.calibrate.run import Calibration
from segue.config import to_toml
from segue.scheduler.cost_fit import FitQuality

_TABLES = {
    "decode": """
# A step whose rows all decode takes fixed_seconds, and more for each row (row_tokens rows take row_seconds, with a
# straight line between), for each token of KV that a row reads, if there are adapters, for each of them, for each byte
# of their weights, and for each row's rank. The device computes as many rows as the next of padded_tokens says, where
# there is one.""",
    "prefill": """
# The same of rows of prompts.""",
    "copy": """
# An adapter's copy from host memory to the device, until all layers have landed.""",
    "cpu": """
# One layer's deltas by the CPU workers: the hand-over, each row's way there and back, each worker that has a share,
# each rank's weights read by a core, and each row and each row times rank, divided by the workers. By these the engine
# chooses how many workers share a job.""",
}


def profile_text(calibration: Calibration) -> str:
    """The profile with where it comes from and how well it predicts, as comments of its TOML."""
    report, machine = calibration.report, calibration.report.machine
    lines = [
        "# What steps, copies and the CPU's help cost, as segue calibrate measured it. Times are in seconds.",
        f"# Machine: {machine.gpu or 'no GPU'}; {machine.cpu}, {machine.cores} cores.",
        f"# Code: {report.short_commit}; torch {report.versions['torch']}.",
        f"# Engine: {report.settings['device']}, {report.settings['dtype']}, adapters on {report.settings['targets']}"
        f" of ranks {', '.join(map(str, report.settings['ranks']))}.",
        f"# Medians of {calibration.rounds:.1f} rounds. Steps that the fit did not see are predicted so:",
        *(f"#   {name}: {_words(FitQuality(**found))}" for name, found in report.settings["judgement"].items()),
        "",
    ]
    text = to_toml(calibration.profile)
    for table, meaning in _TABLES.items():
        text = text.replace(f"\n[{table}]\n", f"{meaning}\n[{table}]\n")
    return "\n".join(lines) + text


def _words(quality: FitQuality) -> str:
    return (
        f"R squared {quality.r_squared:.4f}, mean error {quality.mean_relative_error:.1%}, "
        f"largest {quality.max_relative_error:.1%}"
    )

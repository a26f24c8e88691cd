"""The one JSON form in which all benchmarks report."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import msgspec
import numpy as np

from segue.bench.machine import Machine, commit, versions


class ReportError(Exception):
    """A file that cannot be read as a report. The message is one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measure of one case over ``runs`` timings. ``measure`` ends in its unit, which is that of the percentiles.

    ``batch`` requests used ``adapters`` different adapters of these ``ranks``, which had weights for ``targets`` and
    lay at ``residency`` (a Tier's value). ``prompt`` is in tokens. ``when`` tells two rows of one case apart: of a base
    model measured before and after the cases with adapters. ``part`` names what the device did in that time of a decode
    step. None, and no ranks, where a case has no such thing.

    Of kernels, ``case`` names the batch of ``tokens`` rows and ``point`` the LoRA point; ``bytes`` is what a call must
    read and write at least, ``copy_fraction`` those over what the measured copy bandwidth moves in the median, and
    ``max_relative_error`` the largest error of an output against float64, over the largest output. Of the CPU's kernels
    ``dtype`` is that of rows and weights, and ``cores`` as many as computed.

    Of a cold start, ``mode`` says how the sources of its layers were chosen, of which the CPU computed ``cpu_share`` in
    the mean, and ``residency`` is of the cold modes; ``batch`` requests arrived together over a link of
    ``link_bytes_per_second`` (None: not throttled), while ``decodes`` others decoded. ``timings`` are those of the
    percentiles. A ratio's ``lower_bound`` and ``upper_bound`` each hold with a confidence of 95%. ``predicted``: by the
    cost model, not measured.

    Of a simulated cluster, ``placement`` names the policy, ``batch`` counts the requests measured and ``adapters`` all
    adapters; ``mean`` and ``p99`` stand beside the percentiles.

    Where a model was fitted, ``fit_value`` is what it says of the case, in the unit of the percentiles, and
    ``held_out`` whether it was fitted without the case. ``batch`` counts the rows that decode, ``tokens`` those of
    prompts, ``context_tokens`` the tokens of KV that all of them read, and ``bytes`` those of the adapters' weights.

    Of a server under load, ``batch`` counts the requests measured at ``requests_per_second``, ``low`` and ``high`` are
    Wilson's interval of a share, and ``group`` is a part of the requests in the division ``part``.
    """

    measure: str
    batch: int
    adapters: int
    ranks: tuple[int, ...] = ()
    targets: str | None = None
    prompt: int | None = None
    residency: str | None = None
    when: str | None = None
    part: str | None = None
    case: str | None = None
    tokens: int | None = None
    context_tokens: int | None = None
    point: str | None = None
    bytes: int | None = None
    copy_fraction: float | None = None
    max_relative_error: float | None = None
    dtype: str | None = None
    cores: int | None = None
    placement: str | None = None
    requests_per_second: float | None = None
    group: str | None = None
    low: float | None = None
    high: float | None = None
    mode: str | None = None
    cpu_share: float | None = None
    link_bytes_per_second: float | None = None
    decodes: int | None = None
    lower_bound: float | None = None
    upper_bound: float | None = None
    predicted: bool | None = None
    timings: tuple[float, ...] | None = None
    mean: float | None = None
    p99: float | None = None
    fit_value: float | None = None
    held_out: bool | None = None
    median: float
    p10: float
    p90: float
    runs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Percentiles:
    """The middle of some timings and the borders of the lowest and highest tenth, in the timings' unit."""

    median: float
    p10: float
    p90: float
    runs: int

    @classmethod
    def of(cls, timings: Sequence[float]) -> Self:
        """Between two timings it is interpolated linearly. Raises ValueError for none."""
        if not timings:
            raise ValueError("timings: there must be at least one")
        p10, median, p90 = (float(value) for value in np.percentile(timings, [10, 50, 90]))
        return cls(median=median, p10=p10, p90=p90, runs=len(timings))


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a benchmark measured, where, and with what. ``settings`` are the benchmark's own options; for kernels also
    the copy bandwidth, measured in the same run.

    ``commit`` is None outside of a git checkout and ends in "-dirty" where tracked files were changed; SEGUE_COMMIT may
    name another.
    """

    benchmark: str
    machine: Machine
    versions: Mapping[str, str]
    commit: str | None
    settings: Mapping[str, Any] = field(default_factory=dict)
    rows: tuple[Row, ...]

    @classmethod
    def here(cls, benchmark: str, settings: Mapping[str, Any], rows: Sequence[Row]) -> Self:
        """The report of rows that were measured on this machine with this code. Raises ConfigError for SEGUE_COMMIT."""
        return cls(
            benchmark=benchmark,
            machine=Machine.here(),
            versions=versions(),
            commit=commit(),
            settings=settings,
            rows=tuple(rows),
        )

    @property
    def short_commit(self) -> str:
        """The commit's first ten digits, with what tells changed files; "unknown" without one."""
        digits, *dirty = (self.commit or "unknown").split("-")
        return "-".join([digits[:10], *dirty])

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises ReportError for a file that cannot be read or is of another form."""
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except OSError as error:
            raise ReportError(f"{path}: {error.strerror}") from error
        except msgspec.DecodeError as error:
            raise ReportError(f"{path}: is no benchmark report: {error}") from error

    def write(self, path: Path) -> None:
        """Write the file so that readers see it whole or not at all; rows leave out what is None. Raises OSError."""
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            data = msgspec.to_builtins(self)
            data["rows"] = [{key: value for key, value in row.items() if value is not None} for row in data["rows"]]
            draft.write_bytes(msgspec.json.format(msgspec.json.encode(data), indent=2) + b"\n")
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)

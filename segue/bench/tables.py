"""Reports as tables: for a terminal, and in Markdown for the README."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from rich.table import Table

from segue.bench.coldstart import load_view as coldload
from segue.bench.coldstart import view as coldstart
from segue.bench.report import Report, Row
from segue.bench.simulate.table import column_names, lines

_WORDS = {
    "gemm_ms": "GEMMs alone",
    "decode_step_ms": "decode step",
    "step_part_ms": "part of a decode step",
    "ttft_ms": "first token",
    "device_idle_fraction": "device idle",
    "tokens_per_second": "tokens a second",
    "time_per_token_ms": "a stream's time per token",
    "lora_kernels_us": "LoRA kernels",
    "landing_kernel_us": "landing",
    "cpu_kernel_us": "CPU kernel",
    "torch_us": "torch",
    "cpu_workers_us": "workers",
    "read_floor_ms": "file read only",
    "memory_copy_ms": "copy in memory",
    "read_adapter_ms": "adapter read",
    "read_layers_ms": "all layers read",
    "read_first_layer_ms": "first layer read",
    "read_bookkeeping_ms": "the loop's own work for a read",
    "read_beside_loop_ms": "adapter read beside a busy loop",
    "layers_beside_loop_ms": "all layers read beside a busy loop",
    "loop_turn_alone_ms": "turn of the loop",
    "loop_turn_beside_ms": "turn of the loop beside reads",
}


def describe(row: Row) -> str:
    """A row's case in words."""
    parts = [_WORDS.get(row.measure, row.measure)]
    if row.case is not None:
        cores = "" if row.cores is None else f", {row.cores} core{'' if row.cores == 1 else 's'}"
        return f"{parts[0]}, {row.case}, {row.point}{cores}"
    if row.part is not None:
        parts.append(row.part)
    if row.measure != "ttft_ms":
        parts.append(f"batch {row.batch}")
    if row.prompt is not None:
        parts.append(f"prompt {row.prompt}")
        parts.append(mix_words(row) + ("" if row.when is None else f" ({row.when} the adapters' cases)"))
    return ", ".join(parts)


def mix_words(row: Row) -> str:
    """A row's adapters in words."""
    if not row.adapters:
        return "base"
    count = "1 adapter" if row.adapters == 1 else f"{row.adapters} adapters"
    ranks = f" of rank {', '.join(map(str, row.ranks))}" if row.ranks else ""
    return f"{count}{ranks}{f' on {row.targets}' if row.targets else ''}"


def terminal_table(report: Report) -> Table:
    """Every row with its percentiles; tokens/s of decode steps, and what rows of kernels have besides."""
    kernels = any(row.case is not None for row in report.rows)
    table = Table(box=None)
    table.add_column("measure")
    if kernels:
        table.add_column("case")
        names = ["point", "cores", "median", "p10", "p90", "runs", "bytes", "of copy", "max error"]
    else:
        names = ["batch", "adapters", "ranks", "targets", "prompt", "when", "part"]
        names += ["median", "p10", "p90", "runs", "tokens/s"]
    for name in names:
        table.add_column(name, justify="right")
    for row in report.rows:
        times = [f"{value:.3f}" for value in (row.median, row.p10, row.p90)]
        if kernels:
            fraction = "" if row.copy_fraction is None else f"{row.copy_fraction:.0%}"
            error = "" if row.max_relative_error is None else f"{row.max_relative_error:.1e}"
            times += [str(row.runs), _text(row.bytes), fraction, error]
            table.add_row(row.measure, row.case, row.point, _text(row.cores), *times)
        else:
            ranks = ",".join(map(str, row.ranks))
            rate = f"{1e3 * row.batch / row.median:.0f}" if row.measure == "decode_step_ms" else ""
            where = (_text(row.batch), _text(row.adapters), ranks, _text(row.targets), _text(row.prompt))
            table.add_row(row.measure, *where, _text(row.when), _text(row.part), *times, str(row.runs), rate)
    return table


def readme_tables(reports: Mapping[str, Report]) -> str:
    """Markdown with a table for each benchmark, a column for each of its reports, which are named by their files."""
    parts = []
    for benchmark in sorted({report.benchmark for report in reports.values()}):
        members = {name: report for name, report in sorted(reports.items()) if report.benchmark == benchmark}
        if benchmark == "simulate":
            parts += [_placement_table(name, report) for name, report in members.items()]
        elif benchmark == "coldstart":
            parts += [
                _lines_table(name, coldstart.summary_names(), coldstart.summary_lines(report))
                for name, report in members.items()
            ]
        elif benchmark == "coldload":
            parts += [
                _lines_table(name, coldload.column_names(), coldload.lines(report)) for name, report in members.items()
            ]
        else:
            parts.append(_TABLES.get(benchmark, _median_table)(members))
        parts += [f"`{name}`: {_origin(report)}." for name, report in members.items()]
    return "\n\n".join(parts) + "\n"


def _median_table(reports: Mapping[str, Report]) -> str:
    cells = {name: {describe(row): row for row in report.rows} for name, report in reports.items()}
    cases = dict.fromkeys(case for rows in cells.values() for case in rows)
    lines = [[f"`{name}`" for name in cells]]
    for case in cases:
        found = (rows.get(case) for rows in cells.values())
        lines.append(["" if row is None else _median_cell(row) for row in found])
    plain = all(row.measure.endswith("_ms") for rows in cells.values() for row in rows.values())
    title = "milliseconds: median (p10 to p90)" if plain else "median (p10 to p90), times in milliseconds"
    return _markdown([title, *cases], lines)


def _median_cell(row: Row) -> str:
    form = ".1%" if row.measure.endswith("_fraction") else ".2f"
    return f"{row.median:{form}} ({row.p10:{form}} to {row.p90:{form}})"


def _kernel_table(reports: Mapping[str, Report]) -> str:
    cells = {name: {describe(row): row for row in report.rows} for name, report in reports.items()}
    cases = dict.fromkeys(case for rows in cells.values() for case in rows)
    lines = [[f"`{name}`" for name in cells]]
    lines += [[_kernel_cell(rows.get(case)) for rows in cells.values()] for case in cases]
    return _markdown(["microseconds: median, part of the copy bandwidth", *cases], lines)


def _placement_table(name: str, report: Report) -> str:
    """A column for each placement."""
    (label, *columns), found = column_names(), lines(report)
    cells = [[line[place] for line in found] for place in range(len(columns) + 1)]
    return _markdown([f"`{name}`: {label}", *columns], cells)


def _lines_table(name: str, columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A line for each of ``lines``, which begin with their label."""
    label, *others = columns
    return _markdown([f"`{name}`: {label}", *(line[0] for line in lines)], [others, *(line[1:] for line in lines)])


def _kernel_cell(row: Row | None) -> str:
    if row is None:
        return ""
    fraction = "" if row.copy_fraction is None else f", {row.copy_fraction:.0%}"
    return f"{row.median:.1f}{fraction}"


def _cpu_table(reports: Mapping[str, Report]) -> str:
    """A line for each shape, with torch's time over the kernel's; what workers took is in the reports alone."""
    kernel: dict[str, dict[str, Row]] = {}
    torch: dict[str, dict[str, Row]] = {}
    for name, report in reports.items():
        for row in report.rows:
            if row.measure in ("cpu_kernel_us", "torch_us"):
                shape = f"{row.tokens} tokens, rank {row.ranks[0]}, {row.point}"
                times = kernel if row.measure == "cpu_kernel_us" else torch
                times.setdefault(shape, {})[f"`{name}` {row.dtype}"] = row
    columns = list(dict.fromkeys(column for rows in kernel.values() for column in rows))
    lines = [columns]
    for shape, rows in kernel.items():
        peers = torch[shape]
        cells = [(rows[column].median, peers[column].median) if column in rows else None for column in columns]
        lines.append(["" if cell is None else f"{cell[0]:.1f}, {cell[1] / cell[0]:.2f}" for cell in cells])
    return _markdown(["microseconds on one core: median; torch's over it", *kernel], lines)


def _judgement_table(reports: Mapping[str, Report]) -> str:
    """How well each profile predicts the steps that it was not fitted to."""
    found = {f"`{name}`": report.settings["judgement"] for name, report in reports.items()}
    kinds = dict.fromkeys(kind for qualities in found.values() for kind in qualities)
    lines = [list(found)]
    for kind in kinds:
        qualities = [judged.get(kind) for judged in found.values()]
        lines.append(["" if quality is None else _quality_cell(quality) for quality in qualities])
    return _markdown(["steps not fitted: mean error, R squared", *kinds], lines)


def _quality_cell(quality: Mapping[str, float]) -> str:
    return f"{quality['mean_relative_error']:.1%}, {quality['r_squared']:.4f}"


def _comparison_table(reports: Mapping[str, Report]) -> str:
    """What an engine took, what was predicted, and by how much that is off."""
    lines = [[f"`{name}`" for name in reports]]
    labels = ["milliseconds: engine, simulated, off by"]
    for measure, statistic in itertools.product(("ttft_ms", "tpot_ms"), ("mean", "p99")):
        label = f"{measure.removesuffix('_ms')} {statistic}"
        labels.append(label)
        cells = []
        for report in reports.values():
            rows = {row.placement: row for row in report.rows if row.measure == measure}
            engine, simulated = (getattr(rows[placement], statistic) for placement in ("engine", "simulated"))
            cells.append(f"{engine:.1f}, {simulated:.1f}, {report.settings['prediction_errors'][label]:+.1%}")
        lines.append(cells)
    return _markdown(labels, lines)


def _slo_table(reports: Mapping[str, Report]) -> str:
    """A column for each report, of the rate that it reports."""
    cells = {name: _slo_cells(report) for name, report in reports.items()}
    labels = list(dict.fromkeys(label for column in cells.values() for label in column))
    lines = [[f"`{name}`" for name in cells], *([cells[name].get(label, "") for name in cells] for label in labels)]
    return _markdown(["under load", *labels], lines)


def _slo_cells(report: Report) -> Mapping[str, str]:
    if report.settings["void"] is not None:
        return {"void": report.settings["void"]}
    attain = f"{report.settings['search']['attain']:.0%}"
    found = {row.measure: row for row in report.rows if row.part == "all"}
    cells = {
        f"requests/s with {attain} in time": f"{row.median:.4g}"
        for row in report.rows
        if row.measure == "goodput_requests_per_second"
    }
    if (share := found.get("slo_attainment_fraction")) is not None:
        cells["measured at, requests/s"] = f"{share.requests_per_second:.4g}"
        cells["in time (Wilson's interval)"] = f"{share.median:.1%} ({share.low:.1%} to {share.high:.1%})"
    for measure, name in (("ttft_ms", "first token"), ("tpot_ms", "per token after it")):
        if (row := found.get(measure)) is not None:
            cells[f"{name}, ms: median, p99"] = f"{row.median:.1f}, {row.p99:.1f}"
    return cells


_TABLES = {
    "kernels": _kernel_table,
    "cpu": _cpu_table,
    "slo": _slo_table,
    "calibrate": _judgement_table,
    "simulate-against": _comparison_table,
}


def _markdown(labels: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [f"| {label} | {' | '.join(cells)} |" for label, cells in zip(labels, lines, strict=True)]
    rule = "| --- |" + " ---: |" * len(lines[0])
    return "\n".join([rows[0], rule, *rows[1:]])


def _origin(report: Report) -> str:
    machine = report.machine
    parts = [machine.gpu or machine.cpu or "unknown machine"]
    if machine.gpu is None and machine.cores is not None:
        parts.append(f"{machine.cores} cores")
    parts += [f"{name} {report.versions[name]}" for name in ("torch", "triton") if name in report.versions]
    parts.append(f"commit {report.short_commit}")
    return ", ".join(parts)


def _text(value: object) -> str:
    return "" if value is None else str(value)

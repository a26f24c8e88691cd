from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from segue.bench.random_checkpoints import write_random_model
from segue.bench.report import Report
from segue.bench.shapes import SHAPES
from segue.cli.main import build_app


def bench(*arguments: str, command: str = "engine") -> Result:
    return CliRunner().invoke(build_app(), ("bench", command, *arguments), env={"COLUMNS": "200"})


QUICK = ("--steps", "2", "--runs", "2")


def test_the_file_has_the_rows_that_were_asked_for(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    options = ("--batch", "1,3", "--mix", "base,2", "--ranks", "4,8", "--targets", "all", "--prompt", "12")
    result = bench("--shape", "tiny", *options, *QUICK, "--json", str(out))
    assert (result.exit_code, result.stderr) == (0, "")
    report = Report.read(out)
    assert [
        (row.measure, row.batch, row.adapters, row.ranks, row.targets, row.prompt, row.residency, row.runs)
        for row in report.rows
    ] == [
        ("gemm_ms", 1, 0, (), None, None, None, 4),
        ("gemm_ms", 3, 0, (), None, None, None, 4),
        ("decode_step_ms", 1, 0, (), None, 12, "none", 4),
        ("decode_step_ms", 3, 0, (), None, 12, "none", 4),
        ("decode_step_ms", 3, 2, (4, 8), "all", 12, "device", 4),
        ("decode_step_ms", 1, 0, (), None, 12, "none", 4),
        ("decode_step_ms", 3, 0, (), None, 12, "none", 4),
        ("ttft_ms", 1, 0, (), None, 16, "none", 10),
        ("ttft_ms", 1, 0, (), None, 128, "none", 10),
        ("ttft_ms", 1, 1, (8,), "all", 16, "device", 10),
        ("ttft_ms", 1, 1, (8,), "all", 128, "device", 10),
    ]
    assert all(0 < row.p10 <= row.median <= row.p90 for row in report.rows)
    assert (report.settings["shape"], report.settings["steps"]) == ("tiny", 2)
    table, _, ratios = result.stdout.partition("\n\n")
    assert [line.split()[0] for line in table.splitlines()] == ["measure", *(row.measure for row in report.rows)]
    assert "tokens/s of batch 3 over batch 1" in ratios
    assert "time per token with 2 adapters of rank 4, 8 on all over base" in ratios


def test_a_model_of_ones_own_is_measured(tmp_path: Path) -> None:
    model_dir = write_random_model(tmp_path / "model", SHAPES["tiny"], dtype=torch.float32)
    out = tmp_path / "report.json"
    options = ("--dtype", "bfloat16", "--batch", "2", "--mix", "base")
    assert bench("--model", str(model_dir), *options, *QUICK, "--json", str(out)).exit_code == 0
    settings = json.loads(out.read_text())["settings"]
    assert (settings["shape"], settings["model_dir"], settings["dtype"]) == (None, str(model_dir), "bfloat16")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--shape", "tiny", "--model", "m"), "segue: give --shape or --model, not both\n"),
        (
            ("--shape", "huge"),
            "segue: shape: must be one of tiny, small, medium, llama-2-7b, llama-3.1-8b, is 'huge'\n",
        ),
        (("--batch", "1,x"), "segue: --batch: must be whole numbers with commas between them, is '1,x'\n"),
        (("--device", "tpu"), "segue: device: must be "),
        (("--dtype", "int8"), "segue: dtype: must be one of float32, bfloat16, float16, is 'int8'\n"),
        (("--shape", "tiny", "--steps", "5000"), "segue: steps: a request would have 5137 tokens, the model's context"),
        (("--json", "none/report.json"), "segue: --json: "),
        (("--model", "none"), "segue: none/config.json"),
        (("--preset", "table"), "segue: --preset: must be one of table-8b, is 'table'\n"),
        (("--preset", "table-8b", "--batch", "4"), "segue: --preset names all cases: leave out --batch, --mix, "),
        (("--plot", "plot.doc"), "segue: --plot: must end in .png or .svg, is 'plot.doc'\n"),
    ],
)
def test_a_wrong_option_is_one_line(arguments: tuple[str, ...], line: str) -> None:
    result = bench(*arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(line)
    assert result.stderr.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is said where there is no CUDA device")
def test_timing_kernels_needs_a_gpu() -> None:
    result = bench(command="kernels")
    line = "segue: timing kernels needs a CUDA device, and torch finds none; --check-only does without\n"
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", line)


def test_a_check_writes_no_report() -> None:
    result = bench("--check-only", "--json", "report.json", command="kernels")
    assert result.stderr == "segue: --check-only measures nothing to write: leave out --json and --plot\n"


@pytest.mark.gpu
def test_an_engine_on_cuda_is_measured(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    options = (
        "--device",
        "cuda",
        "--dtype",
        "bfloat16",
        "--batch",
        "1,20",
        "--mix",
        "base,one,ranks",
        "--ranks",
        "8,16",
    )
    result = bench("--shape", "tiny", *options, *QUICK, "--json", str(out))
    assert (result.exit_code, result.stderr) == (0, "")
    decodes = [row for row in Report.read(out).rows if row.measure == "decode_step_ms"]
    adapters = [(row.batch, row.adapters) for row in decodes]
    assert adapters == [(1, 0), (1, 1), (1, 1), (20, 0), (20, 1), (20, 20), (1, 0), (20, 0)]

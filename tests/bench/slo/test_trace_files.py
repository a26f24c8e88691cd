"""The published traces are read, and a line that is broken is named by file and line."""

from __future__ import annotations

from pathlib import Path

import pytest

from segue.bench.slo.trace_files import TraceError, read_function_trace, read_request_trace

TRACES = Path(__file__).parent / "traces"


def test_azures_llm_trace_of_2023() -> None:
    trace = read_request_trace(TRACES / "azure-llm-2023.csv")
    assert trace.seconds == pytest.approx((0.0, 0.052, 0.098146, 1.5), abs=1e-6)
    assert (trace.prompt_tokens, trace.output_tokens) == ((4808, 110, 374, 0), (10, 27, 14, 9))
    assert (trace.blocks, trace.function_counts) == ((), ())


def test_azures_llm_trace_of_2024_has_a_time_zone() -> None:
    trace = read_request_trace(TRACES / "azure-llm-2024.csv")
    assert trace.seconds == pytest.approx((0.0, 0.007405, 0.99007), abs=1e-6)
    assert trace.prompt_tokens == (2162, 2399, 76)


def test_burst_gpt_without_what_failed_and_with_columns_that_came_later() -> None:
    trace = read_request_trace(TRACES / "burst-gpt.csv")
    assert (trace.seconds, trace.prompt_tokens, trace.output_tokens) == ((0.0, 113.0), (472, 417), (18, 276))


def test_mooncake_is_put_in_order_and_keeps_its_blocks() -> None:
    trace = read_request_trace(TRACES / "mooncake.jsonl")
    assert trace.seconds == pytest.approx((0.0, 2.0, 3.052))
    assert trace.output_tokens == (500, 7, 12)
    assert trace.blocks == ((0, 1, 2), (4,), (0, 3))
    assert trace.blocks_of(5) == (0, 3)


def test_azures_functions_of_2019_are_summed_over_the_day() -> None:
    assert read_function_trace(TRACES / "azure-functions-2019.csv").function_counts == (17, 5, 3)


def test_azures_functions_of_2021_are_counted() -> None:
    assert read_function_trace(TRACES / "azure-functions-2021.csv").function_counts == (3, 1, 1)


@pytest.mark.parametrize(
    ("name", "line", "text", "problem"),
    [
        ("azure-llm-2023.csv", 3, "yesterday,1,2", "'yesterday' is no date and time"),
        ("azure-llm-2023.csv", 2, "2023-11-16 18:17:03,1.5,2", "'1.5' is no whole number"),
        ("azure-llm-2023.csv", 4, "2023-11-16 18:17:03,-1,2", "-1 is negative"),
        ("azure-llm-2024.csv", 2, "2024-05-10 00:00:00,1", "has 2 fields, the first line has 3"),
        ("burst-gpt.csv", 4, "soon,s2,9.0,GPT-4,1,2,3,API log", "'soon' is no number"),
        ("mooncake.jsonl", 2, '{"timestamp": 1,', "Expecting property name"),
        ("mooncake.jsonl", 2, '{"timestamp": 1, "input_length": 5}', "has no 'output_length'"),
        (
            "mooncake.jsonl",
            4,
            '{"timestamp": 1, "input_length": "5", "output_length": 5}',
            "'5' is no number from 0 on",
        ),
        ("mooncake.jsonl", 1, "[1, 2]", "'list' object has no attribute 'get'"),
        ("azure-functions-2019.csv", 3, "o,a,f,http,1,x,3", "'x' is no whole number"),
        ("azure-functions-2021.csv", 6, "a,f,later,0.1", "'later' is no number"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, name: str, line: int, text: str, problem: str) -> None:
    lines = (TRACES / name).read_text().splitlines()
    lines[line - 1] = text
    path = tmp_path / name
    path.write_text("\n".join(lines))
    read = read_function_trace if "functions" in name else read_request_trace
    with pytest.raises(TraceError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:{line}: ")
    assert problem in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("t.csv", b"a,b\n1,2\n", ":1: is no known trace: the first line must name the columns TIMESTAMP,"),
        ("t.csv", b"", ":1: is no known trace"),
        ("t.csv", b"\xff\xfe", ": is no text"),
        ("t.csv", b"TIMESTAMP,ContextTokens,GeneratedTokens\n", ": has 0 requests, 2 are needed"),
        ("t.jsonl", b'{"timestamp": 0, "input_length": 1, "output_length": 1}\n', ": has 1 requests, 2 are needed"),
    ],
)
def test_a_file_that_is_no_trace_is_named(tmp_path: Path, name: str, content: bytes, problem: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(TraceError) as caught:
        read_request_trace(path)
    assert str(caught.value).startswith(f"{path}{problem}")


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="No such file"):
        read_function_trace(tmp_path / "none.csv")

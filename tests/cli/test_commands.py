from __future__ import annotations

import pytest
from typer.testing import CliRunner, Result

from segue.cli.main import build_app
from tests.server.rig import Rig, byte_level_tokenizer, write_adapter

pytestmark = pytest.mark.usefixtures("target")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(build_app(), arguments, env={"COLUMNS": "200"})


def test_generate_prints_the_answer_and_where_the_time_went() -> None:
    result = run("generate", "hello", "--adapter", "alpha", "--max-tokens", "6")
    tokens = byte_level_tokenizer().encode("hello").ids
    text = byte_level_tokenizer().decode([tokens[-1 - place % len(tokens)] for place in range(6)])
    assert result.exit_code == 0
    assert result.stdout == f"{text}\n"
    assert result.stderr.startswith(
        f"6 tokens, first after 400.0 ms, then 10.0 ms each, 1 of {len(tokens)} prompt tokens from the prefix cache, "
        "adapter version "
    )
    assert result.stderr.endswith(" from disk, 1 of 2 layers on the CPU\n")


def test_generate_sends_a_chat_message(rig: Rig) -> None:
    assert run("generate", "hi", "--chat", "--no-timing", "--max-tokens", "1").stderr == ""
    prompt = rig.messages("Submit")[-1]["prompt_token_ids"]
    assert byte_level_tokenizer().decode(prompt) == "[user]hi[answer]"


def test_generate_passes_the_sampling_options_on(rig: Rig) -> None:
    options = {"--temperature": 0.5, "--top-p": 0.75, "--top-k": 3, "--min-p": 0.25, "--seed": 7}
    penalties = {"--presence-penalty": -1.0, "--frequency-penalty": 2.0, "--repetition-penalty": 1.5}
    arguments = [str(item) for pair in (options | penalties).items() for item in pair]
    assert run("generate", "hello", "--max-tokens", "1", *arguments).exit_code == 0
    sampling = rig.messages("Submit")[-1]["sampling"]
    told = {f"--{name.replace('_', '-')}": value for name, value in sampling.items()}
    assert {name: told[name] for name in options | penalties} == options | penalties


def test_generate_ends_before_a_stop_string() -> None:
    assert run("generate", "zyx", "--max-tokens", "9", "--stop", "q", "--stop", "z", "--no-timing").stdout == "xy\n"


def test_generate_prints_several_answers_under_headings() -> None:
    result = run("generate", "zyx", "--max-tokens", "3", "--n", "3")
    assert result.stdout == "== answer 0 ==\nxyz\n== answer 1 ==\nyzx\n== answer 2 ==\nzxy\n"
    assert result.stderr.count("3 tokens, first after 400.0 ms") == 3


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("generate", "x", "--adapter", "nobody"), "segue: no adapter 'nobody'\n"),
        (("generate", ""), "segue: text: must not be empty\n"),
        (("generate", "x", "--top-p", "2"), "segue: sampling.top_p: must be in (0, 1], is 2\n"),
        (("generate", "x", "--stop", ""), "segue: sampling.stop: must not be empty strings\n"),
        (("adapters", "load", "x", "--path", "../x"), "segue: path: must not contain '.' or '..'\n"),
        (("adapters", "evict", "nobody"), "segue: no adapter 'nobody'\n"),
    ],
)
def test_errors_are_one_line(arguments: tuple[str, ...], line: str) -> None:
    result = run(*arguments)
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", line)


@pytest.mark.parametrize("arguments", [("info",), ("adapters", "list"), ("generate", "x")])
def test_a_server_that_is_not_there_is_one_line(arguments: tuple[str, ...]) -> None:
    result = run(*arguments, "--server", "127.0.0.1:1")
    assert result.exit_code == 1
    assert result.stderr.startswith("segue: ")
    assert result.stderr.count("\n") == 1


def test_info_tells_what_the_server_is() -> None:
    lines = run("info").stdout.splitlines()
    told = {line[: line.index("  ")].strip(): line.split("  ")[-1].strip() for line in map(str.strip, lines)}
    assert told["model"] == "tiny"
    assert told["context tokens"] == "128"
    assert told["copy bytes per second"] == "1000000000.0"


def test_adapters_from_load_to_unload(rig: Rig) -> None:
    write_adapter(rig.adapters_dir / "group" / "gamma", rank=8)
    assert run("adapters", "load", "gamma", "--path", "group/gamma").stdout.startswith("loaded gamma version ")
    listed = {line.split()[1]: line.split()[3:] for line in table_rows(run("adapters", "list").stdout)}
    assert {"alpha", "beta", "gamma"} <= listed.keys()
    assert "8" in listed["gamma"]
    assert "missing" not in listed
    assert run("adapters", "evict", "gamma").stdout == "evicted gamma\n"
    assert run("adapters", "unload", "gamma").stdout == "unloaded gamma\n"
    assert "gamma" not in run("adapters", "list").stdout
    assert run("generate", "x", "--adapter", "gamma").stderr == "segue: adapter 'gamma' was unloaded\n"


def table_rows(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("│")]

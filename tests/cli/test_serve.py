from __future__ import annotations

import json
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch

from segue import Client
from segue.cli.main import main
from segue.cli.serve import server_table
from segue.config import from_table
from segue.server.config import ServerConfig
from tests.server.rig import fake_engine_command, wait_until, write_model

CONFIG = """
adapters_dir = "adapters"
pinned_adapters = ["a", "b"]
listen = "127.0.0.1:7000"
drain_seconds = 5.0
[engine]
model_dir = "model"
pages = 99
cpu_workers = 3
[engine.handoff]
mode = "stream"
[supervision]
stop_seconds = 1.0
"""

SERVE_WITH_A_FAKE_ENGINE = """
import sys
from segue.cli.main import build_app
from segue.server import app
command = tuple(sys.argv[1].split())
real = app.Server
app.Server = lambda config, **more: real(config, engine_command=command, **more)
build_app()(sys.argv[2:])
"""


def serve(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "segue", "serve", *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True)


def test_options_override_the_file() -> None:
    table = tomllib.loads(CONFIG)
    flags = {"adapters_dir": None, "listen": "0.0.0.0:1"}
    merged = server_table(table, flags, {"model_dir": "other", "cpu_workers": 0, "device": None, "dtype": "bfloat16"})
    config = from_table(ServerConfig, merged, where="x")
    assert (config.adapters_dir, config.listen, config.drain_seconds) == ("adapters", "0.0.0.0:1", 5.0)
    assert config.pinned_adapters == ("a", "b")
    assert (config.engine.model_dir, config.engine.pages, config.engine.cpu_workers) == ("other", 99, 0)
    assert (config.engine.dtype, config.engine.handoff.mode) == ("bfloat16", "stream")
    assert config.supervision.stop_seconds == 1.0


@pytest.mark.parametrize(
    ("toml", "line"),
    [
        ("[engine]\nmodel_dir = 'x'\npages = 0\n", "segue: pages: must be greater than 0, is 0\n"),
        ("[engine]\nmodel_dir = 'x'\npage = 1\n", "segue: {file}.engine.page: unknown; known are "),
        ("[engine\n", "segue: {file}: "),
        ("listen = 'x'\n[engine]\nmodel_dir = 'x'\n", "segue: listen: must be HOST:PORT, is 'x'\n"),
        ("pinned_adapters = 'a'\n[engine]\nmodel_dir = 'x'\n", "segue: pinned_adapters: must be a list of adapters"),
        (
            "[engine]\nmodel_dir = 'x'\nload_format = 'gguf'\n",
            "segue: load_format: must be one of auto, dummy, is 'gguf'",
        ),
        ("engine = 5\n", "segue: engine: must be a table\n"),
        ("", "segue: which model? "),
    ],
)
def test_a_wrong_configuration_is_one_line(tmp_path: Path, toml: str, line: str) -> None:
    file = tmp_path / "segue.toml"
    file.write_text(toml)
    result = serve("--config", str(file), "--adapters", str(tmp_path))
    assert result.returncode == 1
    assert result.stderr.startswith(line.replace("{file}", str(file)))
    assert result.stderr.count("\n") == 1


def test_folders_that_are_not_there_are_one_line(model_dir: Path, tmp_path: Path) -> None:
    no_model = serve("--model", str(tmp_path / "none"), "--adapters", str(tmp_path))
    assert (no_model.returncode, no_model.stderr.count("\n")) == (1, 1)
    assert str(tmp_path / "none") in no_model.stderr
    no_adapters = serve("--model", str(model_dir), "--adapters", str(tmp_path / "none"))
    assert no_adapters.stderr == f"segue: adapters: {tmp_path / 'none'} is not a folder\n"
    assert no_adapters.returncode == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none_is_one_line(model_dir: Path, tmp_path: Path) -> None:
    result = serve("--model", str(model_dir), "--adapters", str(tmp_path), "--listen", "127.0.0.1:0", "--device=cuda")
    assert (result.returncode, result.stdout) == (1, "")
    last = result.stderr.splitlines()[-1]
    assert last.startswith("segue: the engine cannot be started: device: is 'cuda', but ")
    assert "Traceback" not in result.stderr


def test_a_pinned_adapter_that_is_not_there_is_one_line(model_dir: Path, tmp_path: Path) -> None:
    config = tmp_path / "segue.toml"
    config.write_text('pinned_adapters = ["nobody"]\n')
    arguments = ["serve", "--model", str(model_dir), "--adapters", str(tmp_path), "--listen", "127.0.0.1:0"]
    engine = " ".join(fake_engine_command(tmp_path / "engine.log"))
    command = [sys.executable, "-c", SERVE_WITH_A_FAKE_ENGINE, engine, *arguments, "--config", str(config)]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.splitlines()[-1] == "segue: pinned_adapters: nobody: no adapter 'nobody'"
    assert "Traceback" not in result.stderr


@contextmanager
def serving(model_dir: Path, adapters_dir: Path, log: Path, *more: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """``segue serve`` with a FakeEngine, and its port."""
    arguments = ["serve", *more, "--model", str(model_dir), "--adapters", str(adapters_dir), "--listen", "127.0.0.1:0"]
    with subprocess.Popen(
        [sys.executable, "-c", SERVE_WITH_A_FAKE_ENGINE, " ".join(fake_engine_command(log)), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        line = process.stdout.readline()
        assert line.startswith("serving on 127.0.0.1:"), process.stderr.read()
        yield process, line.rpartition(":")[2].strip()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serve_until_a_signal(model_dir: Path, tmp_path: Path, number: signal.Signals) -> None:
    log = tmp_path / "engine.log"
    address_file = tmp_path / "address"
    with serving(model_dir, tmp_path, log, "--address-file", str(address_file)) as (process, port):
        assert address_file.read_text() == f"127.0.0.1:{port}\n"
        command = [sys.executable, "-m", "segue", "info", "--server", f"127.0.0.1:{port}"]
        told = subprocess.run(command, check=True, capture_output=True, text=True)
        assert "model" in told.stdout
        process.send_signal(number)
        assert process.wait(20) == 0
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()
    assert '"message": "Shutdown"' in log.read_text()


def test_dummy_weights_need_config_json_alone(tmp_path: Path) -> None:
    model_dir, log = write_model(tmp_path / "model"), tmp_path / "engine.log"
    for path in model_dir.glob("token*"):
        path.unlink()
    without = serve("--model", str(model_dir), "--adapters", str(tmp_path), "--listen", "127.0.0.1:0")
    assert without.stderr == f"segue: {model_dir}: has no tokenizer.json\n"
    with serving(model_dir, tmp_path, log, "--load-format", "dummy") as (process, port):
        (start,) = map(json.loads, log.read_text().splitlines())
        assert start["config"]["load_format"] == "dummy"
        with Client(f"127.0.0.1:{port}") as client:
            assert client.generate([10, 20], max_tokens=2).token_ids == (20, 10)
        process.terminate()
        _, errors = process.communicate(timeout=20)
    assert f"{model_dir} has no tokenizer: prompts must be token ids" in errors
    told = [line.partition(": ")[2] for line in errors.splitlines() if " load weights: " in line]
    assert told == ["load weights: 0 B of 2.00 kB", "load weights: 2.00 kB"]


def test_the_load_format_of_the_file_holds_unless_an_option_names_another() -> None:
    table = {"adapters_dir": "a", "engine": {"model_dir": "m", "load_format": "dummy"}}
    assert server_table(table, {}, {"load_format": None})["engine"]["load_format"] == "dummy"
    table["engine"] = {"model_dir": "m", "load_format": "auto"}
    assert server_table(table, {}, {"load_format": "dummy"})["engine"]["load_format"] == "dummy"


def test_without_typer_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "typer", None)
    for name in [name for name in sys.modules if name.startswith("segue.cli.") and name != "segue.cli.main"]:
        monkeypatch.delitem(sys.modules, name)
    assert main() == 1
    assert capsys.readouterr().err == "segue: the command line needs more packages: pip install 'segue[server]'\n"


def test_a_server_that_is_killed_takes_its_engine_along(model_dir: Path, tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    with serving(model_dir, tmp_path, log) as (process, _):
        engine_pid = json.loads(log.read_text().splitlines()[0])["pid"]
        assert psutil.pid_exists(engine_pid)
        process.kill()
        process.wait()
        wait_until(lambda: not psutil.pid_exists(engine_pid), "the engine ends with its server")

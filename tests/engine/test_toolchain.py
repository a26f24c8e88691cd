"""What an engine on CUDA finds on its machine, and the one line it says about what it does not find."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from segue.config import ConfigError
from segue.engine.cuda import toolchain
from segue.engine.cuda.toolchain import (
    device_problem,
    find_cuda_home,
    flashinfer_environment,
    link_libraries,
    require_build_tools,
    search_path,
    toolkit_homes,
    toolkit_version,
)

FILES = (
    "bin/nvcc",
    "nvvm/bin/cicc",
    "include/cuda_runtime.h",
    "include/crt/host_config.h",
    "include/cublasLt.h",
    "include/curand_kernel.h",
    "lib/libcudart.so.13",
)


def fake_toolkit(home: Path, version: int = 13000, without: str = "") -> Path:
    """The files of a toolkit that are looked at, all empty but the one that names its version."""
    for file in FILES:
        if file != without:
            (home / file).parent.mkdir(parents=True, exist_ok=True)
            (home / file).touch()
    (home / "include" / "cuda_runtime_api.h").write_text(f"#define CUDART_VERSION  {version}\n")
    return home


def fake_tools(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o755)
    return folder


@pytest.mark.parametrize(
    ("built_for", "driver", "devices", "problem"),
    [
        (None, None, 0, "torch 2.11.0 is built without CUDA: pip install "),
        ("13.0", None, 0, "this machine has no NVIDIA driver: libcuda.so.1 cannot be loaded"),
        ("13.0", Path("libcuda.so.1"), 0, "torch 2.11.0 for CUDA 13.0 finds no device: the driver is too old"),
        ("13.0", Path("libcuda.so.1"), 1, ""),
    ],
)
def test_why_torch_has_no_device(built_for: str | None, driver: Path | None, devices: int, problem: str) -> None:
    said = device_problem("2.11.0", built_for, driver, lambda: (devices, "the driver is too old"))
    assert said.startswith(problem)
    assert bool(said) == bool(problem)


def test_the_first_whole_toolkit_of_torchs_version_is_taken(tmp_path: Path) -> None:
    other = fake_toolkit(tmp_path / "other", version=12090)
    torn = fake_toolkit(tmp_path / "torn", without="nvvm/bin/cicc")
    wheels = fake_toolkit(tmp_path / "site" / "nvidia" / "cu13")
    homes = [other, torn, *toolkit_homes({"PATH": ""}, 13, [str(tmp_path / "site")])[-1:]]
    assert find_cuda_home({}, 13, homes) == wheels
    assert find_cuda_home({"CUDA_HOME": str(other)}, 13, homes) == other
    assert toolkit_version(wheels) == "13.0"
    with pytest.raises(ConfigError, match=r"^device: 'cuda' compiles kernels with nvcc of CUDA 13, .* pip install "):
        find_cuda_home({}, 13, [other, torn])
    with pytest.raises(ConfigError, match=r"^CUDA_PATH: .*torn has no nvvm/bin/cicc; "):
        find_cuda_home({"CUDA_HOME": "", "CUDA_PATH": str(torn)}, 13, homes)


def test_nvcc_on_path_is_followed_to_its_toolkit(tmp_path: Path) -> None:
    home = tmp_path / "cuda-13"
    fake_tools(home / "bin", "nvcc")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "nvcc").symlink_to(home / "bin" / "nvcc")
    assert toolkit_homes({"PATH": str(tmp_path / "links")}, 13, [])[0] == home


def test_a_toolkit_that_names_no_version_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="names no CUDART_VERSION"):
        toolkit_version(tmp_path)


@pytest.mark.parametrize(
    ("missing", "line"),
    [
        ("ninja", r"^device: 'cuda' compiles kernels with ninja, which is not on PATH: pip install 'segue\[cuda\]'$"),
        ("gcc", "with gcc, which is not on PATH: apt install gcc$"),
        ("c++", r"with c\+\+, which is not on PATH: apt install g\+\+$"),
        ("Python.h", "with Python.h, which is not in .*: apt install python3-dev$"),
    ],
)
def test_a_missing_tool_is_named_with_what_brings_it(tmp_path: Path, missing: str, line: str) -> None:
    needed = {"ninja", "gcc", "c++", "Python.h"}
    tools = fake_tools(tmp_path / "tools", *needed)
    environ = {"PATH": str(tools)}
    require_build_tools(environ, tools)
    (tools / missing).unlink()
    with pytest.raises(ConfigError, match=line):
        require_build_tools(environ, tools)


def test_another_compiler_may_be_named(tmp_path: Path) -> None:
    tools = fake_tools(tmp_path, "ninja", "clang", "clang++", "Python.h")
    require_build_tools({"PATH": str(tools), "CC": "clang", "CXX": "clang++"}, tools)


def test_the_scripts_folder_is_searched_last(tmp_path: Path) -> None:
    assert search_path({"PATH": "/a:/b"}, tmp_path) == f"/a:/b:{tmp_path}"
    assert search_path({"PATH": f"{tmp_path}:/b"}, tmp_path) == f"{tmp_path}:/b"


def test_the_linker_finds_the_libraries_of_the_wheels(tmp_path: Path) -> None:
    home = fake_toolkit(tmp_path / "cu13")
    driver = tmp_path / "libcuda.so.580"
    driver.touch()
    for _ in range(2):
        links = link_libraries(home, driver, tmp_path / "links")
    assert {link.name: link.resolve() for link in links.iterdir()} == {
        "libcudart.so": home / "lib" / "libcudart.so.13",
        "libcuda.so": driver,
    }
    (home / "lib" / "libcudart.so.13").unlink()
    with pytest.raises(ConfigError, match=r"has no libcudart\.so: pip install "):
        link_libraries(home, driver, tmp_path / "links")


def test_flashinfers_variables_are_the_same_from_start_to_start(tmp_path: Path) -> None:
    environ = {"PATH": "/bin", "FLASHINFER_EXTRA_LDFLAGS": "-lother"}
    for _ in range(2):
        environ.update(flashinfer_environment(environ, path="/bin:/scripts", home=tmp_path, links=tmp_path / "links"))
    assert environ == {
        "PATH": "/bin:/scripts",
        "CUDA_HOME": str(tmp_path),
        "FLASHINFER_EXTRA_LDFLAGS": f"-lother -L{tmp_path / 'links'}",
        "FLASHINFER_USE_CUDA_NORM": "1",
    }


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "driver_library", lambda: Path("libcuda.so.1"))
    monkeypatch.setattr(toolchain, "_usable_devices", lambda: (1, ""))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(toolchain, "_MODULES", ("json", "fake_flashinfer"))
    environ = {"PATH": "/bin"}
    with pytest.raises(
        ConfigError, match=r"^device: 'cuda' needs the packages fake_flashinfer: pip install 'segue\[cuda\]'$"
    ):
        toolchain.prepare_cuda(environ)
    assert environ == {"PATH": "/bin"}


@pytest.mark.gpu
def test_this_machine_has_what_it_takes() -> None:
    """In a process of its own, since FlashInfer reads its environment once."""
    script = (
        "import os\n"
        "from segue.engine.cuda.toolchain import prepare_cuda\n"
        "prepare_cuda(os.environ)\n"
        "from flashinfer.jit.cpp_ext import get_cuda_version\n"
        "print(get_cuda_version().major)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout.split()[-1] == str(torch.version.cuda).partition(".")[0]

"""What an engine on CUDA needs from its machine: a driver, packages, and compilers for the kernels of its packages.

All of it is looked for before the model is loaded, and before FlashInfer, which reads its environment on import.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shlex
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from pathlib import Path

import torch

from segue.config import ConfigError

INSTALL_COMMAND = "pip install 'segue[cuda]'"
_MODULES = ("flashinfer", "tvm_ffi", "triton")
_TOOLKIT_FILES = (
    "bin/nvcc",
    "nvvm/bin/cicc",
    "include/cuda_runtime.h",
    "include/crt/host_config.h",
    "include/cublasLt.h",
    "include/curand_kernel.h",
)
_DEFAULT_HOME = Path("/usr/local/cuda")


def prepare_cuda(environ: MutableMapping[str, str]) -> None:
    """Verify that an engine can run on CUDA, and name the compilers to FlashInfer in ``environ``, os.environ as a rule.

    Also says there how many queues of the device its streams are spread over.

    Raises ConfigError, one line that says what is missing and what brings it.
    """
    driver = driver_library()
    problem = device_problem(torch.__version__, torch.version.cuda, driver, _usable_devices)
    if problem:
        raise ConfigError(f"device: is 'cuda', but {problem}")
    missing = [module for module in _MODULES if importlib.util.find_spec(module) is None]
    if missing:
        raise ConfigError(f"device: 'cuda' needs the packages {', '.join(missing)}: {INSTALL_COMMAND}")
    assert driver is not None
    cuda_major = int(str(torch.version.cuda).partition(".")[0])
    path = search_path(environ, Path(sys.executable).parent)
    require_build_tools({**environ, "PATH": path}, Path(sysconfig.get_path("include")))
    home = find_cuda_home(environ, cuda_major, toolkit_homes(environ, cuda_major, sys.path))
    cache = Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    links = link_libraries(home, driver, cache / "segue" / f"cuda-{toolkit_version(home)}-libraries")
    environ.update(flashinfer_environment(environ, path=path, home=home, links=links))
    # Read with the device's context: streams that wait for a worker must not hold up others in a queue that they share.
    environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")


def device_problem(
    torch_version: str, built_for: str | None, driver: Path | None, count_devices: Callable[[], tuple[int, str]]
) -> str:
    """Why this torch cannot use a device, or "". ``count_devices`` returns how many it finds, and a warning of torch's.

    ``built_for`` is the CUDA version that torch is built for.
    """
    if built_for is None:
        return f"torch {torch_version} is built without CUDA: pip install --force-reinstall torch (from PyPI)"
    if driver is None:
        return "this machine has no NVIDIA driver: libcuda.so.1 cannot be loaded"
    devices, warning = count_devices()
    if devices == 0:
        return f"torch {torch_version} for CUDA {built_for} finds no device{f': {warning}' if warning else ''}"
    return ""


def driver_library() -> Path | None:
    """Where the driver's library lies; None when the machine has no driver."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    lines = Path("/proc/self/maps").read_text().splitlines()
    return next((Path(line.split(maxsplit=5)[5]) for line in lines if "/libcuda.so" in line), None)


def toolkit_homes(environ: Mapping[str, str], cuda_major: int, import_path: Iterable[str]) -> list[Path]:
    """Where a toolkit may be, in the order of preference: nvcc's on PATH, the usual folder, and what pip installs."""
    on_path = shutil.which("nvcc", path=environ.get("PATH"))
    homes = [] if on_path is None else [Path(on_path).resolve().parent.parent]
    homes.append(_DEFAULT_HOME)
    homes += [Path(entry) / "nvidia" / f"cu{cuda_major}" for entry in import_path]
    return homes


def find_cuda_home(environ: Mapping[str, str], cuda_major: int, homes: Iterable[Path]) -> Path:
    """CUDA_HOME or CUDA_PATH where set, else the first of ``homes`` with a whole toolkit of torch's major version.

    Raises ConfigError when the one that is set is not whole, or none is.
    """
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if environ.get(name):
            home = Path(environ[name])
            absent = [file for file in _TOOLKIT_FILES if not (home / file).exists()]
            if absent:
                raise ConfigError(f"{name}: {home} has no {absent[0]}; unset it, or install the CUDA toolkit there")
            return home
    for home in homes:
        whole = all((home / file).exists() for file in _TOOLKIT_FILES)
        if whole and toolkit_version(home).partition(".")[0] == str(cuda_major):
            return home
    raise ConfigError(
        f"device: 'cuda' compiles kernels with nvcc of CUDA {cuda_major}, and neither CUDA_HOME, PATH, "
        f"{_DEFAULT_HOME} nor site-packages has it: {INSTALL_COMMAND}"
    )


def toolkit_version(home: Path) -> str:
    """Such as "13.0", from the runtime's header. Raises ConfigError when it names none."""
    header = home / "include" / "cuda_runtime_api.h"
    match = re.search(r"#define\s+CUDART_VERSION\s+(\d+)", header.read_text() if header.exists() else "")
    if match is None:
        raise ConfigError(f"device: {header} names no CUDART_VERSION: {INSTALL_COMMAND}")
    number = int(match[1])
    return f"{number // 1000}.{number % 1000 // 10}"


def search_path(environ: Mapping[str, str], scripts: Path) -> str:
    """PATH with ``scripts`` at its end: there is ninja when the virtual environment has not been activated."""
    entries = environ.get("PATH", os.defpath).split(os.pathsep)
    return os.pathsep.join([*entries, *([] if str(scripts) in entries else [str(scripts)])])


def require_build_tools(environ: Mapping[str, str], python_headers: Path) -> None:
    """ninja, host compilers and Python's headers. Raises ConfigError for the first that is missing."""
    needed = {
        "ninja": INSTALL_COMMAND,
        environ.get("CC") or "gcc": "apt install gcc",
        environ.get("CXX") or "c++": "apt install g++",
    }
    for tool, command in needed.items():
        if shutil.which(tool, path=environ["PATH"]) is None:
            raise ConfigError(f"device: 'cuda' compiles kernels with {tool}, which is not on PATH: {command}")
    if not (python_headers / "Python.h").exists():
        raise ConfigError(
            f"device: 'cuda' compiles kernels with Python.h, which is not in {python_headers}: apt install python3-dev"
        )


def link_libraries(home: Path, driver: Path, links: Path) -> Path:
    """A folder with libcudart.so and libcuda.so for the linker: NVIDIA's packages for pip have versioned names only.

    It keeps its path from start to start, since ninja compiles again when a command has changed. Raises ConfigError
    when the toolkit has no runtime library.
    """
    runtimes = [file for folder in ("lib64", "lib") for file in sorted((home / folder).glob("libcudart.so*"))]
    if not runtimes:
        raise ConfigError(f"device: {home} has no libcudart.so: {INSTALL_COMMAND}")
    links.mkdir(parents=True, exist_ok=True)
    for name, target in (("libcudart.so", runtimes[0]), ("libcuda.so", driver)):
        draft = links / f".{name}.{os.getpid()}"
        draft.unlink(missing_ok=True)
        draft.symlink_to(target.resolve())
        draft.replace(links / name)
    return links


def flashinfer_environment(environ: Mapping[str, str], *, path: str, home: Path, links: Path) -> dict[str, str]:
    """The variables that FlashInfer's compilation reads, where they differ from ``environ``."""
    flag = f"-L{links}"
    flags = shlex.split(environ.get("FLASHINFER_EXTRA_LDFLAGS", ""))
    return {
        "PATH": path,
        "CUDA_HOME": str(home),
        "FLASHINFER_EXTRA_LDFLAGS": shlex.join(flags if flag in flags else [*flags, flag]),
        # Norms from the module that is compiled once and cached, not by CuTe DSL in each process.
        "FLASHINFER_USE_CUDA_NORM": "1",
    }


def _usable_devices() -> tuple[int, str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return count, str(caught[0].message).splitlines()[0] if caught else ""

"""What a benchmark ran on and with: the machine, the packages and the commit."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Self

import psutil
import torch

import segue
from segue.config import require

_COMMIT_VARIABLE = "SEGUE_COMMIT"
_COMMIT = re.compile(r"[0-9a-f]{7,40}(-dirty)?")
_PACKAGES = ("torch", "triton", "flashinfer-python", "numpy", "numba", "segue")


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """``cores`` are those that this process may run on; ``gpu`` is the first CUDA device's name, None without one.
    Of a machine with a GPU, the rest is None where it was not recorded."""

    cpu: str | None = None
    cores: int | None = None
    memory_bytes: int | None = None
    gpu: str | None
    kernel: str | None = None

    @classmethod
    def here(cls) -> Self:
        return cls(
            cpu=_cpu_model(),
            cores=len(os.sched_getaffinity(0)),
            memory_bytes=psutil.virtual_memory().total,
            gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            kernel=platform.release(),
        )


def versions() -> Mapping[str, str]:
    """The installed version of each package that the timings depend on; one that is absent has no entry."""
    found = {"python": platform.python_version()}
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The commit of this code: the one that SEGUE_COMMIT names, or else the checkout's. Raises ConfigError."""
    return named_commit() or checkout_commit(Path(segue.__file__).resolve().parent.parent)


def named_commit() -> str | None:
    """What SEGUE_COMMIT says, for copies of the code without its history; None if it is not set. Raises ConfigError."""
    name = os.environ.get(_COMMIT_VARIABLE)
    if name is not None:
        problem = f"must be 7 to 40 digits of 0-9 and a-f, and may end in -dirty, is {name!r}"
        require(_COMMIT.fullmatch(name) is not None, _COMMIT_VARIABLE, problem)
    return name


def checkout_commit(root: Path) -> str | None:
    """The commit of the checkout at ``root``, "-dirty" added if files differ from it.

    None where ``root`` is not the top of a git checkout.
    """
    root = root.resolve()
    top = _git(root, "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != root:
        return None
    head = _git(root, "rev-parse", "HEAD")
    if head is None:
        return None
    changes = _git(root, "status", "--porcelain", "--untracked-files=no")
    return f"{head}-dirty" if changes else head


def _git(root: Path, *arguments: str) -> str | None:
    """What git says, or None where it is absent or has nothing to say about ``root``."""
    try:
        result = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    # ARM kernels name no model.
    return platform.machine()

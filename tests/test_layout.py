"""The linked folders: importable under one name only, and all of them in the wheel."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINKED = ("engine", "scheduler", "cpu_lora", "gpu_kernels")


@pytest.mark.parametrize("folder", LINKED)
def test_the_bare_name_is_refused(folder: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {folder}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert f"import it as segue.{folder}" in result.stderr


@pytest.fixture(scope="module")
def wheel_files(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The file list of a wheel built by way of an sdist, as a release would be."""
    out = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)],
        capture_output=True,
        check=True,
    )
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_wheel_has_every_module(wheel_files: set[str]) -> None:
    packages = [ROOT / "segue", *(ROOT / "segue" / folder for folder in LINKED)]
    modules = {
        path.relative_to(ROOT).as_posix()
        for package in packages
        for path in package.rglob("*.py")
        if "__pycache__" not in path.parts
    }
    assert modules
    assert modules <= wheel_files


def test_the_wheel_has_the_demo_and_the_type_marker(wheel_files: set[str]) -> None:
    assets = ROOT / "segue" / "demo" / "assets"
    expected = {path.relative_to(ROOT).as_posix() for path in assets.rglob("*") if path.is_file()}
    assert expected
    assert expected | {"segue/py.typed"} <= wheel_files


def test_the_wheel_has_nothing_else(wheel_files: set[str]) -> None:
    strangers = [name for name in wheel_files if not name.startswith(("segue/", "segue-"))]
    assert strangers == []
    assert not [name for name in wheel_files if name.startswith("segue/tests")]

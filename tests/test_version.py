"""A tree that is not installed says so instead of failing."""

from __future__ import annotations

from importlib import metadata

import pytest

from segue.version import NOT_INSTALLED, segue_version


def test_the_installed_version() -> None:
    assert segue_version() == metadata.version("segue")


def test_without_an_installed_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", nothing)
    assert segue_version() == NOT_INSTALLED

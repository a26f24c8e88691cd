"""Which Segue this is."""

from __future__ import annotations

from importlib import metadata

NOT_INSTALLED = "0+source"


def segue_version() -> str:
    """The installed package's version; ``NOT_INSTALLED`` for a tree that is only on the path."""
    try:
        return metadata.version("segue")
    except metadata.PackageNotFoundError:
        return NOT_INSTALLED

"""What all tests share: those that need a GPU are skipped where there is none."""

from __future__ import annotations

import os

import pytest
import torch

# Without a GPU, Triton's kernels run in its interpreter. Triton reads this when it is first imported, and transformers
# imports it, too: so it is set before any test module is.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)

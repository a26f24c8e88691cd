"""The devices and dtypes that the engine's tests run on."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """What EngineConfig calls the device."""
    name: str = request.param
    return name


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """What a model's weights are in, and EngineConfig's dtype names."""
    chosen: torch.dtype = request.param
    return chosen

"""The devices that the engine's tests run on."""

from __future__ import annotations

import pytest


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """What EngineConfig calls the device."""
    name: str = request.param
    return name

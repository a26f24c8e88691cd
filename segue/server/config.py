"""Configuration of one server: what it serves, where it listens, and how it keeps its engine."""

from __future__ import annotations

from dataclasses import dataclass

from segue.config import require, require_positive
from segue.engine.config import EngineConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisionConfig:
    """How the engine process is started, stopped and started again after it died.

    The pause before a restart doubles from ``restart_min_seconds`` to ``restart_max_seconds`` and begins anew once an
    engine has lived for ``stable_seconds``. An engine that has not ended ``stop_seconds`` after it was told to is
    killed.
    """

    start_seconds: float = 600.0
    stop_seconds: float = 10.0
    restart_min_seconds: float = 0.5
    restart_max_seconds: float = 30.0
    stable_seconds: float = 60.0

    def __post_init__(self) -> None:
        require_positive(
            self, "start_seconds", "stop_seconds", "restart_min_seconds", "restart_max_seconds", "stable_seconds"
        )
        require(
            self.restart_max_seconds >= self.restart_min_seconds,
            "restart_max_seconds",
            f"must be at least restart_min_seconds, is {self.restart_max_seconds}",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """One server.

    ``listen`` is ``host:port``; port 0 takes any free one. ``adapters_dir`` is the folder whose subfolders are the
    adapters. ``pinned_adapters`` names those that are brought to the device before the server serves, and
    stay there.
    ``model_name`` is what clients call the base model; empty takes the model folder's name.
    ``default_max_tokens`` bounds answers to requests that set no ``max_tokens``. ``prepare_threads`` tokenise prompts
    and look adapters up. When the server is told to stop, running requests get ``drain_seconds`` to end.
    """

    engine: EngineConfig
    adapters_dir: str
    pinned_adapters: tuple[str, ...] = ()
    listen: str = "127.0.0.1:50051"
    model_name: str = ""
    default_max_tokens: int = 256
    prepare_threads: int = 4
    drain_seconds: float = 30.0
    supervision: SupervisionConfig = SupervisionConfig()

    def __post_init__(self) -> None:
        require(bool(self.adapters_dir), "adapters_dir", "must not be empty")
        pinned = self.pinned_adapters
        named = isinstance(pinned, tuple) and all(isinstance(name, str) and name for name in pinned)
        require(named, "pinned_adapters", f"must be a list of adapters' names, is {pinned!r}")
        require(len(set(pinned)) == len(pinned), "pinned_adapters", "must not name an adapter twice")
        _, separator, port = self.listen.rpartition(":")
        require(bool(separator) and port.isdecimal(), "listen", f"must be HOST:PORT, is {self.listen!r}")
        require(int(port) < 1 << 16, "listen", f"port must be below 65536, is {port}")
        require_positive(self, "default_max_tokens", "prepare_threads")
        require(self.drain_seconds >= 0, "drain_seconds", f"must not be negative, is {self.drain_seconds}")

"""Keeps an engine running: starts it, hands out the one that lives, and starts another when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from enum import Enum

from segue.engine.config import EngineConfig
from segue.engine.progress import ReportProgress
from segue.errors import EngineUnavailableError
from segue.server.config import SupervisionConfig
from segue.server.engine_life import ENGINE_DIED, EngineLife, EngineStartError
from segue.server.engine_process import ENGINE_COMMAND

_LOG = logging.getLogger(__name__)


class EngineStatus(Enum):
    """Whether requests can be served."""

    STARTING = "starting"
    SERVING = "serving"
    STOPPING = "stopping"


class EngineClient:
    """The engine that serves now. Used on one event loop only.

    ``on_status`` is called on that loop at every change of ``status``, ``on_version_failed`` with the id of an adapter
    version that the engine cannot serve and why, and ``on_progress`` while one starts.
    """

    def __init__(
        self,
        config: EngineConfig,
        supervision: SupervisionConfig,
        *,
        on_status: Callable[[EngineStatus], None],
        on_version_failed: Callable[[int, str, bool], None],
        on_progress: ReportProgress,
        command: Sequence[str] = ENGINE_COMMAND,
    ) -> None:
        self._config = config
        self._supervision = supervision
        self._on_status = on_status
        self._on_version_failed = on_version_failed
        self._on_progress = on_progress
        self._command = tuple(command)
        self._status = EngineStatus.STARTING
        self._life: EngineLife | None = None
        self._supervisor: asyncio.Task[None] | None = None

    @property
    def status(self) -> EngineStatus:
        return self._status

    @property
    def life(self) -> EngineLife:
        """The living engine. Raises EngineUnavailableError while there is none."""
        if self._status is EngineStatus.STOPPING:
            raise EngineUnavailableError("the server is shutting down")
        if self._life is None or self._life.ended.is_set():
            raise EngineUnavailableError(ENGINE_DIED)
        return self._life

    async def start(self) -> None:
        """Start the engine and keep it running until ``close``. Raises EngineStartError."""
        self._life = await self._launch()
        self._set_status(EngineStatus.SERVING)
        self._supervisor = asyncio.create_task(self._supervise(self._life), name="engine supervisor")

    async def close(self) -> None:
        """Stop the engine; nothing of it is left when this returns."""
        self._set_status(EngineStatus.STOPPING)
        if self._supervisor is not None:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor
        if self._life is not None:
            await self._life.end(self._supervision.stop_seconds)

    async def _supervise(self, life: EngineLife) -> None:
        supervision = self._supervision
        pause_seconds = supervision.restart_min_seconds
        while True:
            await life.ended.wait()
            self._set_status(EngineStatus.STARTING)
            if time.monotonic() - life.started_seconds >= supervision.stable_seconds:
                pause_seconds = supervision.restart_min_seconds
            # It is dead or unusable already: whatever is left of it is not given time.
            await life.end(0)
            while True:
                _LOG.warning("starting the engine again in %.1f s", pause_seconds)
                await asyncio.sleep(pause_seconds)
                pause_seconds = min(2 * pause_seconds, supervision.restart_max_seconds)
                try:
                    life = self._life = await self._launch()
                except EngineStartError as error:
                    _LOG.error("%s", error)
                else:
                    break
            self._set_status(EngineStatus.SERVING)

    async def _launch(self) -> EngineLife:
        return await EngineLife.launch(
            self._command,
            self._config,
            start_seconds=self._supervision.start_seconds,
            on_progress=self._on_progress,
            on_version_failed=self._on_version_failed,
        )

    def _set_status(self, status: EngineStatus) -> None:
        if status is not self._status:
            self._status = status
            self._on_status(status)

"""One engine from its start to its end, as the front end's event loop sees it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import logging
import time
from collections.abc import Callable, Sequence

import msgspec

from segue.engine.channel import Channel, ChannelClosedError
from segue.engine.config import EngineConfig
from segue.engine.lora.manifest import AdapterManifest
from segue.engine.messages import (
    Cancel,
    CloseVersion,
    Evict,
    GetState,
    OpenVersion,
    Preload,
    Ready,
    Shutdown,
    Start,
    StartFailed,
    StartProgress,
    State,
    StepOutput,
    Submit,
    ToEngine,
    ToFrontEnd,
    VersionFailed,
)
from segue.engine.progress import ReportProgress
from segue.errors import EngineUnavailableError
from segue.server.engine_process import EngineProcess
from segue.server.engine_request import EngineRequest, EngineRequests
from segue.server.failures import error_of_failure

_LOG = logging.getLogger(__name__)
ENGINE_DIED = "the engine has died and is being restarted"


class EngineStartError(Exception):
    """The engine could not be started. The message is one line for the operator."""


class EngineLife:
    """A running engine: requests, versions and snapshots go to it until ``ended`` is set.

    After that every method that sends raises EngineUnavailableError, and so do all readers that were waiting.
    """

    def __init__(
        self, process: EngineProcess, ready: Ready, on_version_failed: Callable[[int, str, bool], None]
    ) -> None:
        self.ready = ready
        self.ended = asyncio.Event()
        self.started_seconds = time.monotonic()
        self._process = process
        self._on_version_failed = on_version_failed
        self._numbers = itertools.count()
        self._requests: dict[int, EngineRequest] = {}
        self._states: dict[int, asyncio.Future[State]] = {}
        asyncio.get_running_loop().add_reader(process.channel.fileno(), self._on_readable)

    @classmethod
    async def launch(
        cls,
        command: Sequence[str],
        config: EngineConfig,
        *,
        start_seconds: float,
        on_progress: ReportProgress,
        on_version_failed: Callable[[int, str, bool], None],
    ) -> EngineLife:
        """Start an engine and wait until it serves. Raises EngineStartError, with nothing left running.

        ``on_progress`` is told how far the start has come.
        ``on_version_failed`` is called with the id of a version that the engine cannot serve, and why.
        """
        try:
            process = await EngineProcess.spawn(command)
        except OSError as error:
            raise EngineStartError(f"the engine cannot be started: {error.strerror}") from error
        try:
            process.channel.send(Start(config))
            answer = await asyncio.wait_for(_started(process, on_progress), start_seconds)
            if isinstance(answer, Ready):
                _LOG.info("engine process %d serves", process.pid)
                return cls(process, answer, on_version_failed)
            problem = answer.message if isinstance(answer, StartFailed) else "it does not speak this protocol"
        except TimeoutError:
            problem = f"it did not start within {start_seconds:g} s"
        except (ChannelClosedError, msgspec.DecodeError):
            problem = "it ended while it started; its log says why"
        except BaseException:
            await process.end(0)
            raise
        await process.end(1)
        raise EngineStartError(f"the engine cannot be started: {problem}")

    @property
    def pid(self) -> int:
        return self._process.pid

    def next_number(self) -> int:
        """A number for a new request."""
        return next(self._numbers)

    def submit(self, submits: Sequence[Submit]) -> EngineRequests:
        """Send the answers of one request together; each ``number`` must come from ``next_number``."""
        self._call_channel(lambda channel: channel.send_together(submits))
        arrived = asyncio.Event()
        for submit in submits:
            tell_cancel = functools.partial(self._cancel, submit.number)
            forget = functools.partial(self._forget, submit.number)
            self._requests[submit.number] = EngineRequest(arrived, tell_cancel, forget)
        return EngineRequests([self._requests[submit.number] for submit in submits], arrived)

    def open_version(self, manifest: AdapterManifest, descriptor: int, *, pinned: bool) -> None:
        """Make a version known, before anything names it. The engine gets a copy of ``descriptor``."""
        self._send(OpenVersion(manifest, pinned), descriptor)

    def close_version(self, version_id: int) -> None:
        """No request will name this version any more."""
        self._send(CloseVersion(version_id))

    def evict(self, version_id: int) -> None:
        self._send(Evict(version_id))

    def preload(self, version_id: int) -> None:
        self._send(Preload(version_id))

    async def state(self) -> State:
        """A fresh snapshot. Raises EngineUnavailableError if the engine dies meanwhile."""
        number = self.next_number()
        future: asyncio.Future[State] = asyncio.get_running_loop().create_future()
        self._send(GetState(number))
        self._states[number] = future
        try:
            return await future
        finally:
            self._states.pop(number, None)

    async def end(self, stop_seconds: float) -> None:
        """Stop the engine and wait until nothing of it is left."""
        with contextlib.suppress(EngineUnavailableError):
            self._send(Shutdown())
        self._gone("the server is shutting down")
        status = await self._process.end(stop_seconds)
        _LOG.info("engine process %d ended with status %d", self.pid, status)

    def _cancel(self, number: int) -> None:
        if number in self._requests:
            with contextlib.suppress(EngineUnavailableError):
                self._send(Cancel(number))

    def _forget(self, number: int) -> None:
        self._requests.pop(number, None)

    def _send(self, message: ToEngine, descriptor: int | None = None) -> None:
        self._call_channel(lambda channel: channel.send(message, descriptor))

    def _call_channel(self, send: Callable[[Channel[ToFrontEnd]], None]) -> None:
        if self.ended.is_set():
            raise EngineUnavailableError(ENGINE_DIED)
        channel = self._process.channel
        try:
            send(channel)
        except ChannelClosedError:
            self._gone(ENGINE_DIED)
            raise EngineUnavailableError(ENGINE_DIED) from None
        if channel.has_unsent:
            asyncio.get_running_loop().add_writer(channel.fileno(), self._on_writable)

    def _on_writable(self) -> None:
        channel = self._process.channel
        try:
            channel.flush()
        except ChannelClosedError:
            self._gone(ENGINE_DIED)
            return
        if not channel.has_unsent:
            asyncio.get_running_loop().remove_writer(channel.fileno())

    def _on_readable(self) -> None:
        try:
            for message in self._process.channel.receive():
                self._apply(message)
        except (ChannelClosedError, EngineUnavailableError, msgspec.DecodeError) as error:
            _LOG.error("lost the engine process %d: %s", self.pid, error)
            self._gone(ENGINE_DIED)

    def _apply(self, message: ToFrontEnd) -> None:
        match message:
            case StepOutput():
                self._apply_step(message)
            case State():
                future = self._states.get(message.number)
                if future is not None and not future.done():
                    future.set_result(message)
            case VersionFailed(version_id, problem, may_pass):
                self._on_version_failed(version_id, problem, may_pass)
            case StartProgress() | Ready() | StartFailed():
                raise msgspec.DecodeError(f"{type(message).__name__} after the start")

    def _apply_step(self, output: StepOutput) -> None:
        for tokens in output.tokens:
            request = self._requests.get(tokens.number)
            if request is not None:
                request.add_tokens(tokens)
        for finished in output.finished:
            request = self._requests.pop(finished.number, None)
            if request is not None:
                request.finish(finished)
        for failed in output.failed:
            request = self._requests.pop(failed.number, None)
            if request is not None:
                request.fail(error_of_failure(failed))

    def _gone(self, why: str) -> None:
        if self.ended.is_set():
            return
        self.ended.set()
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._process.channel.fileno())
        loop.remove_writer(self._process.channel.fileno())
        for request in self._requests.values():
            request.fail(EngineUnavailableError(why))
        for future in self._states.values():
            if not future.done():
                future.set_exception(EngineUnavailableError(why))
        self._requests.clear()


async def _started(process: EngineProcess, on_progress: ReportProgress) -> ToFrontEnd:
    """The engine's first message that tells no progress. Raises ChannelClosedError or msgspec.DecodeError."""
    loop = asyncio.get_running_loop()
    while True:
        readable = asyncio.Event()
        loop.add_reader(process.channel.fileno(), readable.set)
        try:
            await readable.wait()
        finally:
            loop.remove_reader(process.channel.fileno())
        for message in process.channel.receive():
            if not isinstance(message, StartProgress):
                return message
            on_progress(message)

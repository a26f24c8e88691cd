"""A server, put together: the gRPC services, their health, and the engine behind them."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from segue.engine.config import LoadFormat
from segue.engine.lora.catalog import AdapterCatalog
from segue.engine.models.config import ModelConfig, ModelError
from segue.engine.progress import ReportProgress, log_lines
from segue.errors import EngineUnavailableError
from segue.server.adapter_service import AdapterService
from segue.server.adapter_tokenizer import AdapterTokenizers
from segue.server.adapters import AdapterDirectory, PinError
from segue.server.config import ServerConfig
from segue.server.engine_client import EngineClient, EngineStatus
from segue.server.engine_life import EngineStartError
from segue.server.engine_process import ENGINE_COMMAND
from segue.server.generation import GenerationService
from segue.server.interceptor import ErrorInterceptor
from segue.server.limits import ModelLimits
from segue.server.server_service import ServerService
from segue.server.tokenizer import ModelTokenizer, NoTokenizer, TokenizerError, load_tokenizer
from segue.v1 import adapters_pb2, adapters_pb2_grpc, generation_pb2, generation_pb2_grpc, server_pb2, server_pb2_grpc

_LOG = logging.getLogger(__name__)

SERVICES = (
    generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name,
    adapters_pb2.DESCRIPTOR.services_by_name["AdapterService"].full_name,
    server_pb2.DESCRIPTOR.services_by_name["ServerService"].full_name,
)

# Without this a second server on the same port would silently take half of the connections.
_GRPC_OPTIONS = (("grpc.so_reuseport", 0),)


class ServerStartError(Exception):
    """The server cannot start. The message is one line for the operator."""


class Server:
    """One server on the running event loop: ``start`` it, then ``stop`` it, once each."""

    def __init__(
        self,
        config: ServerConfig,
        *,
        on_progress: ReportProgress | None = None,
        engine_command: Sequence[str] = ENGINE_COMMAND,
    ) -> None:
        """``on_progress`` is told how far an engine's start has come; by default the log."""
        model_dir = Path(config.engine.model_dir).resolve()
        self._config = dataclasses.replace(
            config,
            engine=dataclasses.replace(config.engine, model_dir=str(model_dir)),
            model_name=config.model_name or model_dir.name,
        )
        self._executor = ThreadPoolExecutor(config.prepare_threads, thread_name_prefix="prepare")
        self._engine = EngineClient(
            self._config.engine,
            config.supervision,
            on_status=self._on_status,
            on_version_failed=self._on_version_failed,
            on_progress=on_progress or log_lines(_LOG),
            command=engine_command,
        )
        self._grpc = grpc.aio.server(interceptors=(ErrorInterceptor(),), options=_GRPC_OPTIONS)
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        self._status_changed = asyncio.Event()
        self._stopping = asyncio.Event()
        self._follower: asyncio.Task[None] | None = None
        self._directory: AdapterDirectory | None = None
        self.port = 0

    async def start(self) -> None:
        """Listen, start the engine, and serve. Raises ServerStartError, with nothing left running."""
        try:
            model = ModelConfig.load(Path(self._config.engine.model_dir))
            tokenizer = self._load_tokenizer()
            catalog = AdapterCatalog(Path(self._config.adapters_dir), model, self._config.engine.max_lora_rank)
            pinned = self._config.pinned_adapters
            self._directory = AdapterDirectory(catalog, self._engine, self._executor, pinned)
            self._listen()
            await self._engine.start()
            await self._directory.pin(self._config.supervision.start_seconds)
            self._add_services(model, tokenizer, self._directory)
            self._follower = asyncio.create_task(self._follow_engine(self._directory), name="engine follower")
            await self._grpc.start()
        except BaseException as error:
            await self.stop()
            if isinstance(error, EngineStartError | EngineUnavailableError | ModelError | PinError | TokenizerError):
                raise ServerStartError(str(error)) from error
            raise
        _LOG.info("serving %s on port %d", self._config.model_name, self.port)

    async def stop(self) -> None:
        """Refuse new requests, let the running ones end within ``drain_seconds``, and stop the engine."""
        self._stopping.set()
        await self._health.enter_graceful_shutdown()
        await self._grpc.stop(self._config.drain_seconds)
        if self._follower is not None:
            self._follower.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._follower
        await self._engine.close()
        self._executor.shutdown()

    def _load_tokenizer(self) -> ModelTokenizer | NoTokenizer:
        """Random weights say nothing anyway: a folder for them may lack a tokenizer. Raises TokenizerError."""
        engine = self._config.engine
        tokenizer = load_tokenizer(Path(engine.model_dir), required=engine.load_format != LoadFormat.DUMMY.value)
        if not tokenizer.has_text:
            _LOG.warning("%s has no tokenizer: prompts must be token ids, and answers have no text", engine.model_dir)
        return tokenizer

    def _listen(self) -> None:
        try:
            self.port = self._grpc.add_insecure_port(self._config.listen)
        except RuntimeError as error:
            raise ServerStartError(f"cannot listen on {self._config.listen}: {error}") from error

    def _add_services(
        self, model: ModelConfig, tokenizer: ModelTokenizer | NoTokenizer, directory: AdapterDirectory
    ) -> None:
        config, ready = self._config, self._engine.life.ready
        limits = ModelLimits(
            name=config.model_name,
            vocab_size=ready.vocab_size,
            context_tokens=ready.context_tokens,
            eos_token_ids=model.eos_token_ids,
            default_max_tokens=config.default_max_tokens,
            has_text=tokenizer.has_text,
        )
        generation = GenerationService(
            limits=limits,
            engine=self._engine,
            directory=directory,
            tokenizer=tokenizer,
            adapter_tokenizers=AdapterTokenizers(
                Path(config.adapters_dir), Path(config.engine.model_dir), tokenizer.vocabulary()
            ),
            executor=self._executor,
        )
        server = ServerService(
            model_name=config.model_name,
            config=config.engine,
            engine=self._engine,
            directory=directory,
            stopping=self._stopping,
        )
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(generation, self._grpc)
        adapters_pb2_grpc.add_AdapterServiceServicer_to_server(AdapterService(directory), self._grpc)
        server_pb2_grpc.add_ServerServiceServicer_to_server(server, self._grpc)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        reflection.enable_server_reflection((*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), self._grpc)

    def _on_status(self, status: EngineStatus) -> None:
        self._status_changed.set()
        if status is EngineStatus.STARTING and self._directory is not None:
            self._directory.engine_lost()

    def _on_version_failed(self, version_id: int, problem: str, may_pass: bool) -> None:
        if self._directory is not None:
            self._directory.version_failed(version_id, problem, may_pass)

    async def _follow_engine(self, directory: AdapterDirectory) -> None:
        """Publish the engine's health, and pin adapters in each engine."""
        while True:
            await self._status_changed.wait()
            self._status_changed.clear()
            serving = self._engine.status is EngineStatus.SERVING
            response = health_pb2.HealthCheckResponse
            for service in ("", *SERVICES):
                await self._health.set(service, response.SERVING if serving else response.NOT_SERVING)
            if serving:
                try:
                    await directory.pin(self._config.supervision.start_seconds)
                except (PinError, EngineUnavailableError) as error:
                    _LOG.error("%s", error)


async def serve(
    config: ServerConfig, *, on_serving: Callable[[int], None], on_progress: ReportProgress | None = None
) -> None:
    """Serve until SIGTERM or SIGINT; ``on_serving`` is called once with the port. Raises ServerStartError."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    server = Server(config, on_progress=on_progress)
    starting = asyncio.create_task(server.start())
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait((starting, stopped), return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        starting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await starting
        on_serving(server.port)
        await stopped
        await server.stop()

"""Everything that one engine consists of, built from its configuration and taken down again."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil
import torch

from segue.config import ConfigError
from segue.cpu_lora import JobRing, SharedLayout, SharedMemory, WorkerEvent, WorkerEventKind, WorkerPool
from segue.engine.attention import TorchAttention
from segue.engine.backend import Backend
from segue.engine.config import EngineConfig, HandoffConfig, LoadFormat
from segue.engine.core import Engine
from segue.engine.costs import EngineCosts
from segue.engine.cuda.toolchain import prepare_cuda
from segue.engine.device import device_streams
from segue.engine.device_time import device_meter
from segue.engine.lora.apply import LoraResources
from segue.engine.lora.bridge import CpuBridge, HostTransport, RowTransport
from segue.engine.lora.cpu_service import WorkerService
from segue.engine.lora.device_lora import TorchDeviceLora
from segue.engine.lora.handover import HandoverPlanner
from segue.engine.lora.store import AdapterStore
from segue.engine.lora.transfer import TransferOps
from segue.engine.memory.adapter_layout import choose_chunk_elems
from segue.engine.memory.pool import PagePool
from segue.engine.memory.prepared_store import PreparedStore
from segue.engine.messages import Ready, StartProgress, State
from segue.engine.models.config import ModelConfig
from segue.engine.models.decoder import DecoderModel
from segue.engine.models.rope import RotaryEmbedding
from segue.engine.pool_size import PageNeeds, cpu_pages, cuda_pages, staging_bytes
from segue.engine.progress import ReportProgress, log_lines
from segue.engine.runner import PassRunner
from segue.engine.sampler import Sampler
from segue.engine.settings import (
    handoff_costs,
    handoff_policy,
    measured_profile,
    merged_rows,
    read_limits,
    worker_config,
)
from segue.engine.step_costs import StepCosts
from segue.scheduler.cost_model import CostProfile
from segue.scheduler.plan import LEAST_PASS_LAYERS, SchedulerLimits

_LOG = logging.getLogger(__name__)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class EngineInstance:
    """An engine with its threads and processes. ``wake_fd`` becomes readable when something arrived from them.
    ``profile`` is what was measured of this machine and model, if anything was."""

    def __init__(
        self, config: EngineConfig, report: ReportProgress | None = None, *, profile: CostProfile | None = None
    ) -> None:
        """Load the model and start everything, telling ``report`` how far that is; by default the log. ``profile`` is
        what steps cost on this machine, in place of the configuration's.

        Raises ConfigError, UnsupportedModelError, MemoryError, OSError, ValueError.
        """
        self._report = report or log_lines(_LOG)
        torch.set_num_threads(config.torch_threads)
        self.config = config
        self._model_config = ModelConfig.load(Path(config.model_dir))
        self.profile = profile or measured_profile(config, self._model_config)
        self._context_tokens = config.max_context_tokens or self._model_config.max_position_embeddings
        dtype = _DTYPES[config.dtype]
        if config.device == "cuda":
            prepare_cuda(os.environ)
        streams = device_streams(config.device)
        model = self._load_model(dtype, streams.device)
        self.wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._worker_restarts = 0
        cpu_config = worker_config(config, self._model_config, dtype.itemsize)
        self._memory = SharedMemory.create(SharedLayout.plan(cpu_config))
        self._host_store = PreparedStore(self._memory, streams)
        self._pool = self._page_pool(dtype, streams.device)
        self.workers = WorkerPool(cpu_config, self._memory, on_event=self._on_worker_event)
        self.workers.start()
        shapes = dict(self._model_config.projection_shapes())
        costs = handoff_costs(config, self._model_config, dtype.itemsize, self.profile)
        chunk_elems = choose_chunk_elems(self._pool.page_elems, {width for shape in shapes.values() for width in shape})
        self.store = AdapterStore(
            memory=self._host_store,
            pool=self._pool,
            chunk_elems=chunk_elems,
            copy_bytes_per_second=config.copy_bytes_per_second,
            ops=_transfer_ops(self._pool, chunk_elems),
            streams=streams,
            staging_bytes=staging_bytes(config, self._model_config, dtype.itemsize),
            read_limits=read_limits(config),
            expected_copy_bytes_per_second=costs.copy_bytes_per_second,
            wake_fd=self.wake_fd,
        )
        ring = JobRing(self.workers)
        self.bridge = CpuBridge(self.workers, ring, self._transport(ring, streams.device), self.store.link, self.store)
        backend = self._backend(model, chunk_elems)
        self.planner = HandoverPlanner(
            store=self.store,
            bridge=self.bridge,
            costs=costs,
            shapes=shapes,
            item_bytes=dtype.itemsize,
            clock=time.monotonic,
        )
        self._lora = LoraResources(
            store=self.store,
            bridge=self.bridge,
            policy=handoff_policy(config.handoff),
            planner=self.planner,
            device_lora=backend.lora,
            shapes=shapes,
            dtype=dtype,
            clock=time.monotonic,
        )
        runner = PassRunner(model, self._pool, backend.attention, self._lora, backend.batches, backend.passes)
        self._meter = device_meter(config.device) if config.measure_device_time else None
        self.engine = self._engine(runner, backend.sampler, self.profile)
        self._host_store.wait_until_ready(min(self._host_store.extent_bytes, config.host_store_bytes))

    @classmethod
    def build(cls, config: EngineConfig, report: ReportProgress | None = None) -> EngineInstance:
        return cls(config, report)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop threads and processes and give all memory back."""
        self._host_store.stop()
        self.workers.close()
        self.bridge.close()
        self.store.close()
        self._host_store.close()
        self._memory.close()
        os.close(self.wake_fd)

    def ready(self) -> Ready:
        """The message that says what this engine is."""
        return Ready(
            model=Path(self.config.model_dir).name,
            device=self.config.device,
            dtype=self.config.dtype,
            layers=self._model_config.layers,
            vocab_size=self._model_config.vocab_size,
            context_tokens=self._context_tokens,
            page_tokens=self.config.page_tokens,
            pages=self._pool.pages,
            cpu_workers=self.config.cpu_workers,
        )

    def state(self, number: int) -> State:
        """A snapshot, in answer to GetState ``number``."""
        requests = self.engine.requests
        kv = self.engine.kv
        own_pages = sum(len(request.own_pages) for request in requests)
        prefilling = sum(request.timeline.first_token_seconds is None for request in requests.admitted)
        return State(
            number=number,
            waiting=len(requests.queue),
            running=len(requests.admitted) - prefilling,
            prefills=prefilling,
            free_pages=self._pool.free_pages,
            adapter_pages=self.store.device_pages_held,
            kv_pages=own_pages + kv.cached_pages - kv.idle_pages,
            cached_pages=kv.idle_pages,
            host_free_bytes=self.store.host_free_bytes,
            cpu_workers_ready=self.workers.ready_workers,
            worker_restarts=self._worker_restarts,
            steps=self.engine.steps,
            versions=self.engine.versions.states(),
            device_time=None if self._meter is None else self._meter.read(),
            costs=self.engine.step_costs.state(),
            refusals=dict(self.engine.refusals),
        )

    def set_handoff(self, handoff: HandoffConfig) -> None:
        """Choose the sources of cold layers in this way from now on: for benchmarks that compare ways on one engine."""
        self._lora.policy = handoff_policy(handoff)
        self.planner.costs = replace(self.planner.costs, harm_weight=handoff.harm_weight)

    def wait_for_host_store(self) -> None:
        """Wait until all of the host store can be used; the engine itself waits for no more than a request needs.

        Raises MemoryError when it never will.
        """
        self._host_store.wait_until_ready(self.config.host_store_bytes)

    def _page_pool(self, dtype: torch.dtype, device: torch.device) -> PagePool:
        pages = self.config.pages or self._automatic_pages(dtype, device)
        try:
            return PagePool(
                layers=self._model_config.layers,
                pages=pages,
                page_tokens=self.config.page_tokens,
                kv_heads=self._model_config.kv_heads,
                head_dim=self._model_config.head_dim,
                dtype=dtype,
                device=device,
                poison_freed=self.config.poison_freed_pages,
            )
        except torch.OutOfMemoryError as error:
            raise ConfigError(f"pages: {pages} do not fit: {str(error).splitlines()[0]}") from error

    def _automatic_pages(self, dtype: torch.dtype, device: torch.device) -> int:
        """As many as fit beside the model, which is loaded."""
        config, model = self.config, self._model_config
        needs = PageNeeds.of(config, model, self._context_tokens, dtype.itemsize)
        if device.type == "cpu":
            return cpu_pages(needs, psutil.virtual_memory().available)
        from segue.engine.cuda.reserve import device_reserve

        reserve = device_reserve(
            config,
            model,
            item_bytes=dtype.itemsize,
            context_tokens=self._context_tokens,
            processors=torch.cuda.get_device_properties(device).multi_processor_count,
        )
        torch.cuda.empty_cache()
        free_bytes, _ = torch.cuda.mem_get_info(device)
        return cuda_pages(needs, free_bytes, config.memory_fraction, reserve)

    def _load_model(self, dtype: torch.dtype, device: torch.device) -> DecoderModel:
        def report(stage: str) -> Callable[[int, int], None]:
            return lambda done, total: self._report(StartProgress(stage, done, total, "bytes"))

        model_dir = Path(self.config.model_dir)
        try:
            if LoadFormat(self.config.load_format) is LoadFormat.DUMMY:
                return DecoderModel.random(self._model_config, dtype, device, report("draw random weights"))
            return DecoderModel.load(model_dir, self._model_config, dtype, device, report("load weights"))
        except torch.OutOfMemoryError as error:
            raise ConfigError(f"device: the model does not fit: {str(error).splitlines()[0]}") from error

    def _backend(self, model: DecoderModel, chunk_elems: int) -> Backend:
        if self.config.device == "cuda":
            try:
                from segue.engine.cuda.backend import cuda_backend
            except ImportError as error:
                raise _not_installed(error) from error
            return cuda_backend(
                self.config,
                model,
                self._pool,
                self.store,
                chunk_elems=chunk_elems,
                context_tokens=self._context_tokens,
                report=lambda stage, done, total: self._report(StartProgress(stage, done, total)),
            )
        return Backend(
            lora=TorchDeviceLora(
                self.store,
                [self._pool.layer(layer) for layer in range(self._model_config.layers)],
                dict(self._model_config.projection_shapes()),
                chunk_elems,
            ),
            attention=TorchAttention(
                self._pool,
                self._model_config.sliding_windows,
                RotaryEmbedding(self._model_config.rope, self._model_config.head_dim),
            ),
        )

    def _transport(self, ring: JobRing, device: torch.device) -> RowTransport:
        if self.config.device != "cuda":
            return HostTransport(ring)
        try:
            from segue.engine.cuda.bridge import StreamTransport
            from segue.engine.cuda.stream_flags import DriverFlags
        except ImportError as error:
            raise ConfigError(f"device: 'cuda' needs cuda-bindings and triton, and {error}") from error
        return StreamTransport(ring, DriverFlags(self._memory.address, device))

    def _cpu_service(self) -> WorkerService | None:
        config = self.config
        if not (config.cpu_decode and config.handoff.helps):
            return None
        planner = self.planner if handoff_policy(config.handoff).follows_plan else None
        return WorkerService(
            self.store, self.bridge, planner, layers_per_step=config.layers_per_step or LEAST_PASS_LAYERS
        )

    def _engine(self, runner: PassRunner, sampler: Sampler, profile: CostProfile | None) -> Engine:
        config = self.config
        return Engine(
            runner=runner,
            pool=self._pool,
            store=self.store,
            bridge=self.bridge,
            limits=SchedulerLimits(
                page_tokens=config.page_tokens,
                max_running=config.max_running,
                max_passes=config.max_passes,
                budget_tokens=config.budget_tokens,
                chunk_tokens=config.chunk_tokens,
                layers_per_step=config.layers_per_step,
                merged_rows=merged_rows(config),
            ),
            max_waiting=config.max_waiting,
            policy=config.policy,
            tenant_queue_share=config.tenant_queue_share,
            max_adapters=config.max_adapters,
            prefix_cache=config.prefix_cache,
            costs=EngineCosts(layers=self._model_config.layers, measured=profile),
            sampler=sampler,
            step_costs=StepCosts(profile, self.store),
            runs_ahead=config.device == "cuda" if config.runs_ahead is None else config.runs_ahead,
            cpu_service=self._cpu_service(),
            meter=self._meter,
            times_device=config.device == "cuda",
            clock=time.monotonic,
            check_invariants=config.check_invariants,
        )

    def _on_worker_event(self, event: WorkerEvent) -> None:
        # One that stalled is killed, and its death is an event of its own.
        self._worker_restarts += event.kind is WorkerEventKind.DIED
        self._wake()

    def _wake(self) -> None:
        os.eventfd_write(self.wake_fd, 1)


def _transfer_ops(pool: PagePool, chunk_elems: int) -> TransferOps:
    """How layers land on the pool's device. Raises ConfigError where that takes what is not installed."""
    if pool.data.device.type == "cpu":
        return TransferOps()
    try:
        from segue.gpu_kernels.land_layers import compile_landing, land_layers
    except ImportError as error:
        raise _not_installed(error) from error
    compile_landing(pool.data, chunk_elems)
    return TransferOps(land=land_layers)


def _not_installed(error: ImportError) -> ConfigError:
    return ConfigError(f"device: 'cuda' needs flashinfer-python and triton, and {error}")

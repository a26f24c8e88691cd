"""What moves an adapter's weights between disk, host memory and device, and owns the memory that they take.

All state changes on the thread that calls the methods. Threads that read and copy carry out jobs and report
completions, which ``apply`` turns into changes of state. Pages and host bytes are given back only when no job refers to
them: a copy that is dropped while one does is kept aside, off its adapter, until the last of them has ended.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from segue.engine.device import DeviceStreams
from segue.engine.lora.device_link import DeviceLink
from segue.engine.lora.events import LayerEnqueued, LayerHost, LayerLanded, LoadFailed, StoreEvent, Verified
from segue.engine.lora.host_memory import HostExtents
from segue.engine.lora.landing import LayerLander
from segue.engine.lora.link_throttle import LinkThrottle
from segue.engine.lora.reader import ReaderPool, ReadLimits
from segue.engine.lora.states import UNDER_WAY, Adapter, DeviceCopy, HostCopy, LayerState, ReadPhase
from segue.engine.lora.transfer import (
    CopyEnded,
    CopyEnqueued,
    CopyLoad,
    LayerRead,
    ReadEnded,
    ReadFailed,
    ReadJob,
    TransferOps,
)
from segue.engine.memory.pool import PagePool
from segue.engine.rate import RateMeter

# Until the first transfers have been measured.
_ASSUMED_READ_BYTES_PER_SECOND = 1e9


class HostStore(Protocol):
    """The memory that holds the host copies: ``store`` is uint8 [bytes], of which each ``extent_bytes`` are ready to
    be touched and copied at another time."""

    @property
    def store(self) -> npt.NDArray[np.uint8]: ...

    @property
    def extent_bytes(self) -> int: ...

    @property
    def ready_bytes(self) -> int:
        """Bytes from the beginning on that may be touched now."""
        ...

    def wait_until_ready(self, stop_bytes: int) -> None:
        """Wait until the bytes below ``stop_bytes`` may be touched. Raises MemoryError when they never will."""


class WeightMover:
    """The host copies and device copies of all adapters, and the threads that fill them."""

    def __init__(
        self,
        *,
        memory: HostStore,
        pool: PagePool,
        chunk_elems: int,
        link: LinkThrottle,
        streams: DeviceStreams,
        wake_fd: int,
        ops: TransferOps,
        staging_bytes: int,
        read_limits: ReadLimits,
        copy_bytes_per_second: float,
    ) -> None:
        """``copy_bytes_per_second`` is what is expected of the link until copies have been measured."""
        self.extents = HostExtents(len(memory.store))
        self._pool = pool
        self._leaving_hosts: list[HostCopy] = []
        self._leaving_devices: list[DeviceCopy] = []
        self._reads: dict[ReadJob, tuple[Adapter, HostCopy]] = {}
        self._loads: dict[CopyLoad, tuple[Adapter, HostCopy, DeviceCopy]] = {}
        self._events: list[StoreEvent] = []
        self._read_rate = RateMeter(_ASSUMED_READ_BYTES_PER_SECOND)
        host = torch.from_numpy(memory.store)
        self._reader = ReaderPool(
            host=host,
            ready_bytes=lambda: memory.ready_bytes,
            make_touchable=memory.wait_until_ready,
            dtype=pool.dtype,
            read_runs=ops.read_runs,
            wake_fd=wake_fd,
            limits=read_limits,
        )
        lander = LayerLander(
            host=host,
            extent_bytes=memory.extent_bytes,
            pool=pool.data,
            chunk_elems=chunk_elems,
            land=ops.land,
            streams=streams,
            staging_bytes=staging_bytes,
        )
        self.link = DeviceLink(
            lander=lander,
            streams=streams,
            throttle=link,
            wake=lambda: os.eventfd_write(wake_fd, 1),
            bytes_per_second=copy_bytes_per_second,
        )

    @property
    def leaving_pages(self) -> int:
        """Pages of dropped device copies that a copy under way still refers to."""
        return sum(len(device.pages) for device in self._leaving_devices)

    @property
    def leaving_offsets(self) -> list[int]:
        """Extents of dropped host copies that a job under way still refers to."""
        return [host.offset for host in self._leaving_hosts]

    def apply_completed(self, touched: Callable[[Adapter], None]) -> tuple[StoreEvent, ...]:
        """Apply what the threads have completed and return the events; ``touched`` is called whenever a job ended."""
        read: dict[int, Adapter] = {}
        for completion in self._reader.completed():
            match completion:
                case LayerRead():
                    adapter = self._on_layer_read(completion)
                    read[adapter.version_id] = adapter
                case ReadFailed():
                    self._on_read_failed(completion)
                case ReadEnded():
                    touched(self._on_read_ended(completion))
        for done in self.link.completed():
            if isinstance(done, CopyEnqueued):
                self._on_copy_enqueued(done)
            else:
                touched(self._on_copy_ended(done))
        for adapter in read.values():
            # All layers that came together are copied together.
            self.start_copies(adapter)
        events, self._events = tuple(self._events), []
        return events

    def start_read(self, adapter: Adapter, offset: int) -> None:
        """Fill the extent at ``offset``, which the adapter's host copy owns from now on."""
        job = ReadJob(
            version_id=adapter.version_id,
            descriptor=adapter.descriptor,
            identity=adapter.manifest.identity,
            plan=adapter.plan,
            copy_offset=offset,
        )
        adapter.move_phase(ReadPhase.READING)
        for layer in range(len(adapter.layers)):
            adapter.move_layer(layer, LayerState.READING)
        adapter.host = HostCopy(offset=offset, reader=job)
        adapter.readers += 1
        self._reads[job] = (adapter, adapter.host)
        self._reader.put(job, urgent=adapter.device is not None)

    def hasten(self, adapter: Adapter) -> None:
        """A pass waits for the adapter from now on."""
        if adapter.host is not None and adapter.host.reader is not None:
            self._reader.hasten(adapter.host.reader)

    def give_pages(self, adapter: Adapter, pages: tuple[int, ...]) -> None:
        """The adapter's layers are to land in these pages."""
        load = self.link.begin(adapter.plan.layers, adapter.landing_tables, pages)
        adapter.device = DeviceCopy.to_fill(pages, load)

    def need(self, adapters: Sequence[Adapter]) -> None:
        """A pass has begun that waits for these adapters: their copies come behind those of earlier passes."""
        devices = [adapter.device for adapter in adapters if adapter.device is not None]
        self.link.need([device.load for device in devices if not device.is_complete])

    def enqueue_copies(self) -> bool:
        """Have the device copy the next layers whose turn it is, by one copy; whether it was given one."""
        enqueued = self.link.enqueue()
        if enqueued is not None:
            self._on_copy_enqueued(enqueued)
        return enqueued is not None

    def start_copies(self, adapter: Adapter) -> None:
        """Queue the copies of the layers that are in host memory, in order."""
        host, device = adapter.host, adapter.device
        if host is None or device is None or adapter.phase is ReadPhase.FAILED:
            return
        load = device.load
        first, ready = load.ready, host.ready_layers
        if first == ready:
            return
        for layer in range(first, ready):
            adapter.move_layer(layer, LayerState.LANDING)
        device.copies += ready - first
        host.copies += ready - first
        load.copy_offset = host.offset
        self._loads[load] = (adapter, host, device)
        self.link.put(load, ready)

    def drop_device(self, adapter: Adapter) -> None:
        """Take the pages from the adapter; they are free when no copy under way refers to them."""
        device = adapter.device
        assert device is not None
        adapter.device = None
        self.link.cancel(device.load)
        for layer, state in enumerate(adapter.layers):
            if state in UNDER_WAY or state is LayerState.LANDED:
                adapter.move_layer(layer, LayerState.ABSENT if adapter.host is None else LayerState.HOST)
        if device.copies:
            self._leaving_devices.append(device)
        else:
            self._pool.free(device.pages)
        if adapter.host is None and adapter.phase is ReadPhase.VERIFIED:
            adapter.move_phase(ReadPhase.UNREAD)

    def drop_host(self, adapter: Adapter) -> None:
        """Take the host copy from the adapter, and with it a device copy that could not be completed without."""
        host = adapter.host
        assert host is not None
        if adapter.device is not None and not adapter.is_device_complete:
            self.drop_device(adapter)
        adapter.host = None
        adapter.evict_host_when_dropped = False
        for layer, state in enumerate(adapter.layers):
            if state in (LayerState.READING, LayerState.HOST):
                adapter.move_layer(layer, LayerState.ABSENT)
        if adapter.phase is ReadPhase.READING or (adapter.phase is ReadPhase.VERIFIED and adapter.device is None):
            adapter.move_phase(ReadPhase.UNREAD)
        if host.reader is not None:
            self._reader.cancel(host.reader)
        self._leaving_hosts.append(host)
        self._free_if_left(host)

    def bring_back_seconds(self, adapter: Adapter) -> float:
        """How long the adapter would take to be on the device again, at the rates measured so far."""
        copy_seconds = self.link.seconds_for(adapter.plan.host_bytes)
        if adapter.host is not None:
            return copy_seconds
        return copy_seconds + self._read_rate.seconds_for(adapter.manifest.weight_bytes)

    def landing_seconds(self, adapter: Adapter) -> list[float | None]:
        """When each layer is expected to land, in seconds from now, behind the copies before it.

        0 where it has, infinite where the adapter has no pages, and None where it is not in host memory yet.
        """
        device = adapter.device
        if device is None:
            return [math.inf] * len(adapter.layers)
        expected = iter(self.link.landing_seconds(device.load))
        return [
            0.0 if state is LayerState.LANDED else next(expected) if state in UNDER_WAY else None
            for state in adapter.layers
        ]

    def close(self, adapters: Sequence[Adapter]) -> None:
        """Stop the threads and give back every page and descriptor of ``adapters``, which are all there are."""
        self._reader.close()
        self.link.close()
        for adapter in adapters:
            os.close(adapter.descriptor)
            if adapter.device is not None:
                self._pool.free(adapter.device.pages)
        for device in self._leaving_devices:
            self._pool.free(device.pages)
        self._leaving_devices.clear()

    def check(self, adapters: Sequence[Adapter]) -> None:
        """Raise AssertionError unless jobs, host bytes, pages and the copies of ``adapters``, all there are, agree."""
        self.extents.check()
        self.link.check()
        hosts = [adapter.host for adapter in adapters if adapter.host is not None]
        for host in self._leaving_hosts:
            assert host not in hosts, f"the host copy at {host.offset} is both used and dropped"
            assert host.is_referenced, f"the host copy at {host.offset} should be gone"
        hosts += self._leaving_hosts
        assert sorted(host.offset for host in hosts) == sorted(self.extents.taken), "host copies and extents differ"
        for adapter in adapters:
            reads = sum(user is adapter for user, _ in self._reads.values())
            assert reads == adapter.readers, f"version {adapter.version_id}: {reads} reads"
            if adapter.host is not None:
                assert self.extents.taken[adapter.host.offset] >= adapter.plan.host_bytes, "an extent is too small"
        for host in hosts:
            jobs = [job for job, (_, target) in self._reads.items() if target is host]
            assert jobs == ([] if host.reader is None else [host.reader]), "read jobs and host copies differ"
            copies = sum(device.copies for _, source, device in self._loads.values() if source is host)
            assert copies == host.copies, f"of the host copy at {host.offset} {copies} layers are copied"
        self._check_pages([adapter.device for adapter in adapters if adapter.device is not None])

    def _check_pages(self, devices: list[DeviceCopy]) -> None:
        for device in self._leaving_devices:
            assert device not in devices, f"the pages {device.pages} are both used and dropped"
            assert device.copies > 0, f"the pages {device.pages} should be free"
        devices += self._leaving_devices
        pages = [page for device in devices for page in device.pages]
        assert len(set(pages)) == len(pages), "a page is in two device copies"
        owned = self._pool.owned()
        for page in pages:
            assert page in owned, f"page {page} is free and holds adapter weights"
        for device in devices:
            loads = sum(target is device for _, _, target in self._loads.values())
            assert loads == (device.copies > 0), f"the pages {device.pages} have {loads} loads"

    def _on_layer_read(self, done: LayerRead) -> Adapter:
        adapter, host = self._reads[done.job]
        if adapter.host is host and adapter.phase is ReadPhase.READING:
            adapter.move_layer(done.layer, LayerState.HOST)
            host.ready_layers = done.layer + 1
            self._events.append(LayerHost(adapter.version_id, done.layer, done.monotonic_seconds))
        return adapter

    def _on_read_failed(self, failed: ReadFailed) -> None:
        adapter, host = self._reads[failed.job]
        if adapter.host is host and adapter.phase is ReadPhase.READING:
            self._fail(adapter, failed.failure, failed.monotonic_seconds, may_pass=failed.may_pass)

    def _on_read_ended(self, done: ReadEnded) -> Adapter:
        adapter, host = self._reads.pop(done.job)
        adapter.readers -= 1
        host.reader = None
        self._free_if_left(host)
        if adapter.host is host and adapter.phase is ReadPhase.READING and done.verified:
            adapter.move_phase(ReadPhase.VERIFIED)
            self._read_rate.observe(adapter.manifest.weight_bytes, done.seconds)
            self._events.append(Verified(adapter.version_id, done.monotonic_seconds))
        return adapter

    def _on_copy_enqueued(self, done: CopyEnqueued) -> None:
        job = done.job
        adapter, _, device = self._loads[job.load]
        if adapter.device is device:
            for layer in job.numbers:
                adapter.move_layer(layer, LayerState.ENQUEUED)
                device.landing_events[layer] = done.span.ended
                self._events.append(LayerEnqueued(adapter.version_id, layer, done.monotonic_seconds))

    def _on_copy_ended(self, done: CopyEnded) -> Adapter:
        job = done.job
        adapter, host, device = self._loads[job.load]
        host.copies -= len(job.layers)
        device.copies -= len(job.layers)
        if device.copies == 0:
            del self._loads[job.load]
        for layer in job.numbers:
            device.landing_events[layer] = None
        self._free_if_left(host)
        if adapter.device is not device:
            if device.copies == 0:
                self._leaving_devices.remove(device)
                self._pool.free(device.pages)
        elif done.landed:
            for layer in job.numbers:
                adapter.move_layer(layer, LayerState.LANDED)
                device.landed_seconds[layer] = done.monotonic_seconds
                self._events.append(LayerLanded(adapter.version_id, layer, done.monotonic_seconds))
        else:
            for layer in job.numbers:
                adapter.move_layer(layer, LayerState.HOST)
            if done.failure is not None and adapter.phase is not ReadPhase.FAILED:
                self._fail(adapter, done.failure, done.monotonic_seconds)
        return adapter

    def _fail(self, adapter: Adapter, message: str, seconds: float, *, may_pass: bool = False) -> None:
        """Users keep what they hold until they release it; what is still under way is cancelled."""
        adapter.move_phase(ReadPhase.FAILED)
        adapter.failure = message
        if adapter.host is not None and adapter.host.reader is not None:
            self._reader.cancel(adapter.host.reader)
        if adapter.device is not None:
            self.link.cancel(adapter.device.load)
        for layer, state in enumerate(adapter.layers):
            if state is LayerState.READING:
                adapter.move_layer(layer, LayerState.ABSENT)
        self._events.append(LoadFailed(adapter.version_id, message, seconds, may_pass))

    def _free_if_left(self, host: HostCopy) -> None:
        if host in self._leaving_hosts and not host.is_referenced:
            self._leaving_hosts.remove(host)
            self.extents.free(host.offset)

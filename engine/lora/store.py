"""The adapter store: which adapter versions are known and where each of their layers is: disk, host memory, device.

All state changes on the thread that calls the store's methods. Threads that read and copy carry out jobs and report
completions, which ``drain`` applies. Pages and host bytes are given back only when no job refers to them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from segue.engine.device import CpuStreams, DeviceStreams
from segue.engine.lora.events import StoreEvent
from segue.engine.lora.host_plan import HostPlan, host_modules
from segue.engine.lora.host_room import HostRoom
from segue.engine.lora.link_throttle import LinkThrottle
from segue.engine.lora.manifest import AdapterManifest
from segue.engine.lora.mover import HostStore, WeightMover
from segue.engine.lora.reader import ReadLimits
from segue.engine.lora.states import Adapter, HostLayer, LayerState, ReadPhase
from segue.engine.lora.transfer import TransferOps
from segue.engine.memory.adapter_layout import AdapterLayout
from segue.engine.memory.pool import PagePool
from segue.errors import AdapterRejectedError
from segue.scheduler.eviction import EvictionCandidate, decayed
from segue.scheduler.placement import AdapterCost
from segue.types import Tier


class AdapterStore:
    """The adapter versions of one engine.

    ``wake_fd``, an eventfd, becomes readable whenever the store's threads leave ``drain`` something to apply. ``link``
    is throttled to ``copy_bytes_per_second``; others may charge it too. Without ``streams`` the device is the CPU.
    ``staging_bytes`` are those of the largest layer that is expected; a larger one makes room when it comes. An unknown
    version raises KeyError where nothing else is said.
    """

    def __init__(
        self,
        *,
        memory: HostStore,
        pool: PagePool,
        chunk_elems: int,
        wake_fd: int,
        copy_bytes_per_second: float | None = None,
        ops: TransferOps | None = None,
        streams: DeviceStreams | None = None,
        staging_bytes: int = 0,
        read_limits: ReadLimits | None = None,
        expected_copy_bytes_per_second: float = 10e9,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``expected_copy_bytes_per_second`` is taken for the link's rate until copies have been measured."""
        self.link = LinkThrottle(copy_bytes_per_second)
        self._pool = pool
        self._chunk_elems = chunk_elems
        self._clock = clock
        self._adapters: dict[int, Adapter] = {}
        self._mover = WeightMover(
            memory=memory,
            pool=pool,
            chunk_elems=chunk_elems,
            link=self.link,
            streams=streams or CpuStreams(),
            wake_fd=wake_fd,
            ops=ops or TransferOps(),
            staging_bytes=staging_bytes,
            read_limits=read_limits or ReadLimits(),
            copy_bytes_per_second=expected_copy_bytes_per_second,
        )
        self._room = HostRoom(self._mover, self._adapters)

    # -- versions and their users ------------------------------------------------------------------------------------

    def register(self, manifest: AdapterManifest, descriptor: int) -> None:
        """Know a version by its open weights file, which the store owns from now on, whatever happens.

        Raises AdapterRejectedError when it is larger than the whole host store, ValueError when it is known already or
        of another number of layers than the pool.
        """
        try:
            if manifest.version_id in self._adapters:
                raise ValueError(f"adapter version {manifest.version_id} is known already")
            if len(manifest.layers) != self._pool.layers:
                raise ValueError(f"the adapter has {len(manifest.layers)} layers, the pool has {self._pool.layers}")
            plan = HostPlan.of(manifest, self._pool.dtype.itemsize)
            if plan.host_bytes > self._mover.extents.capacity_bytes:
                raise AdapterRejectedError(
                    f"the adapter's weights take {plan.host_bytes} bytes, "
                    f"the host store has {self._mover.extents.capacity_bytes} in all"
                )
        except BaseException:
            os.close(descriptor)
            raise
        layout = AdapterLayout.plan(manifest, page_elems=self._pool.page_elems, chunk_elems=self._chunk_elems)
        self._adapters[manifest.version_id] = Adapter.on_disk(manifest, descriptor, plan, layout, self._clock())

    def close_version(self, version_id: int) -> None:
        """Forget a version as soon as it has no users.

        An unknown version is no error: one that failed is forgotten by itself when it has no users.
        """
        adapter = self._adapters.get(version_id)
        if adapter is not None:
            adapter.closed = True
            self._settle(adapter)

    def acquire(self, version_id: int) -> None:
        """Count a user. Raises AdapterRejectedError when the version has failed."""
        adapter = self._adapters[version_id]
        self._refuse_failed(adapter)
        now = self._clock()
        adapter.recent_uses = decayed(adapter.recent_uses, now - adapter.last_used_seconds) + 1.0
        adapter.last_used_seconds = now
        adapter.users += 1

    def release(self, version_id: int) -> None:
        """A user has ended. Raises ValueError when there is none."""
        adapter = self._adapters[version_id]
        if adapter.users == 0:
            raise ValueError(f"adapter version {version_id} has no users")
        adapter.users -= 1
        now = self._clock()
        adapter.recent_uses = decayed(adapter.recent_uses, now - adapter.last_used_seconds)
        adapter.last_used_seconds = now
        if adapter.users == 0 and adapter.phase is ReadPhase.WAITING and adapter.device is None:
            self._room.stop_waiting(adapter)
        self._settle(adapter)

    def users(self, version_id: int) -> int:
        """How many users hold the version; 0 for an unknown one."""
        adapter = self._adapters.get(version_id)
        return 0 if adapter is None else adapter.users

    # -- loading -----------------------------------------------------------------------------------------------------

    def start_load(self, version_id: int) -> None:
        """Bring the version to host memory, layer by layer in order. Does nothing when it is there or on the device.

        Waits for room if need be. Raises AdapterRejectedError when the version has failed.
        """
        adapter = self._adapters[version_id]
        self._refuse_failed(adapter)
        if adapter.phase is ReadPhase.UNREAD:
            adapter.evict_host_when_dropped = False
            self._room.wait(adapter)

    def start_copy(self, version_id: int, pages: tuple[int, ...]) -> None:
        """Copy each layer to ``pages`` once it is in host memory, in order; loads it if need be.

        The store owns the pages from now on. Raises AdapterRejectedError when the version has failed and ValueError
        for a wrong number of pages or a version that has its pages; the pages are the caller's then.
        """
        adapter = self._adapters[version_id]
        self._refuse_failed(adapter)
        if adapter.device is not None:
            raise ValueError(f"adapter version {version_id} has its pages")
        if len(pages) != adapter.layout.pages:
            raise ValueError(f"adapter version {version_id} needs {adapter.layout.pages} pages, not {len(pages)}")
        self._mover.give_pages(adapter, pages)
        adapter.evict_host_when_dropped = False
        self.start_load(version_id)
        self._mover.hasten(adapter)
        self._mover.start_copies(adapter)
        self._room.start_reads()

    def begin_pass(self, version_ids: Iterable[int]) -> None:
        """A pass has begun that waits for these versions: their copies come behind those of earlier passes."""
        self._mover.need([self._adapters[version_id] for version_id in version_ids])

    def enqueue_copies(self) -> bool:
        """Have a device that works beside the host copy the next layers whose turn it is; whether there was anything
        to do. The link is given no more than it is busy with for a few milliseconds."""
        return self._mover.enqueue_copies()

    @property
    def awaits_landings(self) -> bool:
        """Whether the device has copies to land, or copies have ended, which ``drain`` sees, and which wakes nobody."""
        return self._mover.link.awaits_landings

    def drain(self) -> tuple[StoreEvent, ...]:
        """Apply what the threads have completed; the events since the last call, in order."""
        events = self._mover.apply_completed(self._settle)
        self._room.start_reads()
        return events

    # -- what is where -----------------------------------------------------------------------------------------------

    @property
    def host_free_bytes(self) -> int:
        """Bytes of the host store in no host copy."""
        return self._mover.extents.free_bytes

    @property
    def device_pages_held(self) -> int:
        """Pages of the pool that the store owns, those of evicted adapters with a copy under way among them."""
        copies = [adapter.device for adapter in self._adapters.values() if adapter.device is not None]
        return sum(len(device.pages) for device in copies) + self._mover.leaving_pages

    def device_pages(self, version_id: int) -> int:
        """How many pages the version takes on the device."""
        return self._adapters[version_id].layout.pages

    def has_pages(self, version_id: int) -> bool:
        """Whether the version has been given its pages; an unknown one has not."""
        adapter = self._adapters.get(version_id)
        return adapter is not None and adapter.device is not None

    def layer_state(self, version_id: int, layer: int) -> LayerState:
        """Where a layer is."""
        return self._adapters[version_id].layers[layer]

    def landing_event(self, version_id: int, layer: int) -> torch.cuda.Event | None:
        """Of an ENQUEUED layer: the event, recorded, behind which a stream of the device may use it.

        None for any other, and where the device has no streams. A LANDED layer can be used with no wait.
        """
        device = self._adapters[version_id].device
        return None if device is None else device.landing_events[layer]

    def landing_seconds(self, version_id: int) -> list[float | None]:
        """When each layer is expected to land, in seconds from now, behind the copies before it.

        0 where it has, infinite where the version has no pages, and None where it is not in host memory yet.
        """
        return self._mover.landing_seconds(self._adapters[version_id])

    def link_seconds(self, link_bytes: int) -> float:
        """How long the link to the device takes for so many bytes, at the rate measured so far."""
        return self._mover.link.seconds_for(link_bytes)

    @property
    def link_busy_seconds(self) -> float:
        """For how long the link has copies to do."""
        return self._mover.link.busy_seconds()

    @property
    def loads(self) -> int:
        """Versions with copies under way."""
        return self._mover.link.loads

    def is_coming_to_host(self, version_id: int) -> bool:
        """Whether all layers are in host memory, or are being read."""
        adapter = self._adapters[version_id]
        return adapter.host is not None and adapter.phase in (ReadPhase.READING, ReadPhase.VERIFIED)

    def is_in_host(self, version_id: int, layer: int) -> bool:
        """Whether a layer is in host memory; it may be on the device as well."""
        host = self._adapters[version_id].host
        return host is not None and layer < host.ready_layers

    def is_landed(self, version_id: int) -> bool:
        """Whether all layers are on the device."""
        device = self._adapters[version_id].device
        return device is not None and device.is_complete

    def is_verified(self, version_id: int) -> bool:
        """Whether what is in host memory or on the device is known to be the whole, unchanged version."""
        return self._adapters[version_id].phase is ReadPhase.VERIFIED

    def landed_seconds(self, version_id: int) -> tuple[float | None, ...]:
        """When each layer landed, by the monotonic clock; None where it has not."""
        adapter = self._adapters[version_id]
        return (None,) * len(adapter.layers) if adapter.device is None else tuple(adapter.device.landed_seconds)

    def tier(self, version_id: int) -> Tier:
        """The nearest place that has all layers."""
        adapter = self._adapters[version_id]
        if self.is_landed(version_id):
            return Tier.DEVICE
        complete = adapter.host is not None and adapter.host.ready_layers == len(adapter.layers)
        return Tier.HOST if complete else Tier.DISK

    def cost(self, version_id: int) -> AdapterCost:
        """What the version adds to a step that it is in: its largest rank, and its bytes in the model's dtype."""
        return self._adapters[version_id].cost

    def device_layout(self, version_id: int) -> AdapterLayout:
        """Where the version's matrices lie in its pages."""
        return self._adapters[version_id].layout

    def page_table(self, version_id: int) -> Tensor:
        """The pages that the version has been given, int64 [pages]; another tensor each time that it is given pages.

        Raises ValueError when it has none.
        """
        device = self._adapters[version_id].device
        if device is None:
            raise ValueError(f"adapter version {version_id} has no pages")
        return device.load.place.page_table

    def page_ids(self, version_id: int) -> tuple[int, ...]:
        """The same pages in host memory: another tuple each time. Raises ValueError when it has none."""
        device = self._adapters[version_id].device
        if device is None:
            raise ValueError(f"adapter version {version_id} has no pages")
        return device.pages

    def host_view(self, version_id: int, layer: int) -> HostLayer:
        """A layer's matrices in the host store. Raises ValueError unless it is there."""
        adapter = self._adapters[version_id]
        if adapter.host is None or not self.is_in_host(version_id, layer):
            raise ValueError(f"layer {layer} of adapter version {version_id} is not in host memory")
        return HostLayer(tuple(host_modules(adapter.plan.layers[layer], adapter.host.offset)))

    def hold_host(self, version_id: int) -> None:
        """Count a reader of the host copy, which then stays until ``drop_host``. Raises ValueError if there is none."""
        host = self._adapters[version_id].host
        if host is None:
            raise ValueError(f"adapter version {version_id} is not in host memory")
        host.holds += 1

    def drop_host(self, version_id: int) -> None:
        """A reader of the host copy has ended. Raises ValueError when there is none."""
        adapter = self._adapters[version_id]
        if adapter.host is None or adapter.host.holds == 0:
            raise ValueError(f"the host copy of adapter version {version_id} is not held")
        adapter.host.holds -= 1
        self._settle(adapter)

    # -- evicting ----------------------------------------------------------------------------------------------------

    def evictable(self) -> tuple[EvictionCandidate, ...]:
        """The versions whose pages are free as soon as they are evicted: no copy refers to them.

        Their ``users`` count those that only wait, too; the caller knows which of them have been admitted.
        """
        now = self._clock()
        return tuple(
            EvictionCandidate(
                version_id=adapter.version_id,
                pages=len(adapter.device.pages),
                bring_back_seconds=self._mover.bring_back_seconds(adapter),
                recent_uses=adapter.recent_uses,
                idle_seconds=now - adapter.last_used_seconds,
                users=adapter.users,
            )
            for adapter in self._adapters.values()
            if adapter.device is not None and adapter.device.copies == 0
        )

    def evict_device(self, version_id: int) -> None:
        """Give the version's pages back, each as soon as no copy refers to it; no pass may refer to them any more."""
        adapter = self._adapters.get(version_id)
        if adapter is not None and adapter.device is not None:
            self._mover.drop_device(adapter)
            self._settle(adapter)

    def evict_host(self, version_id: int) -> None:
        """Give the version's host bytes back as soon as nothing reads them, and an incomplete device copy with them."""
        adapter = self._adapters.get(version_id)
        if adapter is None:
            return
        if adapter.phase is ReadPhase.WAITING:
            if adapter.device is not None:
                self._mover.drop_device(adapter)
            self._room.stop_waiting(adapter)
        adapter.evict_host_when_dropped = adapter.host is not None
        self._settle(adapter)

    def close(self) -> None:
        """Stop the threads and give back every page, byte and descriptor. May be called twice."""
        self._mover.close(tuple(self._adapters.values()))
        self._adapters.clear()
        self._room.clear()

    def check(self) -> None:
        """Raise AssertionError unless states, counts, host bytes and pages all agree."""
        for adapter in self._adapters.values():
            adapter.check()
        self._room.check()
        self._mover.check(tuple(self._adapters.values()))

    def _settle(self, adapter: Adapter) -> None:
        """Carry out what had to wait until a user, a hold or a job ended."""
        is_held = adapter.host is not None and adapter.host.holds > 0
        leaves = adapter.users == 0 and (adapter.closed or adapter.phase is ReadPhase.FAILED)
        if leaves and adapter.phase is ReadPhase.WAITING:
            self._room.stop_waiting(adapter)
        if leaves and adapter.device is not None:
            self._mover.drop_device(adapter)
        if adapter.host is not None and not is_held and (leaves or adapter.evict_host_when_dropped):
            self._mover.drop_host(adapter)
        if leaves and adapter.host is None and adapter.readers == 0 and adapter.version_id in self._adapters:
            os.close(adapter.descriptor)
            del self._adapters[adapter.version_id]

    def _refuse_failed(self, adapter: Adapter) -> None:
        if adapter.phase is ReadPhase.FAILED:
            raise AdapterRejectedError(adapter.failure)

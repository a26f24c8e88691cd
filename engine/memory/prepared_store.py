"""The host adapter store's memory, made ready ahead of need: allocated, and registered with the device.

The kernel takes seconds to clear a GiB, and the device some time to pin it. A thread of its own does both, one extent
after the other from the store's beginning, which is where the first adapters go.
"""

from __future__ import annotations

import logging
import threading

import numpy as np
import numpy.typing as npt

from segue.cpu_lora import SharedMemory
from segue.cpu_lora.layout import PAGE_BYTES
from segue.engine.device import DeviceStreams

EXTENT_BYTES = 1 << 30
# Between two steps the thread sees that it is to stop.
_STEP_BYTES = 64 << 20
_LOG = logging.getLogger(__name__)


class PreparedStore:
    """The store of a shared memory, of which more and more is ready; see HostStore.

    An extent is ready when it is allocated and registered, so that no copy reads it before it is: such a copy would be
    right, but would hold up all others until the work that it is behind has ended. If an extent cannot be registered,
    it and all later ones are used as they are, at the speed of pageable memory; the first one must be.
    """

    def __init__(self, memory: SharedMemory, streams: DeviceStreams, extent_bytes: int = EXTENT_BYTES) -> None:
        """Register what lies before the store, and begin with the store.

        Raises MemoryError when that cannot be registered, ValueError for an extent that is not a number of pages.
        """
        if extent_bytes <= 0 or extent_bytes % PAGE_BYTES:
            raise ValueError(f"extent_bytes: must be a positive multiple of {PAGE_BYTES}, is {extent_bytes}")
        self.extent_bytes = extent_bytes
        self._memory = memory
        self._streams = streams
        self._store_address = memory.address + memory.layout.store_offset
        self._store_bytes = memory.layout.store_bytes
        self._registered: list[int] = []
        self._registers = True
        self._changed = threading.Condition()
        self._ready_bytes = 0
        self._failure: Exception | None = None
        self._stopped = threading.Event()
        self._register(memory.address, memory.layout.store_offset)
        self._thread = threading.Thread(target=self._run, name="segue-host-store", daemon=True)
        self._thread.start()

    @property
    def store(self) -> npt.NDArray[np.uint8]:
        """The whole store, uint8 [bytes], ready or not."""
        return self._memory.store

    @property
    def ready_bytes(self) -> int:
        """Bytes from the beginning on that are ready."""
        return self._ready_bytes

    def wait_until_ready(self, stop_bytes: int) -> None:
        """Wait for the extents of the bytes below ``stop_bytes``.

        Raises MemoryError when one of them could not be had, or ``stop`` was called.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self._ready_bytes >= stop_bytes or self._failure is not None or self._stopped.is_set()
            )
            if self._ready_bytes < stop_bytes:
                raise MemoryError(f"host memory for adapters is not there: {self._failure or 'the engine stops'}")

    def stop(self) -> None:
        """Prepare no more; nobody has to wait any longer."""
        self._stopped.set()
        with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        """Stop, and undo all registrations: no copy may be under way. May be called twice."""
        self.stop()
        self._thread.join()
        for address in self._registered:
            self._streams.unregister_host(address)
        self._registered.clear()

    def _run(self) -> None:
        for start in range(0, self._store_bytes, self.extent_bytes):
            stop = min(start + self.extent_bytes, self._store_bytes)
            try:
                self._prepare(start, stop)
            except (MemoryError, OSError) as error:
                _LOG.error("the host store ends at %d of %d bytes: %s", start, self._store_bytes, error)
                with self._changed:
                    self._failure = error
                    self._changed.notify_all()
                return
            with self._changed:
                if self._stopped.is_set():
                    return
                self._ready_bytes = stop
                self._changed.notify_all()

    def _prepare(self, start: int, stop: int) -> None:
        for allocated in range(start, stop, _STEP_BYTES):
            if self._stopped.is_set():
                return
            self._memory.allocate_store(min(allocated + _STEP_BYTES, stop))
        if not self._registers or self._stopped.is_set():
            return
        try:
            self._register(self._store_address + start, -(-(stop - start) // PAGE_BYTES) * PAGE_BYTES)
        except MemoryError as error:
            if start == 0:
                raise
            self._registers = False
            _LOG.warning("copies from the host store's bytes from %d on are slower: %s", start, error)

    def _register(self, address: int, size_bytes: int) -> None:
        self._streams.register_host(address, size_bytes)
        self._registered.append(address)

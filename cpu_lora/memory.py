"""The one file in memory that the engine and its CPU LoRA workers map."""

from __future__ import annotations

import errno
import mmap
import os
import threading

import numpy as np
import numpy.typing as npt

from segue.cpu_lora.layout import HEADER_BYTES, SharedLayout


class SharedMemory:
    """A mapped ``memfd_create`` file with numpy views on it.

    An anonymous file leaves nothing behind when its processes die, and does not depend on the size of /dev/shm. The
    views are over the whole mapping: ``words`` uint32, ``longs`` int64, ``doubles`` float64, ``floats`` float32,
    ``halves`` uint16, ``octets`` uint8; ``store`` is the host adapter store alone, uint8 [store_bytes].
    """

    def __init__(self, fd: int, layout: SharedLayout) -> None:
        self.fd = fd
        self.layout = layout
        self.size_bytes = layout.total_bytes
        mapping = mmap.mmap(fd, layout.total_bytes, flags=mmap.MAP_SHARED)
        self.octets: npt.NDArray[np.uint8] = np.frombuffer(mapping, dtype=np.uint8)
        self.halves: npt.NDArray[np.uint16] = self.octets.view(np.uint16)
        self.words: npt.NDArray[np.uint32] = self.octets.view(np.uint32)
        self.floats: npt.NDArray[np.float32] = self.octets.view(np.float32)
        self.longs: npt.NDArray[np.int64] = self.octets.view(np.int64)
        self.doubles: npt.NDArray[np.float64] = self.octets.view(np.float64)
        self.store: npt.NDArray[np.uint8] = self.octets[layout.store_offset :][: layout.store_bytes]
        self.address = int(self.octets.ctypes.data)
        self.allocated_store_bytes = 0
        self._allocation_lock = threading.Lock()

    @classmethod
    def create(cls, layout: SharedLayout) -> SharedMemory:
        """Create and map the file. Everything but the store is allocated at once, so that touching it cannot SIGBUS.

        Raises MemoryError when the machine has not that much memory.
        """
        fd = os.memfd_create("segue-cpu-lora", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, layout.total_bytes)
            _allocate(fd, 0, layout.store_offset)
            memory = cls(fd, layout)
        except BaseException:
            os.close(fd)
            raise
        header = layout.header()
        memory.longs[: len(header)] = header
        return memory

    @classmethod
    def attach(cls, fd: int) -> SharedMemory:
        """Map an existing file and take over ``fd``. Raises ValueError when its header or size is wrong."""
        raw = os.pread(fd, HEADER_BYTES, 0)
        layout = SharedLayout.from_header(tuple(int(word) for word in np.frombuffer(raw[: len(raw) & ~7], np.int64)))
        size_bytes = os.fstat(fd).st_size
        if size_bytes != layout.total_bytes:
            raise ValueError(f"the mapping has {size_bytes} bytes, its header says {layout.total_bytes}")
        return cls(fd, layout)

    def allocate_store(self, stop_bytes: int) -> None:
        """Allocate the store's bytes [0, stop_bytes): bytes beyond must not be touched, by any process.

        Takes as long as the kernel needs to zero the memory and holds no lock that others wait for; any thread may call
        it. Raises ValueError beyond the store, MemoryError when the machine has not that much memory.
        """
        if not 0 <= stop_bytes <= self.layout.store_bytes:
            raise ValueError(f"stop_bytes: {stop_bytes} is beyond the store of {self.layout.store_bytes} bytes")
        with self._allocation_lock:
            missing_bytes = stop_bytes - self.allocated_store_bytes
            if missing_bytes > 0:
                _allocate(self.fd, self.layout.store_offset + self.allocated_store_bytes, missing_bytes)
                self.allocated_store_bytes = stop_bytes

    def close(self) -> None:
        """Close the file and drop the own views; the mapping goes with the last view that others hold."""
        if self.fd < 0:
            return
        os.close(self.fd)
        self.fd = -1
        for view in ("octets", "halves", "words", "floats", "longs", "doubles", "store"):
            delattr(self, view)


def _allocate(fd: int, offset: int, size_bytes: int) -> None:
    try:
        os.posix_fallocate(fd, offset, size_bytes)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.ENOMEM):
            raise MemoryError(f"no memory for {size_bytes} bytes of shared memory") from error
        raise

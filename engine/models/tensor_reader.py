"""Reading tensors from files at the speed of the disk: big chunks, several at once, all files side by side."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor

from segue.engine.models.checkpoint_files import StoredTensor
from segue.engine.models.fields import ModelError
from segue.engine.models.landing import Landing

# A multiple of every element's size. Chunks of 4 to 64 MiB read about equally fast.
CHUNK_BYTES = 16 << 20
# A disk needs several reads in its queue, and a network file system several files.
READERS = 8


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TensorRead:
    """A stored tensor and the contiguous tensor of the same shape, of any dtype, that takes its values."""

    stored: StoredTensor
    destination: Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Chunk:
    """A part of a read: what ``destination``, flat, has at ``file_offset`` of the open file."""

    stored: StoredTensor
    descriptor: int
    file_offset: int
    destination: Tensor

    @property
    def size_bytes(self) -> int:
        return self.destination.numel() * self.stored.torch_dtype.itemsize


def read_tensors(
    reads: Sequence[TensorRead],
    landing: Landing,
    on_read: Callable[[int], None],
    *,
    readers: int = READERS,
    chunk_bytes: int = CHUNK_BYTES,
) -> None:
    """Read all, in the given order within each file, through ``landing``.

    ``on_read`` is called on the calling thread with the bytes of each chunk that has been read. The GIL is free while a
    thread reads, converts or waits for a copy. Raises ModelError when a file cannot be read or ends early, and what
    ``on_read`` raises; then nothing of it is under way any more.
    """
    with ExitStack() as files:
        chunks = list(_in_turn(_chunks(reads, files, chunk_bytes)))
        with ThreadPoolExecutor(readers, thread_name_prefix="segue-load") as executor:
            pending = {executor.submit(_read, chunk, landing): chunk.size_bytes for chunk in chunks}
            try:
                for read in as_completed(pending):
                    read.result()
                    on_read(pending[read])
            finally:
                executor.shutdown(cancel_futures=True)
        landing.finish()


def _chunks(reads: Iterable[TensorRead], files: ExitStack, chunk_bytes: int) -> list[list[_Chunk]]:
    """The chunks of each file."""
    by_path: dict[Path, list[_Chunk]] = {}
    for read in reads:
        stored = read.stored
        if stored.path not in by_path:
            by_path[stored.path] = []
            descriptor = files.enter_context(_opened(stored.path))
        item_bytes = stored.torch_dtype.itemsize
        parts = torch.split(read.destination.view(-1), chunk_bytes // item_bytes)
        for place, part in enumerate(parts):
            offset = stored.file_offset + place * chunk_bytes
            by_path[stored.path].append(
                _Chunk(stored=stored, descriptor=descriptor, file_offset=offset, destination=part)
            )
    return list(by_path.values())


def _in_turn(by_file: Iterable[Iterable[_Chunk]]) -> Iterator[_Chunk]:
    """One chunk of every file, then the next of every file, and so on."""
    for row in zip_longest(*by_file):
        yield from (chunk for chunk in row if chunk is not None)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}") from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _read(chunk: _Chunk, landing: Landing) -> None:
    with landing.buffer(chunk.destination, chunk.stored.torch_dtype) as buffer:
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(chunk.descriptor, [buffer[done:]], chunk.file_offset + done)
            except OSError as error:
                raise ModelError(f"{chunk.stored.path}: {error.strerror}") from error
            if count == 0:
                raise ModelError(f"{chunk.stored.path}: is truncated: it ends within tensor {chunk.stored.name}")
            done += count

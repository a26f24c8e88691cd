"""A store rig whose threads go one step at a time, when a test says so: any order of events, the same every time.

Threads that stand between two steps change nothing, so whatever is seen then is what a drain at that moment would see.
"""

from __future__ import annotations

import errno
import functools
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from segue.engine.device import StreamSpan
from segue.engine.lora import device_link, mover
from segue.engine.lora.adapter_path import identity_of
from segue.engine.lora.checkpoint import WEIGHTS_FILE, open_checkpoint
from segue.engine.lora.copier import CopierThread
from segue.engine.lora.host_plan import PlannedLayer
from segue.engine.lora.landing import LandingPlace, LayerLander
from segue.engine.lora.manifest import AdapterManifest, ModuleWeights, Projection, TensorSpan
from segue.engine.lora.part_reader import PartReader
from segue.engine.lora.reader import ReaderPool, ReadLimits
from segue.engine.lora.reading import Reading
from segue.engine.lora.transfer import CopyJob, CopyLoad, ReadEnded, ReadFailed, ReadJob
from tests.engine.lora.adapter_folders import SmallModel, peft_config, random_tensors, write_folder
from tests.engine.lora.fake_streams import PATIENCE_SECONDS, FakeStream, FakeStreams
from tests.engine.lora.store_rig import NEVER_SECONDS, PATIENT_READS, SLOW_LINK, StoreRig

STEPPED_MODEL = SmallModel(layers=2, hidden=32)
TARGETS = (Projection.Q,)
READ_ERROR = "the disk failed"
# A layer of rank 8 is read in four parts, one of rank 2 in one.
STEPPED_READS = replace(PATIENT_READS, part_bytes=512, overdue_seconds=1e3 * NEVER_SECONDS)
LANDING_ERROR = "the link failed"


class FakeSteps:
    """Holds one thread before each job, and before and after each operation."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._unfinished_jobs = 0
        self._paused = False
        self._stepping = True

    @property
    def is_idle(self) -> bool:
        return self._unfinished_jobs == 0

    def job_put(self) -> None:
        with self._condition:
            self._unfinished_jobs += 1

    def job_ended(self) -> None:
        with self._condition:
            self._unfinished_jobs -= 1
            self._condition.notify_all()

    def pause(self) -> None:
        with self._condition:
            if self._stepping:
                self._paused = True
                self._condition.notify_all()
                assert self._condition.wait_for(lambda: not self._paused, PATIENCE_SECONDS), "no step was allowed"

    def step(self) -> bool:
        """Let the thread go on until it pauses again or has no job; whether it had one."""
        with self._condition:
            self._wait_until_still()
            had_job = self._unfinished_jobs > 0
            self._release()
            self._wait_until_still()
            return had_job

    def run_free(self) -> None:
        """No more pauses."""
        with self._condition:
            self._stepping = False
            self._release()

    def _release(self) -> None:
        self._paused = False
        self._condition.notify_all()

    def wait_until_still(self) -> None:
        """Wait until the thread pauses or has no job."""
        with self._condition:
            self._wait_until_still()

    def _wait_until_still(self) -> None:
        is_still = self._condition.wait_for(
            lambda: self._paused or self._unfinished_jobs == 0 or not self._stepping, PATIENCE_SECONDS
        )
        assert is_still, "the thread neither pauses nor ends its job"


class FakeSteppedReader(ReaderPool):
    """The real one with one thread, in steps. ``job`` is the one under way."""

    job: ReadJob

    def __init__(self, steps: FakeSteps, **options: Any) -> None:
        self._steps = steps
        super().__init__(**options)

    def put(self, job: ReadJob, *, urgent: bool) -> None:
        self._steps.job_put()
        super().put(job, urgent=urgent)
        # Which job an idle thread takes must not depend on whether it is quicker than the next call.
        self._steps.wait_until_still()

    def stall(self) -> None:
        """Whatever is being read, and what waits behind it, has hung for longer than it may. None stands in."""
        self._look(time.monotonic() + 2 * NEVER_SECONDS)

    def _read(self, reader: PartReader, work: Any) -> str | None:
        self.job = work.reading.job
        self._steps.pause()
        failure = super()._read(reader, work)
        self._steps.pause()
        return failure

    def _conclude(self, number: int, reading: Reading) -> None:
        self._steps.pause()
        super()._conclude(number, reading)

    def _report(self, report: ReadFailed | ReadEnded) -> None:
        super()._report(report)
        if isinstance(report, ReadEnded):
            self._steps.job_ended()


class FakeSteppedCopier(CopierThread):
    """The real copier, in steps."""

    def __init__(self, steps: FakeSteps, **options: Any) -> None:
        self._steps = steps
        super().__init__(**options)
        put = self.queue.put

        def put_and_wait(load: CopyLoad, ready: int) -> None:
            for _ in range(load.ready, ready):
                steps.job_put()
            put(load, ready)
            steps.wait_until_still()

        self.queue.put = put_and_wait  # type: ignore[method-assign]

    def _carry_out(self, job: CopyJob) -> None:
        self._steps.pause()
        super()._carry_out(job)
        self._steps.job_ended()


class FakeNotingLander(LayerLander):
    """The real lander. ``present`` is the offset of the host copy and the place of what it was asked for last."""

    present: tuple[int, LandingPlace]

    def start(
        self, layers: Sequence[PlannedLayer], first_layer: int, copy_offset: int, place: LandingPlace
    ) -> StreamSpan | None:
        self.present = copy_offset, place
        return super().start(layers, first_layer, copy_offset, place)


@dataclass(kw_only=True)
class SteppedRig(StoreRig):
    """``grabbed`` are pages that the test holds itself, as KV would, each full of one value of its own.

    ``trespasses`` are operations on memory or descriptors that had been given back.
    """

    model: SmallModel = STEPPED_MODEL
    read_limits: ReadLimits = STEPPED_READS
    enqueues: bool = False
    expected_copy_bytes_per_second: float = SLOW_LINK
    reader: FakeSteps = field(default_factory=FakeSteps)
    copier: FakeSteps = field(default_factory=FakeSteps)
    grabbed: dict[int, float] = field(default_factory=dict)
    next_read_fails: bool = False
    next_landing_fails: bool = False
    trespasses: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mover, "ReaderPool", functools.partial(FakeSteppedReader, self.reader))
            patch.setattr(device_link, "CopierThread", functools.partial(FakeSteppedCopier, self.copier))
            patch.setattr(mover, "LayerLander", FakeNotingLander)
            super().__post_init__()
        self.on_read = self._before_read
        if isinstance(self.streams, FakeStreams):
            self.streams.before_work = self._before_work
        else:
            self.on_land = self._before_land

    @property
    def threads(self) -> tuple[FakeSteps, ...]:
        return self.reader, self.copier

    def check(self) -> None:
        self.store.check()
        self.pool.check()
        assert self.trespasses == []
        assert self.pool.free_pages + self.store.device_pages_held + len(self.grabbed) == self.pool.pages
        for page, value in self.grabbed.items():
            assert (self.pool.data[:, page] == value).all(), f"page {page} was written by who does not own it"

    def stall_reads(self) -> None:
        """See FakeSteppedReader."""
        reader = self.store._mover._reader
        assert isinstance(reader, FakeSteppedReader)
        reader.stall()

    def _before_read(self) -> None:
        thread = self.store._mover._reader
        assert isinstance(thread, FakeSteppedReader)
        if thread.job.copy_offset not in self.store._mover.extents.taken:
            self.trespasses.append("read into host bytes that are free")
        try:
            inode = os.fstat(thread.job.descriptor).st_ino
        except OSError:
            inode = -1
        if inode != thread.job.identity[1]:
            self.trespasses.append("read from a descriptor that was closed")
        if self.next_read_fails:
            self.next_read_fails = False
            raise OSError(errno.EIO, READ_ERROR)

    def _before_land(self) -> None:
        self.copier.pause()
        self._look_for_trespass(*self._present())
        self._fail_if_told()

    def _before_work(self, stream: FakeStream) -> Callable[[], None]:
        """A launch fails at once or never; what was launched is looked at when the device does it."""
        assert isinstance(self.streams, FakeStreams)
        if stream is self.streams.loop:
            return lambda: None
        if stream is self.streams.landing:
            self._fail_if_told()
        return functools.partial(self._look_for_trespass, *self._present())

    def _present(self) -> tuple[int, LandingPlace]:
        lander = self.store._mover.link._pump._lander
        assert isinstance(lander, FakeNotingLander)
        return lander.present

    def _look_for_trespass(self, copy_offset: int, place: LandingPlace) -> None:
        if copy_offset not in self.store._mover.extents.taken:
            self.trespasses.append("copied from host bytes that are free")
        if not set(place.page_table.tolist()) <= self.pool.owned().keys() - self.grabbed.keys():
            self.trespasses.append("copied to pages that are free")

    def _fail_if_told(self) -> None:
        if self.next_landing_fails:
            self.next_landing_fails = False
            raise OSError(errno.EIO, LANDING_ERROR)

    def close(self) -> None:
        for thread in self.threads:
            thread.run_free()
        self.pool.free(self.grabbed)
        self.grabbed.clear()
        super().close()


@functools.cache
def checkpoint_layers(rank: int) -> tuple[bytes, tuple[tuple[ModuleWeights, ...], ...]]:
    """The header of a weights file of this rank, and where its tensors lie."""
    with TemporaryDirectory() as root:
        tensors = random_tensors(STEPPED_MODEL, rank=rank, targets=TARGETS)
        write_folder(Path(root) / "one", tensors=tensors, config=peft_config(TARGETS, r=rank))
        root_fd = os.open(root, os.O_RDONLY)
        try:
            checkpoint = open_checkpoint(root_fd, ("one",), STEPPED_MODEL, 256)
            os.close(checkpoint.descriptor)
        finally:
            os.close(root_fd)
        start = min(span.file_offset for span in spans(checkpoint.layers))
        return (Path(root) / "one" / WEIGHTS_FILE).read_bytes()[:start], checkpoint.layers


def spans(layers: Iterable[Iterable[ModuleWeights]]) -> list[TensorSpan]:
    return [span for layer in layers for module in layer for span in (module.a, module.b)]


def write_version(
    path: Path, version_id: int, rank: int, nan_layer: int | None
) -> tuple[AdapterManifest, list[dict[tuple[Projection, str], Tensor]], int]:
    """A weights file in which no two elements are the same, nor the same as those of another version.

    Returns its manifest, each layer's matrices, and the open descriptor.
    """
    header, layers = checkpoint_layers(rank)
    elements = sum(span.elements for span in spans(layers))
    data = np.arange(elements, dtype=np.float32) + version_id * 10_000

    def matrix(span: TensorSpan) -> Tensor:
        start = (span.file_offset - len(header)) // 4
        return torch.from_numpy(data[start : start + span.elements].copy()).view(span.rows, span.columns)

    contents = [
        {
            (module.projection, name): matrix(span)
            for module in layer
            for name, span in zip("AB", spans([[module]]), strict=True)
        }
        for layer in layers
    ]
    if nan_layer is not None:
        data[(layers[nan_layer][-1].b.file_offset - len(header)) // 4] = np.nan
    path.write_bytes(header + data.tobytes())
    descriptor = os.open(path, os.O_RDONLY)
    manifest = AdapterManifest(
        version_id=version_id,
        version=f"v{version_id}",
        name=path.name,
        identity=identity_of(os.fstat(descriptor)),
        layers=layers,
    )
    return manifest, contents, descriptor

"""What has layers copied from host memory to the device: the loop itself, or a thread beside it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import torch

from segue.engine.device import StreamSpan
from segue.engine.lora.copy_queue import CopyQueue
from segue.engine.lora.landing import LayerLander
from segue.engine.lora.landings import Landings, ends_of
from segue.engine.lora.link import LinkThrottle
from segue.engine.lora.transfer import Completion, CopyEnded, CopyEnqueued, CopyJob, CopyTurn, failure_message

# How many bytes the link has before it: what is asked for later comes behind them, and while a step runs nothing is
# added. More of what passes wait for than of what none does.
_MOST_AHEAD_BYTES = 256 << 20
_MOST_PREFETCH_AHEAD_BYTES = 64 << 20
# So that adapters of few bytes do not fill the driver's queue, where a launch would wait for room.
_MOST_ENQUEUED = 64


class CopyPump:
    """Copies for a device that works beside the host. The loop has them enqueued when their turn has come."""

    def __init__(self, lander: LayerLander, landings: Landings) -> None:
        self._lander = lander
        self._landings = landings
        self._queue = CopyQueue()

    def put(self, job: CopyJob) -> None:
        """Have it enqueued when its turn has come."""
        self._queue.put(job)

    def hasten(self, turn: CopyTurn, need: float) -> None:
        """A pass waits for a load: see ``CopyTurn``."""
        self._queue.hasten(turn, need)

    def enqueue(self) -> CopyEnqueued | Sequence[CopyEnded]:
        """Enqueue the next copy, or the ends of jobs that came to nothing. Empty: there are none, or the link has
        enough before it."""
        if not self._has_room:
            return ()
        jobs = self._queue.take_group(self._landings.ahead_bytes)
        if not jobs:
            return ()
        if jobs[0].cancelled.is_set():
            return ends_of(jobs, 0.0)
        begin = time.monotonic()
        span = _start(self._lander, jobs)
        if isinstance(span, str):
            return ends_of(jobs, time.monotonic() - begin, failure=span)
        if span is None:
            raise RuntimeError("the device works beside the host, and yet a copy was done at once")
        return CopyEnqueued(jobs=jobs, span=span, monotonic_seconds=time.monotonic())

    @property
    def _has_room(self) -> bool:
        most_bytes = _MOST_AHEAD_BYTES if self._queue.is_needed else _MOST_PREFETCH_AHEAD_BYTES
        return self._landings.ahead_bytes < most_bytes and len(self._landings) < _MOST_ENQUEUED


class CopierThread:
    """Carries out copies one after the other: where copying is the host's own work, and on a throttled link, which is a
    clock of the host's. ``link`` says when each copy's bytes have gone through."""

    def __init__(
        self,
        *,
        lander: LayerLander,
        link: LinkThrottle,
        report: Callable[[Completion], None],
        wake: Callable[[], None],
    ) -> None:
        """``wake`` is called behind each report."""
        self._lander = lander
        self._link = link
        self._report = report
        self._wake = wake
        self._queue = CopyQueue()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="segue-lora-copier", daemon=True)
        self._thread.start()

    def put(self, job: CopyJob) -> None:
        """Queue a job; exactly one end of it is reported, unless the thread is stopped before."""
        self._queue.put(job)

    def hasten(self, turn: CopyTurn, need: float) -> None:
        """A pass waits for a load: see ``CopyTurn``."""
        self._queue.hasten(turn, need)

    def close(self) -> None:
        """Stop at the next piece of work and wait for the thread. Jobs not begun are dropped."""
        self._stopped.set()
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        with torch.inference_mode():
            while (job := self._queue.get()) is not None:
                if self._stopped.is_set():
                    return
                self._carry_out(job)

    def _carry_out(self, job: CopyJob) -> None:
        if job.cancelled.is_set():
            self._end(job, 0.0)
            return
        begin = time.monotonic()
        end_seconds = self._link.book(job.planned.host_bytes)
        span = _start(self._lander, [job])
        if isinstance(span, str):
            self._end(job, time.monotonic() - begin, failure=span)
            return
        self._link.wait_until(end_seconds, self._stopped)
        if span is None:
            self._end(job, time.monotonic() - begin, landed=not self._stopped.is_set())
        else:
            self._report(CopyEnqueued(jobs=(job,), span=span, monotonic_seconds=time.monotonic()))
            self._wake()

    def _end(self, job: CopyJob, seconds: float, *, landed: bool = False, failure: str | None = None) -> None:
        for end in ends_of((job,), seconds, landed=landed, failure=failure):
            self._report(end)
        self._wake()


def _start(lander: LayerLander, jobs: Sequence[CopyJob]) -> StreamSpan | str | None:
    """Have one copy carry these jobs: see ``LayerLander.start``. Why it failed, if it did."""
    first = jobs[0]
    try:
        return lander.start([job.planned for job in jobs], first.layer, first.copy_offset, first.place)
    except Exception as error:  # noqa: BLE001 - whatever it is, the jobs' users must learn that it failed
        return failure_message(error, "copied to the device")

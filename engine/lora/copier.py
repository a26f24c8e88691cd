"""What has layers copied from host memory to the device: the loop itself, or a thread beside it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import torch

from segue.engine.device import StreamSpan
from segue.engine.lora.copy_queue import CopyQueue
from segue.engine.lora.landing import LayerLander
from segue.engine.lora.landings import Landings
from segue.engine.lora.link_throttle import LinkThrottle
from segue.engine.lora.transfer import Completion, CopyEnded, CopyEnqueued, CopyJob, failure_message

# What the link has before it: what is asked for later comes behind that, and while a step runs nothing is added. More
# of what passes wait for than of what none does.
_MOST_AHEAD_SECONDS = 5e-3
_MOST_PREFETCH_AHEAD_SECONDS = 1.2e-3
# What the host takes to enqueue a copy and its landing, and more for what else it does in between.
_ENQUEUE_SECONDS = 250e-6
# So that adapters of few bytes do not fill the driver's queue, where a launch would wait for room.
_MOST_ENQUEUED = 64


class CopyPump:
    """Copies for a device that works beside the host. The loop has those in ``queue`` enqueued when their turn has
    come. Exactly one end is told of each layer that is put there."""

    def __init__(self, lander: LayerLander, landings: Landings) -> None:
        self.queue = CopyQueue()
        self._lander = lander
        self._landings = landings

    def enqueue(self, bytes_per_second: float) -> CopyEnqueued | CopyEnded | None:
        """Enqueue the next copy; its end, where it comes to nothing; None where there is none, or the link, which is
        that fast, has enough before it."""
        cancelled = self.queue.take_cancelled()
        if cancelled is not None:
            return CopyEnded(job=cancelled, monotonic_seconds=time.monotonic())
        if not self._has_room(bytes_per_second):
            return None
        # The first layers wait no longer than for the host's next copy, or for what the link is at.
        turn_bytes = int(_ENQUEUE_SECONDS * bytes_per_second)
        job = self.queue.take_group(max(self._landings.ahead_bytes, turn_bytes))
        if job is None:
            return None
        begin = time.monotonic()
        span = _start(self._lander, job)
        now = time.monotonic()
        if isinstance(span, str):
            return CopyEnded(job=job, failure=span, seconds=now - begin, monotonic_seconds=now)
        if span is None:
            raise RuntimeError("the device works beside the host, and yet a copy was done at once")
        return CopyEnqueued(job=job, span=span, monotonic_seconds=now)

    def _has_room(self, bytes_per_second: float) -> bool:
        if len(self._landings) >= _MOST_ENQUEUED:
            return False
        most_seconds = _MOST_AHEAD_SECONDS if self.queue.is_needed else _MOST_PREFETCH_AHEAD_SECONDS
        return self._landings.ahead_bytes < max(1.0, most_seconds * bytes_per_second)


class CopierThread:
    """Carries out the copies in ``queue`` one layer after the other: where copying is the host's own work, and on a
    throttled link, which is a clock of the host's. ``link`` says when each copy's bytes have gone through."""

    def __init__(
        self,
        *,
        lander: LayerLander,
        link: LinkThrottle,
        report: Callable[[Completion], None],
        wake: Callable[[], None],
    ) -> None:
        """``wake`` is called behind each report. Nothing is reported any more once the thread is stopped."""
        self._lander = lander
        self._link = link
        self._report = report
        self._wake = wake
        self.queue = CopyQueue()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="segue-lora-copier", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop at the next piece of work and wait for the thread. Jobs not begun are dropped."""
        self._stopped.set()
        self.queue.end()
        self._thread.join()

    def _run(self) -> None:
        with torch.inference_mode():
            while (job := self.queue.get()) is not None:
                self._carry_out(job)

    def _carry_out(self, job: CopyJob) -> None:
        if job.load.is_cancelled:
            self._tell(CopyEnded(job=job, monotonic_seconds=time.monotonic()))
            return
        begin = time.monotonic()
        end_seconds = self._link.book(job.host_bytes)
        span = _start(self._lander, job)
        if not isinstance(span, str):
            self._link.wait_until(end_seconds, self._stopped)
        now = time.monotonic()
        if isinstance(span, StreamSpan):
            self._tell(CopyEnqueued(job=job, span=span, monotonic_seconds=now))
            return
        landed = span is None and not self._stopped.is_set()
        self._tell(CopyEnded(job=job, landed=landed, failure=span, seconds=now - begin, monotonic_seconds=now))

    def _tell(self, completion: Completion) -> None:
        self._report(completion)
        self._wake()


def _start(lander: LayerLander, job: CopyJob) -> StreamSpan | str | None:
    """Have one copy carry a job: see ``LayerLander.start``. Why it failed, if it did: the load goes no further then."""
    try:
        return lander.start(job.layers, job.first_layer, job.load.copy_offset, job.load.place)
    except Exception as error:  # noqa: BLE001 - whatever it is, the job's users must learn that it failed
        job.load.is_cancelled = True
        return failure_message(error, "copied to the device")

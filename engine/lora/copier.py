"""The threads that bring weights from host memory to the device: one enqueues, the other sees what has landed."""

from __future__ import annotations

import time
from collections.abc import Callable
from queue import Queue

from segue.engine.lora.copy_queue import CopyQueue
from segue.engine.lora.landing import LayerLander
from segue.engine.lora.link import LinkThrottle
from segue.engine.lora.transfer import (
    Completion,
    CopyEnded,
    CopyEnqueued,
    CopyJob,
    EnqueuedCopy,
    JobThread,
    failure_message,
)

# Layers that the device has, and that have not landed. More than a model has, so that a load is enqueued as a whole;
# few enough that the loads of a burst do not fill the driver's queue, where a launch would wait for room.
_MAX_ENQUEUED = 128


class CopierThread(JobThread[CopyJob]):
    """Copies layers to the device in the order of need. ``link`` says when each copy's bytes have gone through.

    Where the device works beside the host, a layer is enqueued and reported at once, by an event for the streams that
    want it, and has landed when its end is reported. Elsewhere the end is all there is to report.
    """

    def __init__(self, *, lander: LayerLander, link: LinkThrottle, report: Callable[[Completion], None]) -> None:
        self._lander = lander
        self._link = link
        self._landings = LandingsThread(report)
        super().__init__("segue-lora-copier", report, CopyQueue())

    def close(self) -> None:
        """Stop, and wait until the device has done all that it was given."""
        super().close()
        self._landings.close()

    def _carry_out(self, job: CopyJob) -> None:
        begin = time.monotonic()
        if job.cancelled.is_set():
            self._end(job, begin, landed=False, failure=None)
            return
        try:
            end_seconds = self._link.book(job.planned.host_bytes)
            landed = self._lander.start(job.planned, job.layer, job.copy_offset, job.place)
        except Exception as error:  # noqa: BLE001 - whatever it is, the job's users must learn that it failed
            self._end(job, begin, landed=False, failure=failure_message(error, "copied to the device"))
            return
        self._link.wait_until(end_seconds, self._stopped)
        if landed is None:
            self._end(job, begin, landed=not self._stopped.is_set(), failure=None)
        else:
            self._report(CopyEnqueued(job=job, landed=landed, monotonic_seconds=time.monotonic()))
            self._landings.put(EnqueuedCopy(job=job, landed=landed, start_seconds=begin))

    def _end(self, job: CopyJob, begin: float, *, landed: bool, failure: str | None) -> None:
        now = time.monotonic()
        self._report(CopyEnded(job=job, landed=landed, failure=failure, seconds=now - begin, monotonic_seconds=now))


class LandingsThread(JobThread[EnqueuedCopy]):
    """Sleeps until the device has landed one layer after the other, and reports each."""

    def __init__(self, report: Callable[[Completion], None]) -> None:
        self._last_end_seconds = 0.0
        super().__init__("segue-lora-landings", report, Queue(_MAX_ENQUEUED))

    def close(self) -> None:
        """See all of them land: until then the device reads the host's memory."""
        self._jobs.put(None)
        self._thread.join()

    def _carry_out(self, job: EnqueuedCopy) -> None:
        failure = None
        try:
            job.landed.synchronize()
        except Exception as error:  # noqa: BLE001 - whatever it is, the job's users must learn that it failed
            failure = failure_message(error, "copied to the device")
        now = time.monotonic()
        seconds = now - max(job.start_seconds, self._last_end_seconds)
        self._last_end_seconds = now
        self._report(
            CopyEnded(job=job.job, landed=failure is None, failure=failure, seconds=seconds, monotonic_seconds=now)
        )

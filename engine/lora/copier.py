"""The threads that bring weights from host memory to the device: one enqueues, the other sees what has landed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
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

# Copies that the device has, and that have not landed. More than a load takes, so that it is enqueued as a whole; few
# enough that the loads of a burst do not fill the driver's queue, where a launch would wait for room.
_MAX_ENQUEUED = 64
# Layers that are brought by one copy: no more than came before them, so that the first ones do not wait for others, and
# so few bytes that the link is through with them soon.
GROUP_BYTES = 16 << 20


class CopierThread(JobThread[CopyJob]):
    """Copies layers to the device in the order of need. ``link`` says when each copy's bytes have gone through.

    Where the device works beside the host, a layer is enqueued and reported at once, by an event for the streams that
    want it, and has landed when its end is reported. Elsewhere the end is all there is to report.
    """

    def __init__(
        self,
        *,
        lander: LayerLander,
        link: LinkThrottle,
        report: Callable[[Completion], None],
        wake: Callable[[], None],
    ) -> None:
        """``wake`` is called behind one report or several."""
        self._lander = lander
        self._link = link
        self._wake = wake
        self._queue = CopyQueue()
        self._landings = LandingsThread(report, wake)
        super().__init__("segue-lora-copier", report, self._queue)

    def close(self) -> None:
        """Stop, and wait until the device has done all that it was given."""
        super().close()
        self._landings.close()

    def _carry_out(self, job: CopyJob) -> None:
        jobs = (job, *self._following(job))
        begin = time.monotonic()
        if job.cancelled.is_set():
            self._end(jobs, begin, landed=False, failure=None)
            return
        try:
            end_seconds = self._link.book(sum(each.planned.host_bytes for each in jobs))
            landed = self._lander.start([each.planned for each in jobs], job.layer, job.copy_offset, job.place)
        except Exception as error:  # noqa: BLE001 - whatever it is, the job's users must learn that it failed
            self._end(jobs, begin, landed=False, failure=failure_message(error, "copied to the device"))
            return
        self._link.wait_until(end_seconds, self._stopped)
        if landed is None:
            self._end(jobs, begin, landed=not self._stopped.is_set(), failure=None)
            return
        now = time.monotonic()
        for each in jobs:
            self._report(CopyEnqueued(job=each, landed=landed, monotonic_seconds=now))
        self._wake()
        self._landings.put(EnqueuedCopy(jobs=jobs, landed=landed, start_seconds=begin))

    def _following(self, job: CopyJob) -> list[CopyJob]:
        """The layers to be brought together with this one. A throttled link carries one after the other."""
        if self._link.bytes_per_second is not None or not self._lander.is_ahead:
            return []
        return self._queue.take_following(job, job.layer - 1, GROUP_BYTES - job.planned.host_bytes)

    def _end(self, jobs: Sequence[CopyJob], begin: float, *, landed: bool, failure: str | None) -> None:
        report_ended(self._report, jobs, begin, landed=landed, failure=failure)
        self._wake()


class LandingsThread(JobThread[EnqueuedCopy]):
    """Sleeps until the device has landed one copy after the other, and reports each layer."""

    def __init__(self, report: Callable[[Completion], None], wake: Callable[[], None]) -> None:
        self._wake = wake
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
        begin = max(job.start_seconds, self._last_end_seconds)
        self._last_end_seconds = report_ended(self._report, job.jobs, begin, landed=failure is None, failure=failure)
        self._wake()


def report_ended(
    report: Callable[[Completion], None],
    jobs: Sequence[CopyJob],
    begin_seconds: float,
    *,
    landed: bool,
    failure: str | None,
) -> float:
    """Report the end of jobs that one copy carried; the time now. They share its time by their bytes."""
    now = time.monotonic()
    all_bytes = sum(job.planned.host_bytes for job in jobs)
    for job in jobs:
        share = job.planned.host_bytes / all_bytes if all_bytes else 1 / len(jobs)
        seconds = (now - begin_seconds) * share
        report(CopyEnded(job=job, landed=landed, failure=failure, seconds=seconds, monotonic_seconds=now))
    return now

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
_MAX_ENQUEUED = 160
# Layers that are brought by one copy: no more than came before them, so that the first ones do not wait for others, and
# so few bytes that the link is through with them soon.
GROUP_BYTES = 32 << 20


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

    @property
    def may_enqueue(self) -> bool:
        """Whether ``enqueue`` may be called: the device works beside the host, and has room."""
        return self._is_ahead and self._landings.has_room

    def enqueue(self, jobs: Sequence[CopyJob]) -> list[CopyEnqueued]:
        """Enqueue all layers of a load that are there, on the calling thread, once ``may_enqueue``.

        A load of a few milliseconds would otherwise be slowed down by two threads that take turns in the interpreter.
        What was enqueued; what could not be is reported as ended.
        """
        enqueued: list[CopyEnqueued] = []
        rest = list(jobs)
        while rest:
            group = _first_group(rest)
            rest = rest[len(group) :]
            enqueued += self._enqueue(group)
        return enqueued

    def close(self) -> None:
        """Stop, and wait until the device has done all that it was given."""
        super().close()
        self._landings.close()

    def _carry_out(self, job: CopyJob) -> None:
        jobs = (job, *self._following(job))
        if job.cancelled.is_set():
            self._end(jobs, time.monotonic(), landed=False, failure=None)
            return
        for enqueued in self._enqueue(jobs):
            self._report(enqueued)
        self._wake()

    def _enqueue(self, jobs: Sequence[CopyJob]) -> list[CopyEnqueued]:
        """Have one copy carry these jobs; what the device has of them, for which their end is reported later."""
        begin = time.monotonic()
        try:
            end_seconds = self._link.book(sum(job.planned.host_bytes for job in jobs))
            first = jobs[0]
            landed = self._lander.start([job.planned for job in jobs], first.layer, first.copy_offset, first.place)
        except Exception as error:  # noqa: BLE001 - whatever it is, the jobs' users must learn that it failed
            self._end(jobs, begin, landed=False, failure=failure_message(error, "copied to the device"))
            return []
        self._link.wait_until(end_seconds, self._stopped)
        if landed is None:
            self._end(jobs, begin, landed=not self._stopped.is_set(), failure=None)
            return []
        now = time.monotonic()
        self._landings.put(EnqueuedCopy(jobs=tuple(jobs), landed=landed, start_seconds=begin))
        return [CopyEnqueued(job=job, landed=landed, monotonic_seconds=now) for job in jobs]

    @property
    def _is_ahead(self) -> bool:
        """Whether the device does what it is given beside the host; a throttled link is a clock of the host's."""
        return self._link.bytes_per_second is None and self._lander.is_ahead

    def _following(self, job: CopyJob) -> list[CopyJob]:
        """The layers to be brought together with this one. A throttled link carries one after the other."""
        if not self._is_ahead:
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
        self._enqueued: Queue[EnqueuedCopy | None] = Queue(_MAX_ENQUEUED)
        super().__init__("segue-lora-landings", report, self._enqueued)

    @property
    def has_room(self) -> bool:
        """Whether a load may be enqueued as a whole without waiting."""
        return self._enqueued.qsize() < _MAX_ENQUEUED // 2

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


def _first_group(jobs: Sequence[CopyJob]) -> Sequence[CopyJob]:
    """The first of a load's jobs that one copy brings: see GROUP_BYTES."""
    count = 1
    size_bytes = jobs[0].planned.host_bytes
    while count < min(len(jobs), jobs[0].layer):
        size_bytes += jobs[count].planned.host_bytes
        if size_bytes > GROUP_BYTES:
            break
        count += 1
    return jobs[:count]


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

"""The copies that wait for the link, in the order in which their layers are needed."""

from __future__ import annotations

import threading
from collections import deque

from segue.engine.lora.fair_order import FairOrder
from segue.engine.lora.landing import LandingPlace
from segue.engine.lora.transfer import CopyJob


class CopyQueue:
    """Loads side by side: the next layer of each before the one after it of any. A load's layers stay in order."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._order: FairOrder[LandingPlace] = FairOrder()
        self._jobs: dict[LandingPlace, deque[CopyJob]] = {}
        self._ended = False

    def put(self, job: CopyJob | None) -> None:
        """None: ``get`` returns no more jobs."""
        with self._changed:
            if job is None:
                self._ended = True
            elif job.place in self._jobs:
                self._jobs[job.place].append(job)
            else:
                self._jobs[job.place] = deque([job])
                self._order.add(job.place)
            self._changed.notify()

    def get(self) -> CopyJob | None:
        """The next job, when there is one."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or len(self._order) > 0)
            place = self._order.first()
            if self._ended or place is None:
                return None
            return self._take(place)

    def take_following(self, job: CopyJob, most_jobs: int, most_bytes: int) -> list[CopyJob]:
        """The next jobs of the same load, if they are there: at most so many, and of so many bytes together."""
        taken: list[CopyJob] = []
        with self._changed:
            while len(taken) < most_jobs and job.place in self._jobs:
                most_bytes -= self._jobs[job.place][0].planned.host_bytes
                if most_bytes < 0:
                    break
                taken.append(self._take(job.place))
        return taken

    def _take(self, place: LandingPlace) -> CopyJob:
        job = self._jobs[place].popleft()
        self._order.charge(place, 1)
        if not self._jobs[place]:
            del self._jobs[place]
            self._order.remove(place)
        return job

"""The link to the device as a whole: loads, the copies that they wait for, what has landed, and when the rest will."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from queue import Empty, SimpleQueue

from segue.engine.device import DeviceStreams
from segue.engine.lora.backlog import CopyBacklog
from segue.engine.lora.copier import CopierThread, CopyPump
from segue.engine.lora.copy_queue import CopyQueue
from segue.engine.lora.host_plan import PlannedLayer
from segue.engine.lora.landing import LandingPlace, LandingTables, LayerLander
from segue.engine.lora.landings import Landings
from segue.engine.lora.link_throttle import LinkThrottle
from segue.engine.lora.transfer import Completion, CopyEnded, CopyEnqueued, CopyLoad
from segue.engine.rate import RateMeter


class DeviceLink:
    """Copies of loads, in the order of need. It knows bytes and times, and no state of an adapter."""

    def __init__(
        self,
        *,
        lander: LayerLander,
        streams: DeviceStreams,
        throttle: LinkThrottle,
        wake: Callable[[], None],
        bytes_per_second: float,
    ) -> None:
        """``bytes_per_second`` is what is expected of the link until copies have been measured. ``wake`` is called on
        the thread that copies where the loop does not, whenever ``completed`` has something new."""
        self._streams = streams
        self._throttle = throttle
        self._arrivals = 0
        self._needs = 0
        self._rate = RateMeter(min(throttle.bytes_per_second or bytes_per_second, bytes_per_second))
        self._backlog = CopyBacklog(self._rate)
        self._completions: SimpleQueue[Completion] = SimpleQueue()
        self._landings = Landings()
        self._pump = CopyPump(lander, self._landings)
        self._thread = CopierThread(lander=lander, link=throttle, report=self._completions.put, wake=wake)

    @property
    def awaits_landings(self) -> bool:
        """Whether the device has copies to land, or ``completed`` has more to tell, which wakes nobody."""
        return len(self._landings) > 0 or not self._completions.empty()

    @property
    def loads(self) -> int:
        """Loads with copies under way."""
        return self._backlog.loads

    def begin(self, layers: tuple[PlannedLayer, ...], tables: LandingTables, pages: Sequence[int]) -> CopyLoad:
        """A load of these layers to these pages, behind what the calling thread has enqueued; none is copied yet."""
        self._arrivals += 1
        return CopyLoad(
            layers=layers,
            place=LandingPlace.on_device(tables, pages, self._streams),
            arrival=self._arrivals,
            by_thread=not self._streams.work_beside or self._throttle.bytes_per_second is not None,
        )

    def put(self, load: CopyLoad, ready: int) -> None:
        """The load's layers below ``ready`` are in host memory: have them copied when it is their turn."""
        self._backlog.put(load, [planned.host_bytes for planned in load.layers[load.ready : ready]])
        self._queue_of(load).put(load, ready)

    def need(self, loads: Iterable[CopyLoad]) -> None:
        """A pass has begun that waits for these loads: their copies come behind those of earlier passes."""
        self._needs += 1
        for load in loads:
            if not load.is_needed:
                self._queue_of(load).hasten(load, self._needs)

    def cancel(self, load: CopyLoad) -> None:
        """Begin no further copy of a load; what waits is told of as ended before anything else is copied."""
        self._queue_of(load).cancel(load)

    def enqueue(self) -> CopyEnqueued | None:
        """Enqueue the next copy, where there is one and the link has room. Ends that are seen meanwhile are told by
        ``completed``."""
        for ended in self._landings.take_landed():
            self._completions.put(ended)
        while True:
            enqueued = self._pump.enqueue(1 / self._rate.seconds_for(1))
            if isinstance(enqueued, CopyEnded):
                self._completions.put(enqueued)
                continue
            if enqueued is not None:
                self._take_enqueued(enqueued)
            return enqueued

    def completed(self) -> Iterator[CopyEnqueued | CopyEnded]:
        """What has been enqueued by the thread, and what has ended, since the last call."""
        while True:
            try:
                completion = self._completions.get_nowait()
            except Empty:
                break
            if isinstance(completion, CopyEnqueued):
                self._take_enqueued(completion)
                yield completion
            elif isinstance(completion, CopyEnded):
                yield self._take_ended(completion)
        for ended in self._landings.take_landed():
            yield self._take_ended(ended)

    def seconds_for(self, link_bytes: int) -> float:
        """How long the link takes for so many bytes, at the rate measured so far."""
        return self._rate.seconds_for(link_bytes)

    def busy_seconds(self) -> float:
        """For how long the link has copies to do."""
        return self._backlog.busy_seconds()

    def landing_seconds(self, load: CopyLoad) -> Sequence[float]:
        """When each of the load's layers under way will be through, in seconds from now."""
        return self._backlog.landing_seconds(load)

    def close(self) -> None:
        """Stop, and see all land that the device was given."""
        self._thread.close()
        for _ in self.completed():
            pass
        self._landings.close()

    def check(self) -> None:
        """Raises AssertionError unless the sums of bytes agree."""
        self._backlog.check()

    def _queue_of(self, load: CopyLoad) -> CopyQueue:
        return self._thread.queue if load.by_thread else self._pump.queue

    def _take_enqueued(self, done: CopyEnqueued) -> None:
        self._landings.put(done)
        self._backlog.enqueue(done.job.load, done.job.host_bytes)

    def _take_ended(self, done: CopyEnded) -> CopyEnded:
        job = done.job
        self._backlog.end(job.load, len(job.layers), done.monotonic_seconds)
        if done.landed and not job.load.is_cancelled:
            self._rate.observe(job.host_bytes, done.seconds)
        return done

"""The pool of CPU LoRA workers, as the engine sees it."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

from segue.cpu_lora.arming import Arming
from segue.cpu_lora.config import CpuLoraConfig
from segue.cpu_lora.memory import SharedMemory
from segue.cpu_lora.slots import SlotTable
from segue.cpu_lora.watchdog import Watchdog
from segue.cpu_lora.workers import WorkerEvent

_READY_LOOK_SECONDS = 0.002


class WorkerPool:
    """Worker processes over one shared memory, with the watchdog that keeps them alive.

    Args:
        config: the settings that ``memory`` was laid out for.
        memory: stays the caller's; close it after the pool.
        on_event: called on the watchdog's thread for each event; must be quick and must not call the pool.

    Raises:
        ValueError: ``memory`` was laid out for other numbers of workers or slots.
    """

    def __init__(
        self,
        config: CpuLoraConfig,
        memory: SharedMemory,
        on_event: Callable[[WorkerEvent], None] | None = None,
    ) -> None:
        layout = memory.layout
        if (layout.workers, layout.slots) != (config.workers, config.slots):
            raise ValueError(
                f"memory: laid out for {layout.workers} workers and {layout.slots} slots, "
                f"the configuration has {config.workers} and {config.slots}"
            )
        self.config = config
        self.memory = memory
        self._arming = Arming(memory)
        self.slot_table = SlotTable(memory, self._arming)
        self._watchdog = Watchdog(config, memory, self.slot_table, self._arming, on_event)
        self._closed = False

    def start(self) -> None:
        """Begin to start the workers and return at once; they become ready one by one."""
        self._watchdog.start()

    def __enter__(self) -> WorkerPool:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def workers(self) -> int:
        """Workers that the configuration asks for."""
        return self.config.workers

    def ready_lives(self) -> list[tuple[int, int]]:
        """Worker and generation of every worker that serves now."""
        return [(life.index, life.generation) for life in self._watchdog.lives if life.is_ready]

    @property
    def ready_workers(self) -> int:
        """Workers that serve now; at 0 every adapter has to be streamed."""
        return len(self.ready_lives())

    def wait_ready(self, count: int, timeout_seconds: float) -> bool:
        """Wait until ``count`` workers serve; returns whether they do."""
        deadline_seconds = time.monotonic() + timeout_seconds
        while self.ready_workers < count:
            if time.monotonic() >= deadline_seconds or self.failure is not None:
                return False
            time.sleep(_READY_LOOK_SECONDS)
        return True

    @property
    def worker_pids(self) -> tuple[int, ...]:
        """Process ids of the living workers."""
        return tuple(life.pid for life in self._watchdog.lives if life.pid >= 0)

    @property
    def zygote_pid(self) -> int | None:
        """Process id of the zygote, if one is running."""
        return self._watchdog.zygote_pid

    @property
    def events(self) -> tuple[WorkerEvent, ...]:
        """The newest 1,000 events, oldest first."""
        return tuple(self._watchdog.events)

    @property
    def failure(self) -> BaseException | None:
        """Why supervision ended by itself; then no worker is left and every job has failed."""
        return self._watchdog.failure

    def arm(self) -> None:
        """Keep the workers spinning until the matching ``disarm``. Jobs do so by themselves; this is to do it ahead."""
        self._arming.arm()

    def disarm(self) -> None:
        """Undo one ``arm``."""
        self._arming.disarm()

    def close(self) -> None:
        """Kill and reap everything; unfinished shares are answered FAILED first. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._watchdog.close()
        self._arming.close()

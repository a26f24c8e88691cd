"""Takes adapters from a server while it is under load."""

from __future__ import annotations

import dataclasses
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from segue.bench.slo.config import Churn, ChurnConfig
from segue.bench.slo.workload import Adapter
from segue.client import Client
from segue.errors import SegueError

_CALL_SECONDS = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ChurnCount:
    """Adapters that were taken, and calls that failed; ``last_error`` is of one of those."""

    done: int = 0
    failed: int = 0
    last_error: str | None = None

    def plus(self, other: ChurnCount) -> ChurnCount:
        """Both together."""
        return ChurnCount(
            done=self.done + other.done,
            failed=self.failed + other.failed,
            last_error=other.last_error or self.last_error,
        )


class Churner:
    """Evicts adapters, or unloads and loads them, at even times on a thread of its own. Use as a context."""

    def __init__(self, address: str, config: ChurnConfig, adapters: Sequence[Adapter], seed: int) -> None:
        self._address = address
        self._config = config
        self._names = [adapter.name for adapter in adapters]
        self._random = random.Random(f"churn {seed}")
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self.count = ChurnCount()

    def start(self, begin_seconds: float, seconds: float) -> None:
        """Go on for ``seconds`` from that moment of CLOCK_MONOTONIC."""
        if self._config.per_second > 0 and self._names:
            self._thread = threading.Thread(target=self._run, args=(begin_seconds, seconds))
            self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self, begin_seconds: float, seconds: float) -> None:
        with Client(self._address) as client:
            for number in range(int(seconds * self._config.per_second)):
                due = begin_seconds + (number + 1) / self._config.per_second
                if self._stopped.wait(max(0.0, due - time.monotonic())):
                    return
                self._take(client, self._random.choice(self._names))

    def _take(self, client: Client, name: str) -> None:
        try:
            if self._config.kind == Churn.RELOAD:
                client.adapters.unload(name, timeout=_CALL_SECONDS)
                client.adapters.load(name, timeout=_CALL_SECONDS)
            else:
                client.adapters.evict(name, timeout=_CALL_SECONDS)
        except SegueError as error:
            self.count = dataclasses.replace(self.count, failed=self.count.failed + 1, last_error=error.message)
        else:
            self.count = dataclasses.replace(self.count, done=self.count.done + 1)

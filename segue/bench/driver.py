"""An engine in this process that a benchmark advances step by step."""

from __future__ import annotations

import math
import os
import select
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from segue.engine.config import EngineConfig
from segue.engine.instance import EngineInstance
from segue.engine.lora.catalog import AdapterCatalog, OpenedVersion
from segue.engine.messages import CostState, StepOutput, Submit
from segue.engine.sampling_params import SamplingParams
from segue.scheduler.cost_fit import TimedStep
from segue.scheduler.placement import AdapterCost
from segue.types import Tier

_MAX_WAIT_SECONDS = 0.01
_DEVICE_NAP_SECONDS = 50e-6
_JOB_WAIT_SECONDS = 0.0005
_WORKERS_SECONDS = 120.0


class BenchmarkError(Exception):
    """The engine did not do what the measurement needs. The message is one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedRequest:
    """A request to submit ``arrival_seconds`` after the beginning. ``version_id`` is None for the base model."""

    arrival_seconds: float
    prompt: Sequence[int]
    version_id: int | None
    max_tokens: int


@dataclass(slots=True, kw_only=True)
class ServedRequest:
    """When its first and its last token came, in seconds after the beginning, and how many there were."""

    first_token_seconds: float = math.nan
    last_token_seconds: float = math.nan
    tokens: int = 0


class EngineDriver:
    """Submits requests of token ids to a real engine and times its steps. Requests decode greedily and stop nowhere."""

    def __init__(self, config: EngineConfig, catalog: AdapterCatalog) -> None:
        """Load the model. Raises as EngineInstance."""
        self._catalog = catalog
        self._opened: list[OpenedVersion] = []
        self._last_number = 0
        self._running: set[int] = set()
        self._instance = EngineInstance(config)
        self._engine = self._instance.engine

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._instance.close()
        for opened in self._opened:
            opened.close()

    def load(self, name: str) -> int:
        """Bring an adapter to the device; its version id. Raises AdapterRejectedError or BenchmarkError."""
        opened = self._catalog.lookup(name)
        self._opened.append(opened)
        version_id = opened.manifest.version_id
        if opened.fileno is None:
            raise BenchmarkError(f"adapter {name} is loaded already")
        self._engine.open_version(opened.manifest, os.dup(opened.fileno))
        opened.handed_over()
        self._engine.versions.preload(version_id)
        self.wait_landed(version_id)
        return version_id

    def wait_landed(self, version_id: int) -> None:
        """Step until all of an adapter that has its pages has landed and is known to be right."""
        store = self._instance.store
        self._step_until(lambda: store.is_landed(version_id) and store.is_verified(version_id))

    def listen(self, listener: Callable[[TimedStep], None] | None) -> None:
        """Have ``listener`` told of each step whose time is that of its rows alone."""
        self._engine.step_costs.listener = listener

    def wait_for_workers(self) -> None:
        """Wait until all CPU workers are ready. Raises BenchmarkError if they do not become it."""
        workers = self._instance.workers
        if not workers.wait_ready(workers.workers, _WORKERS_SECONDS):
            raise BenchmarkError(f"{workers.workers} workers are not ready after {_WORKERS_SECONDS:.0f} seconds")

    def move_to_host(self, version_id: int) -> None:
        """Leave an adapter that nobody uses in host memory alone. Raises BenchmarkError where it has no room there."""
        store = self._instance.store
        if not store.is_in_host(version_id, 0):
            store.evict_device(version_id)
            self.copy_seconds(version_id)
        store.evict_device(version_id)
        self._step_until(lambda: not store.has_pages(version_id))
        if store.tier(version_id) is not Tier.HOST:
            raise BenchmarkError("the host store has no room for the adapter")

    def copy_seconds(self, version_id: int) -> float:
        """The time until all layers of an adapter that is in host memory have landed."""
        start_seconds = time.monotonic()
        self._engine.versions.preload(version_id)
        self.wait_landed(version_id)
        landed_seconds = self._instance.store.landed_seconds(version_id)
        return max(seconds for seconds in landed_seconds if seconds is not None) - start_seconds

    @property
    def costs(self) -> CostState | None:
        """The cost profile as the steps have corrected it; None where the configuration names none."""
        return self._engine.step_costs.state()

    def cost(self, version_id: int) -> AdapterCost:
        """What the adapter adds to a step."""
        return self._instance.store.cost(version_id)

    def submit(self, prompt: Sequence[int], version_id: int | None, *, max_tokens: int) -> int:
        """Queue a request; its number."""
        self._last_number += 1
        self._running.add(self._last_number)
        self._engine.submit(
            Submit(
                number=self._last_number,
                prompt_token_ids=list(prompt),
                max_tokens=max_tokens,
                arrival_seconds=time.monotonic(),
                sampling=SamplingParams(seed=0),
                adapter_version_id=version_id,
            )
        )
        return self._last_number

    def serve(self, requests: Sequence[TimedRequest]) -> list[ServedRequest]:
        """Serve requests, in the order of their arrival, each submitted when it arrives, whatever runs then.

        Raises BenchmarkError.
        """
        start_seconds = time.monotonic()
        served: dict[int, ServedRequest] = {}
        place = 0
        while place < len(requests) or self._running:
            now = time.monotonic() - start_seconds
            while place < len(requests) and requests[place].arrival_seconds <= now:
                item = requests[place]
                served[self.submit(item.prompt, item.version_id, max_tokens=item.max_tokens)] = ServedRequest()
                place += 1
            until = requests[place].arrival_seconds - now if place < len(requests) else _MAX_WAIT_SECONDS
            output = self._step(min(max(until, 0.0), _MAX_WAIT_SECONDS))
            now = time.monotonic() - start_seconds
            for new in output.tokens:
                item_served = served[new.number]
                if not item_served.tokens:
                    item_served.first_token_seconds = now
                item_served.tokens += len(new.token_ids)
                item_served.last_token_seconds = now
        return list(served.values())

    def run_to_first_tokens(self, numbers: Sequence[int]) -> None:
        """Step until each of these requests has a token. Raises BenchmarkError."""
        missing = set(numbers)
        while missing:
            missing -= {new.number for new in self._step().tokens}

    def decode_seconds(self) -> float:
        """The time of one step, in which every running request decodes one token. Raises BenchmarkError if not."""
        running = set(self._running)
        start_seconds = time.perf_counter()
        output, _ = self._engine.step()
        seconds = time.perf_counter() - start_seconds
        self._check(output)
        decoded = {new.number for new in output.tokens}
        if decoded != running:
            raise BenchmarkError(f"{len(decoded)} of {len(running)} running requests decoded in a step")
        return seconds

    def cancel_all(self) -> None:
        """End every request and let the engine settle."""
        for number in self._running:
            self._engine.cancel(number)
        self._step_until(lambda: not self._running)

    def _step_until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._step()

    def _step(self, wait_seconds: float = _MAX_WAIT_SECONDS) -> StepOutput:
        """One step; a wait, at most so long, for what comes from outside when nothing can go on."""
        output, failures = self._engine.step()
        if failures:
            raise BenchmarkError(f"an adapter cannot be served: {failures[0].message}")
        self._check(output)
        jobs = [job for job in (item.job for item in self._engine.passes) if job is not None]
        if jobs and self._instance.bridge.wait(jobs, _JOB_WAIT_SECONDS):
            return output
        if self._engine.must_look_again:
            time.sleep(_DEVICE_NAP_SECONDS)
        elif not self._engine.can_go_on and not jobs:
            ready, _, _ = select.select([self._instance.wake_fd], [], [], wait_seconds)
            if ready:
                os.eventfd_read(self._instance.wake_fd)
        return output

    def _check(self, output: StepOutput) -> None:
        if output.failed:
            raise BenchmarkError(f"a request failed: {output.failed[0].message}")
        self._running -= {finished.number for finished in output.finished}

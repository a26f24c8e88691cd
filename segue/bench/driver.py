"""An engine in this process that a benchmark advances step by step."""

from __future__ import annotations

import math
import os
import select
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from segue.cpu_lora.jobs import share_count
from segue.engine.config import EngineConfig, HandoffConfig
from segue.engine.instance import EngineInstance
from segue.engine.interpreter import settle_interpreter
from segue.engine.loop import wait_for_work
from segue.engine.lora.catalog import AdapterCatalog, OpenedVersion
from segue.engine.messages import CostState, StepOutput, Submit
from segue.engine.sampling_params import SamplingParams
from segue.scheduler.cost_fit import TimedStep
from segue.scheduler.placement import AdapterCost
from segue.types import Tier, Timing

_IDLE_MILLISECONDS = 10


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
        self.step_seconds = 0.0
        """How long the steps of ``step`` took in all, without waits for what comes from outside."""
        self.step_cpu_seconds = 0.0
        """How long this thread computed in them."""
        self._instance = EngineInstance(config)
        self._engine = self._instance.engine
        settle_interpreter()
        self._poller = select.poll()
        self._poller.register(self._instance.wake_fd, select.POLLIN)

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
        version_id = self.open(name)
        self.move([version_id], Tier.DEVICE)
        return version_id

    def open(self, name: str) -> int:
        """Make an adapter known; its version id. Its weights stay on disk. Raises as ``load``."""
        opened = self._catalog.lookup(name)
        self._opened.append(opened)
        if opened.fileno is None:
            raise BenchmarkError(f"adapter {name} is loaded already")
        self._engine.open_version(opened.manifest, os.dup(opened.fileno))
        opened.handed_over()
        return opened.manifest.version_id

    def tier(self, version_id: int) -> Tier:
        """The nearest place that has all of an adapter's weights."""
        return self._instance.store.tier(version_id)

    def move(self, version_ids: Sequence[int], tier: Tier) -> None:
        """Have these adapters there and nowhere nearer: the host copy of one on the device may stay, that of one on
        disk is gone. Waits until no request uses them. Raises BenchmarkError for no room."""
        store = self._instance.store
        self._step_until(lambda: not any(store.users(version_id) for version_id in version_ids))
        if tier is Tier.DEVICE:
            for version_id in version_ids:
                self._engine.versions.preload(version_id)
                if not store.has_pages(version_id):
                    raise BenchmarkError(f"adapter version {version_id} finds no free pages")
        else:
            for version_id in version_ids:
                store.evict_device(version_id)
                if tier is Tier.DISK:
                    store.evict_host(version_id)
                else:
                    store.start_load(version_id)
        verified = tier is not Tier.DISK
        self._step_until(
            lambda: all(store.tier(each) is tier and store.is_verified(each) is verified for each in version_ids)
        )
        # Pages of which a copy was under way are free when that has ended.
        self._step_until(lambda: store.device_pages_held == self._pages_in_use())

    def _pages_in_use(self) -> int:
        """Pages of the adapters that have theirs."""
        store = self._instance.store
        versions = [opened.manifest.version_id for opened in self._opened]
        return sum(store.device_pages(version_id) for version_id in versions if store.has_pages(version_id))

    def listen(self, listener: Callable[[TimedStep], None] | None) -> None:
        """Have ``listener`` told of each step whose time is that of its rows alone."""
        self._engine.step_costs.listener = listener

    def copy_seconds(self, version_id: int) -> float:
        """The time from asking for an adapter, which is in host memory alone, until all its layers have landed."""
        start_seconds = time.monotonic()
        self.move([version_id], Tier.DEVICE)
        landed_seconds = self._instance.store.landed_seconds(version_id)
        return max(seconds for seconds in landed_seconds if seconds is not None) - start_seconds

    @property
    def costs(self) -> CostState | None:
        """The cost profile as the steps have corrected it; None where the configuration names none."""
        return self._engine.step_costs.state()

    def job_shares(self, rows: int) -> int:
        """How many workers share a job of so many rows where no profile says it."""
        workers = self._instance.workers
        return share_count(rows, workers.ready_workers, workers.config.min_rows_per_share)

    def cost(self, version_id: int) -> AdapterCost:
        """What the adapter adds to a step."""
        return self._instance.store.cost(version_id)

    def set_handoff(self, handoff: HandoffConfig) -> None:
        """How the sources of cold layers are chosen from now on."""
        self._instance.set_handoff(handoff)

    def set_link(self, bytes_per_second: float | None) -> None:
        """The bandwidth to which the link to the device is throttled from now on; None: not at all."""
        self._instance.store.link.throttle(bytes_per_second)

    def wait_until_settled(self, count: int, limit_seconds: float) -> None:
        """Wait until nothing of the start goes on: the host store is whole, and so many CPU workers are ready.

        Raises BenchmarkError where the workers are not ready in time, MemoryError where the store never will be.
        """
        self._instance.wait_for_host_store()
        if not self._instance.workers.wait_ready(count, limit_seconds):
            raise BenchmarkError(f"{count} CPU workers are not ready after {limit_seconds:.0f} seconds")

    def submit(
        self,
        prompt: Sequence[int],
        version_id: int | None,
        *,
        max_tokens: int,
        arrival_seconds: float | None = None,
    ) -> int:
        """Queue a request that arrived then, by the monotonic clock (None: now); its number."""
        self._last_number += 1
        self._running.add(self._last_number)
        self._engine.submit(
            Submit(
                number=self._last_number,
                prompt_token_ids=list(prompt),
                max_tokens=max_tokens,
                arrival_seconds=time.monotonic() if arrival_seconds is None else arrival_seconds,
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
            until = requests[place].arrival_seconds - now if place < len(requests) else math.inf
            output = self.step(max(until, 0.0))
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

    def run_to_ends(self, numbers: Sequence[int]) -> list[Timing]:
        """Step until each of these requests, which have not ended, has ended; their timings. Raises BenchmarkError."""
        timings: dict[int, Timing] = {}
        while not timings.keys() >= set(numbers):
            timings.update({finished.number: finished.timing for finished in self._step().finished})
        return [timings[number] for number in numbers]

    def step(self, most_wait_seconds: float = _IDLE_MILLISECONDS / 1e3) -> StepOutput:
        """One step and, where nothing can go on, a wait for what comes from outside, to whole milliseconds and not more
        than so long. Raises BenchmarkError."""
        return self._step(int(min(_IDLE_MILLISECONDS, 1e3 * most_wait_seconds)))

    def unused(self, version_ids: Iterable[int]) -> set[int]:
        """Those that no request uses."""
        return {version_id for version_id in version_ids if not self._instance.store.users(version_id)}

    def evict_unused(self, version_ids: Iterable[int]) -> set[int]:
        """Take those that no request uses from the device, and leave them in host memory; which they are."""
        unused = self.unused(version_ids)
        for version_id in unused:
            self._instance.store.evict_device(version_id)
        return unused

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

    def _step(self, idle_milliseconds: int = _IDLE_MILLISECONDS) -> StepOutput:
        """One step; a wait for what comes from outside when nothing can go on."""
        start_seconds, start_cpu_seconds = time.perf_counter(), time.thread_time()
        output, failures = self._engine.step()
        self.step_seconds += time.perf_counter() - start_seconds
        self.step_cpu_seconds += time.thread_time() - start_cpu_seconds
        if failures:
            raise BenchmarkError(f"an adapter cannot be served: {failures[0].message}")
        self._check(output)
        if self._engine.must_look_again or not self._engine.can_go_on:
            wait_for_work(self._instance, self._poller, idle_milliseconds)
        return output

    def _check(self, output: StepOutput) -> None:
        if output.failed:
            raise BenchmarkError(f"a request failed: {output.failed[0].message}")
        self._running -= {finished.number for finished in output.finished}

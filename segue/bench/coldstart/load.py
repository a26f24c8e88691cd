"""``segue bench coldload``: a load in which every request needs an adapter of its own, on a warm and on a cold server.

After CaraServe's table (Li et al., arXiv:2401.11240, section 7.2): requests arrive by chance, each for another adapter.
The warm server has all of them on the device. The cold one has them in host memory only, and takes each from the device
when its request has ended.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence

import numpy as np

from segue.bench.coldstart.config import away_from
from segue.bench.coldstart.load_config import MOST_TOKENS, LoadConfig, with_room_for_all
from segue.bench.coldstart.load_view import Served, Server, report_rows
from segue.bench.coldstart.points import Mode
from segue.bench.driver import BenchmarkError, EngineDriver
from segue.bench.prepare import written
from segue.bench.report import Report
from segue.bench.simulate.workload import SimulatedRequest
from segue.types import Tier

_READY_SECONDS = 120.0
_WARM_UP_REQUESTS = 24


def run_load_bench(config: LoadConfig, progress: Callable[[str], None]) -> Report:
    """Serve the load on both servers; ``progress`` is told in one line what is done next.

    Raises ConfigError, ModelError or OSError for a model that cannot be measured, and BenchmarkError.
    """
    with written(
        shape=config.shape,
        model_dir=config.model_dir,
        dtype=config.dtype,
        mixes=[config.mix],
        max_rank=config.rank,
        request_tokens=2 * MOST_TOKENS,
        progress=progress,
        longest="shape",
    ) as found:
        progress("starting the engine")
        engine = with_room_for_all(config, found)
        with away_from(engine.cpu_cores), EngineDriver(engine, found.catalog) as driver:
            driver.wait_until_settled(config.cpu_workers, _READY_SECONDS)
            progress(f"reading {len(found.names)} adapters")
            stage = LoadStage(
                driver, [driver.open(name) for name in found.names], found.model.vocab_size, config.requests_per_second
            )
            served = _serve_rounds(config, stage, progress)
    settings = {item.name: getattr(config, item.name) for item in dataclasses.fields(config)}
    return Report.here("coldload", settings, report_rows(config, served))


class LoadStage:
    """Serves requests on one engine as either server. ``versions`` are asked for in turn."""

    def __init__(
        self, driver: EngineDriver, versions: Sequence[int], vocab_size: int, requests_per_second: float
    ) -> None:
        self._driver = driver
        self._versions = versions
        self._vocab_size = vocab_size
        self._rate = requests_per_second
        self._turn = 0
        driver.set_handoff(Mode.PLANNER.handoff(0))

    def serve(self, server: Server, requests: Sequence[SimulatedRequest], seed: int) -> list[Served]:
        """In the order of the requests, which arrive from now on. Raises BenchmarkError where an adapter is in use, or
        not where this server should have it, when its request arrives."""
        tier = Tier.DEVICE if server is Server.WARM else Tier.HOST
        self._driver.move(self._versions, tier)
        random = np.random.default_rng(seed)
        prompts = [random.integers(self._vocab_size, size=item.prompt_tokens).tolist() for item in requests]
        first_gap = requests[0].arrival
        start_seconds = time.monotonic()
        waiting = deque(
            (start_seconds + (item.arrival - first_gap) / self._rate, index) for index, item in enumerate(requests)
        )
        indices: dict[int, int] = {}
        served: dict[int, Served] = {}
        used: set[int] = set()
        while len(served) < len(requests):
            while waiting and waiting[0][0] <= time.monotonic():
                arrival_seconds, index = waiting.popleft()
                version = self._next_version(tier, used)
                number = self._driver.submit(
                    prompts[index],
                    version,
                    max_tokens=requests[index].output_tokens,
                    arrival_seconds=arrival_seconds,
                )
                indices[number] = index
                used.add(version)
            wait_seconds = waiting[0][0] - time.monotonic() if waiting else 1.0
            for finished in self._driver.step(max(0.0, wait_seconds)).finished:
                served[indices[finished.number]] = Served.of(finished.timing, finished.completion_tokens)
            used -= self._driver.unused(used) if server is Server.WARM else self._driver.evict_unused(used)
        return [served[index] for index in range(len(requests))]

    def _next_version(self, tier: Tier, used: Collection[int]) -> int:
        version = self._versions[self._turn % len(self._versions)]
        self._turn += 1
        found = self._driver.tier(version)
        if found is not tier:
            raise BenchmarkError(f"an adapter was at {found.value} before its request, not at {tier.value}")
        if version in used:
            raise BenchmarkError(f"contents: with {len(self._versions)} an adapter is asked for while it is in use")
        return version


def _serve_rounds(config: LoadConfig, stage: LoadStage, progress: Callable[[str], None]) -> dict[Server, list[Served]]:
    """Each server's requests of all rounds, after a short load that is not kept."""
    served: dict[Server, list[Served]] = {server: [] for server in Server}
    warm_up = config.drawn(min(_WARM_UP_REQUESTS, config.requests), config.seed + 1)
    for server in Server:
        progress(f"warming up the {server} server")
        stage.serve(server, warm_up, config.seed)
    requests = config.drawn(config.requests, config.seed)
    for part in range(config.rounds):
        own = requests[part * len(requests) // config.rounds : (part + 1) * len(requests) // config.rounds]
        # Who begins changes, so that neither has all the time that the other has warmed the machine up.
        for server in list(Server) if part % 2 == 0 else list(reversed(Server)):
            progress(f"round {part + 1} of {config.rounds}: {len(own)} requests at the {server} server")
            served[server] += stage.serve(server, own, config.seed + part)
    return served

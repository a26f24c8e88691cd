"""The load of ``segue bench coldload``, and the engine that has room for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from segue.bench.cases import Mix
from segue.bench.coldstart.config import worker_cores
from segue.bench.engine_config import engine_config, with_room
from segue.bench.prepare import Written, require_device, require_model
from segue.bench.random_checkpoints import Targets
from segue.bench.simulate.config import WorkloadConfig
from segue.bench.simulate.workload import SimulatedRequest, draw_requests
from segue.config import require, require_positive
from segue.engine.config import EngineConfig
from segue.scheduler.plan import pages_for

# Of Alpaca's instructions and answers (Kwon et al., "PagedAttention", SOSP 2023, figure 11). Their spread is a choice.
_PROMPT_MEAN, _PROMPT_SIGMA = 19.31, 0.6
_OUTPUT_MEAN, _OUTPUT_SIGMA = 58.45, 0.8
MOST_TOKENS = 1024
"""Of a prompt, and of an answer; longer ones are cut."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadConfig:
    """``requests_per_second`` arrive for ``seconds`` at each server, the same at both, in ``rounds`` parts that the
    servers serve in turn. Adapters are ``contents`` of one rank, used in turn: none is asked for again before all
    others were. ``seed`` is of arrivals, lengths and prompts."""

    shape: str | None = None
    model_dir: str | None = None
    dtype: str = "float32"
    device: str = "cpu"
    rank: int = 64
    targets: Targets = Targets.QKVO
    contents: int = 256
    requests_per_second: float = 9.0
    seconds: float = 300.0
    rounds: int = 2
    max_running: int = 64
    cpu_workers: int = 1
    torch_threads: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        require_model(self.shape, self.model_dir)
        require_positive(
            self, "rank", "contents", "requests_per_second", "seconds", "rounds", "max_running", "cpu_workers"
        )
        requests = self.requests
        require(requests >= self.rounds, "seconds", f"bring {requests} requests, fewer than there are rounds")
        self.engine_config(Path(self.model_dir or "."))
        require_device(self.device)

    @property
    def requests(self) -> int:
        """Requests at each server."""
        return round(self.requests_per_second * self.seconds)

    @property
    def mix(self) -> Mix:
        return Mix(self.contents, (self.rank,), self.targets)

    def drawn(self, count: int, seed: int) -> Sequence[SimulatedRequest]:
        """So many requests; their adapters are not of interest."""
        workload = WorkloadConfig(
            requests=count,
            prompt_mean=_PROMPT_MEAN,
            prompt_sigma=_PROMPT_SIGMA,
            output_mean=_OUTPUT_MEAN,
            output_sigma=_OUTPUT_SIGMA,
            seed=seed,
        )
        return [
            dataclasses.replace(
                item,
                prompt_tokens=min(item.prompt_tokens, MOST_TOKENS),
                output_tokens=min(item.output_tokens, MOST_TOKENS),
            )
            for item in draw_requests(workload)
        ]

    def engine_config(self, model_dir: Path) -> EngineConfig:
        """As a server's, without pages and host bytes. Raises ConfigError."""
        return dataclasses.replace(
            engine_config(
                self, model_dir, max_running=self.max_running, max_lora_rank=self.rank, cpu_workers=self.cpu_workers
            ),
            max_context_tokens=2 * MOST_TOKENS,
            cpu_cores=worker_cores(self.cpu_workers),
        )


def with_room_for_all(config: LoadConfig, found: Written) -> EngineConfig:
    """An engine whose pool and whose host store hold all adapters, and the pool the longest requests."""
    engine = config.engine_config(found.model_dir)
    sizes = found.sizes(engine.page_tokens).values()
    kv_pages = pages_for(2 * MOST_TOKENS, engine.page_tokens) + 1
    pages = sum(size.pages for size in sizes) + config.max_running * kv_pages + 1
    host_bytes = sum(size.weight_bytes for size in sizes)
    return with_room(engine, pages=pages, host_bytes=host_bytes * 17 // 16)

"""A real engine in the test's own process: real store threads and CPU worker processes, no sockets, no front end."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

from segue.engine.config import EngineConfig
from segue.engine.instance import EngineInstance
from segue.engine.lora.catalog import AdapterCatalog, OpenedVersion
from segue.engine.messages import Failed, Finished, Submit
from segue.engine.models.config import ModelConfig
from segue.engine.sampling_params import SamplingParams
from segue.types import TokenLogprob


@dataclass
class Answer:
    """What one request has brought so far."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finished: Finished | None = None
    failed: Failed | None = None

    @property
    def ended(self) -> bool:
        return self.finished is not None or self.failed is not None


class EngineHarness:
    """Runs an engine step by step, with every invariant checked after every step and freed pages poisoned."""

    def __init__(self, model_dir: Path, adapters_dir: Path, **config: Any) -> None:
        """``config`` has fields of EngineConfig, and may have the engine's CostProfile as ``profile``."""
        profile = config.pop("profile", None)
        settings = {
            "model_dir": str(model_dir),
            "pages": 512,
            "host_store_bytes": 16 << 20,
            "poison_freed_pages": True,
            "record_ahead": False,
            "check_invariants": True,
        }
        self.config = EngineConfig(**{**settings, **config})
        self.catalog = AdapterCatalog(adapters_dir, ModelConfig.load(model_dir), self.config.max_lora_rank)
        self.instance = EngineInstance(self.config, profile=profile)
        self.engine = self.instance.engine
        self.answers: dict[int, Answer] = {}
        self.version_failures: dict[int, str] = {}
        self._opened: dict[int, OpenedVersion] = {}

    def __enter__(self) -> Self:
        if self.config.cpu_workers:
            assert self.instance.workers.wait_ready(self.config.cpu_workers, timeout_seconds=120)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.instance.close()
        for opened in self._opened.values():
            opened.close()

    def open(self, name: str, *, pinned: bool = False) -> int:
        """The version id of an adapter folder's present content, known to the engine."""
        opened = self.catalog.lookup(name)
        version_id = opened.manifest.version_id
        if opened.fileno is not None:
            self.engine.open_version(opened.manifest, os.dup(opened.fileno), pinned=pinned)
            opened.handed_over()
        if version_id in self._opened:
            opened.close()
        else:
            self._opened[version_id] = opened
        return version_id

    def release_unused(self) -> None:
        """As the front end does: versions without requests are not held, and those that were replaced are closed."""
        used = {request.version_id for request in self.engine.requests}
        for version_id in self._opened.keys() - used:
            self._opened.pop(version_id).close()
        for version_id in self.catalog.take_retired():
            self.engine.versions.close(version_id)

    def submit(
        self,
        prompt: Iterable[int],
        adapter: str | None = None,
        *,
        max_tokens: int = 64,
        level: Mapping[str, Any] = MappingProxyType({}),
        **sampling: Any,
    ) -> int:
        """Greedy with seed 0 unless ``sampling``, fields of SamplingParams, says otherwise; ``level`` has the fields of
        Submit that say what it is promised."""
        version_id = None if adapter is None else self.open(adapter)
        number = len(self.answers) + 1
        self.answers[number] = Answer()
        self.engine.submit(
            Submit(
                number=number,
                prompt_token_ids=list(prompt),
                max_tokens=max_tokens,
                arrival_seconds=time.monotonic(),
                adapter_version_id=version_id,
                sampling=SamplingParams(**{"seed": 0, **sampling}),
                **level,
            )
        )
        return number

    def step(self) -> None:
        """One step; a short sleep when nothing can go on."""
        output, failures = self.engine.step()
        for new in output.tokens:
            self.answers[new.number].tokens.extend(new.token_ids)
            self.answers[new.number].logprobs.extend(new.logprobs)
        for finished in output.finished:
            assert not self.answers[finished.number].ended
            self.answers[finished.number].finished = finished
        for failed in output.failed:
            assert not self.answers[failed.number].ended
            self.answers[failed.number].failed = failed
        for failure in failures:
            self.version_failures[failure.version_id] = failure.message
            if failure.may_pass:
                self.catalog.reopen(failure.version_id)
        if self.engine.must_look_again:
            time.sleep(50e-6)
        elif not self.engine.can_go_on:
            time.sleep(0.0005)

    def run_until(self, condition: Callable[[], bool], timeout_seconds: float = 60.0) -> None:
        """Step until the condition holds."""
        deadline = time.monotonic() + timeout_seconds
        while not condition():
            assert time.monotonic() < deadline, "the engine did not get there in time"
            self.step()

    def run(self, timeout_seconds: float = 60.0) -> None:
        """Step until every request has ended."""
        self.run_until(lambda: all(answer.ended for answer in self.answers.values()), timeout_seconds)

    def warm(self, adapter: str) -> None:
        """Bring an adapter to the device."""
        version_id = self.open(adapter)
        self.engine.versions.preload(version_id)
        self.run_until(lambda: self.instance.store.is_landed(version_id))

    def bring_to_host(self, adapters: Iterable[str]) -> None:
        """Have adapters, which no request uses, in host memory and not on the device."""
        for adapter in adapters:
            self.warm(adapter)
            version_id = self.open(adapter)
            self.run_until(lambda: self.instance.store.is_verified(version_id))  # noqa: B023
            self.instance.store.evict_device(version_id)

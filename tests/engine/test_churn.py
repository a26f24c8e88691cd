"""Random churn of adapters: requests, cancels, evictions, loads, unloads, replaced folders and workers that die.

Every invariant is checked after every step. At the end everything is closed, and then every page, every byte of the
host store and every descriptor is free again, and answers are those of PEFT for the content that they were asked of.

SEGUE_CHURN_SECONDS and SEGUE_CHURN_SEED take the place of each variant's own time and seed.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from segue.engine.lora.checkpoint import WEIGHTS_FILE
from segue.errors import AdapterNotFoundError, AdapterRejectedError
from segue.types import FinishReason, LoraSource
from tests.checkpoints import (
    ALL_TARGETS,
    ATTENTION_TARGETS,
    TinyModel,
    load_reference,
    reference_greedy,
    write_random_adapter,
    write_random_model,
)
from tests.descriptors import open_descriptors
from tests.engine.harness import EngineHarness

SHAPE = TinyModel(layers=3, head_dim=64)
CONTENTS = {
    f"rank {rank} on {len(targets)}": (rank, targets)
    for rank in (1, 3, 8, 24, 64)
    for targets in (("q_proj", "v_proj"), ATTENTION_TARGETS, ALL_TARGETS)
}
BROKEN = "with NaN in its last layer"
NAMES = tuple(f"adapter-{number}" for number in range(24))
LIVE_REQUESTS = 24
# Room for few of the adapters beside the KV of those that run, on the device and in host memory.
PAGES = 110
HOST_BYTES = 2 << 20
SECONDS_BETWEEN_DEATHS = (0.5, 2.0)
ANSWERS_TO_CHECK = 40


@dataclass(frozen=True)
class Asked:
    """A request that ran: its content is None for the base model."""

    content: str | None
    prompt: tuple[int, ...]
    is_greedy: bool


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, dtype: torch.dtype) -> tuple[Path, Path]:
    """A model, and contents that folders of adapters may have."""
    root = tmp_path_factory.mktemp("churn")
    model_dir = write_random_model(root / "model", SHAPE, seed=8, dtype=dtype)
    for seed, (name, (rank, targets)) in enumerate(CONTENTS.items()):
        write_random_adapter(root / "contents" / name, model_dir, rank=rank, targets=targets, dtype=dtype, seed=seed)
    shutil.copytree(root / "contents" / next(reversed(CONTENTS)), root / "contents" / BROKEN)
    weights = root / "contents" / BROKEN / WEIGHTS_FILE
    tensors = load_file(weights)
    tensors[max(name for name in tensors if "layers.2" in name)][0, 0] = torch.nan
    save_file(tensors, weights)
    return model_dir, root / "contents"


class Churn:
    """Does what clients and operators might do, in random order, and knows what must come of it."""

    def __init__(self, harness: EngineHarness, contents_dir: Path, adapters_dir: Path, seed: int) -> None:
        self.harness = harness
        self.contents_dir = contents_dir
        self.adapters_dir = adapters_dir
        self.random = random.Random(seed)
        self.content: dict[str, str] = {}
        self.unloaded: set[str] = set()
        self.rejected: set[int] = set()
        self.live: set[int] = set()
        self.asked: dict[int, Asked] = {}
        self.done: Counter[str] = Counter()
        self.beginnings = [[self.token() for _ in range(40)] for _ in range(4)]
        self.next_death = time.monotonic()
        for name in NAMES:
            self.publish(name)

    def token(self) -> int:
        return self.random.randrange(3, SHAPE.vocab_size)

    def publish(self, name: str) -> None:
        """A finished folder takes the place of the one of that name."""
        content = BROKEN if self.random.random() < 0.04 else self.random.choice(list(CONTENTS))
        fresh, old = self.adapters_dir / f".{name}.new", self.adapters_dir / f".{name}.old"
        shutil.copytree(self.contents_dir / content, fresh)
        if name in self.content:
            (self.adapters_dir / name).rename(old)
        fresh.rename(self.adapters_dir / name)
        if old.exists():
            shutil.rmtree(old)
        self.content[name] = content

    def run(self, seconds: float) -> None:
        """Do things and step. Every request that should be taken is."""
        actions: list[Callable[[], bool]] = [self.submit] * 12 + [self.cancel] * 2 + [self.evict] * 2
        actions += [self.preload, self.unload, self.load, self.load, self.replace]
        end_seconds = time.monotonic() + seconds
        while time.monotonic() < end_seconds:
            for _ in range(self.random.randrange(3)):
                action = self.random.choice(actions)
                self.done[action.__name__] += action()
            if time.monotonic() > self.next_death:
                self.next_death = time.monotonic() + self.random.uniform(*SECONDS_BETWEEN_DEATHS)
                self.strike_worker()
            self.step()

    def step(self) -> None:
        self.harness.step()
        self.live = {number for number in self.live if not self.harness.answers[number].ended}
        for version_id in self.harness.version_failures.keys() - self.rejected:
            self.rejected.add(version_id)
            self.harness.catalog.reject(version_id, self.harness.version_failures[version_id])
        self.harness.release_unused()

    def some_name(self) -> str:
        """A few are asked for much more often than the others."""
        return NAMES[min(int(self.random.expovariate(0.2)), len(NAMES) - 1)]

    def submit(self) -> bool:
        if len(self.live) >= LIVE_REQUESTS:
            return False
        name = None if self.random.random() < 0.2 else self.some_name()
        prompt = self.random.choice(self.beginnings)[: self.random.choice((0, 16, 33))]
        prompt = [*prompt, *(self.token() for _ in range(self.random.randint(1, 20)))]
        is_greedy = self.random.random() < 0.7
        try:
            number = self.harness.submit(
                prompt, name, max_tokens=self.random.randint(1, 24), temperature=0.0 if is_greedy else 1.0
            )
        except AdapterNotFoundError:
            assert name in self.unloaded
            return False
        except AdapterRejectedError:
            assert name is not None
            assert self.content[name] == BROKEN
            self.done["refused"] += 1
            return False
        assert name not in self.unloaded
        self.live.add(number)
        self.asked[number] = Asked(None if name is None else self.content[name], tuple(prompt), is_greedy)
        return True

    def cancel(self) -> bool:
        if not self.live:
            return False
        self.harness.engine.cancel(self.random.choice(sorted(self.live)))
        return True

    def evict(self) -> bool:
        return self.with_version(self.harness.engine.versions.evict)

    def preload(self) -> bool:
        return self.with_version(self.harness.engine.versions.preload)

    def with_version(self, act: Callable[[int], None]) -> bool:
        name = self.some_name()
        if name in self.unloaded or self.content[name] == BROKEN:
            return False
        act(self.harness.open(name))
        return True

    def unload(self) -> bool:
        loaded = [name for name in NAMES if name not in self.unloaded]
        if len(loaded) < len(NAMES) // 2:
            return False
        name = self.random.choice(loaded)
        self.harness.catalog.unload(name)
        self.unloaded.add(name)
        return True

    def load(self) -> bool:
        name = self.random.choice(sorted(self.unloaded)) if self.unloaded else None
        if name is None:
            return False
        with self.harness.catalog.load(name):
            self.unloaded.discard(name)
        return True

    def replace(self) -> bool:
        self.publish(self.some_name())
        return True

    def strike_worker(self) -> None:
        """One dies, or stands still until the watchdog kills it."""
        pids = self.harness.instance.workers.worker_pids
        if pids:
            how = self.random.choice((signal.SIGKILL, signal.SIGSTOP))
            with suppress(ProcessLookupError):
                os.kill(self.random.choice(pids), how)
                self.done[how.name] += 1

    def close(self) -> None:
        """Let every request end, unload every adapter and give up idle prefixes."""
        harness = self.harness
        deadline_seconds = time.monotonic() + 120
        while self.live or harness.engine.passes or harness.instance.bridge.orphans:
            assert time.monotonic() < deadline_seconds, f"{len(self.live)} requests do not end"
            self.step()
        for name in set(NAMES) - self.unloaded:
            harness.catalog.unload(name)
        self.unloaded = set(NAMES)
        harness.run_until(self.is_empty)
        assert harness.instance.workers.wait_ready(harness.config.cpu_workers, timeout_seconds=30)
        harness.engine.check()

    def is_empty(self) -> bool:
        harness = self.harness
        harness.release_unused()
        harness.engine.kv.reclaim(harness.engine.kv.idle_pages)
        state = harness.instance.state(0)
        return not state.versions and state.free_pages == PAGES and state.host_free_bytes == HOST_BYTES


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("device", "seconds"),
    [("cpu", 5.0), pytest.param("cuda", 150.0, marks=[pytest.mark.gpu, pytest.mark.slow])],
)
def test_everything_is_accounted_for(
    folders: tuple[Path, Path], dtype: torch.dtype, device: str, seconds: float, tmp_path: Path
) -> None:
    """On CUDA five minutes in all: in float32, and in bfloat16 through FlashInfer and graphs."""
    seconds = float(os.environ.get("SEGUE_CHURN_SECONDS", seconds))
    seed = int(os.environ.get("SEGUE_CHURN_SEED", "1"))
    model_dir, contents_dir = folders
    (tmp_path / "adapters").mkdir()
    settings = {
        "device": device,
        "dtype": str(dtype).removeprefix("torch."),
        "pages": PAGES,
        "host_store_bytes": HOST_BYTES,
        "max_running": 16,
        "max_lora_rank": 64,
        "budget_tokens": 64,
        "chunk_tokens": 16,
        "copy_bytes_per_second": 20e6,
        "cpu_stall_seconds": 0.3,
    }
    with EngineHarness(model_dir, tmp_path / "adapters", **settings) as harness:
        churn = Churn(harness, contents_dir, tmp_path / "adapters", seed)
        # What a device and the libraries open when they are first used, stays open.
        churn.run(0.1 * seconds)
        churn.close()
        descriptors = open_descriptors()
        while churn.unloaded:
            churn.load()
        churn.run(0.9 * seconds)
        churn.close()
        assert open_descriptors() == descriptors
        check_answers(churn, model_dir, contents_dir, exact=dtype is torch.float32)
    print(f"{harness.engine.steps} steps, {len(churn.asked)} requests, {dict(churn.done)}")  # noqa: T201
    assert all(churn.done[name] for name in ("submit", "cancel", "evict", "preload", "unload", "load", "replace"))
    assert churn.done["SIGKILL"] + churn.done["SIGSTOP"] > 0


def check_answers(churn: Churn, model_dir: Path, contents_dir: Path, *, exact: bool) -> None:
    """All ended as they should, and where the dtype allows it, some are compared with PEFT's."""
    sources: set[LoraSource] = set()
    whole: list[int] = []
    for number, asked in churn.asked.items():
        answer = churn.harness.answers[number]
        if answer.failed is not None:
            assert asked.content == BROKEN, answer.failed
            continue
        assert answer.finished is not None
        assert asked.content != BROKEN or answer.finished.reason is FinishReason.CANCELLED
        sources |= {layer.source for layer in answer.finished.timing.layers}
        if asked.is_greedy and answer.finished.reason is FinishReason.LENGTH:
            whole.append(number)
    assert sources >= {LoraSource.CPU, LoraSource.DEVICE}
    assert whole
    for number in churn.random.sample(whole, min(ANSWERS_TO_CHECK, len(whole)) if exact else 0):
        asked = churn.asked[number]
        tokens = churn.harness.answers[number].tokens
        reference = load_reference(model_dir, None if asked.content is None else contents_dir / asked.content)
        assert tuple(tokens) == reference_greedy(reference, asked.prompt, len(tokens)), asked

"""Time to a first token with the adapter on the device and with the adapter in host memory alone, turn about.

    python scripts/cold_first_tokens.py --shape llama-3.1-8b --dtype bfloat16 --device cuda

Each repeat asks once warm and once cold for each prompt length, in an engine of this process without its front end.
``--burst N`` asks for N distinct adapters at once besides, each with a prompt of ``--burst-prompt`` tokens; their warm
run is one batch. ``--graphs 0`` runs passes operation by operation, for comparison.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Sequence

import numpy as np

from segue.bench.cases import Case, Measure, Mix
from segue.bench.driver import EngineDriver
from segue.bench.engine import EngineBenchConfig, prepared
from segue.bench.random_checkpoints import Targets
from segue.engine.config import HandoffConfig

WARM_UP_RUNS = 3


class FirstTokens:
    """Asks for first tokens of adapters that are on the device, or are taken from it before."""

    def __init__(self, driver: EngineDriver, vocab_size: int) -> None:
        self._driver = driver
        self._vocab_size = vocab_size
        self._random = np.random.default_rng(0)

    def milliseconds(self, versions: Sequence[int], prompt: int, *, cold: bool) -> float:
        """From the submission of one request for each version to the first token, on average over the requests."""
        store = self._driver._instance.store
        if cold:
            for version_id in versions:
                store.evict_device(version_id)
            self._driver._step_until(lambda: store.device_pages_held == self._pages_besides(versions))
        prompts = [self._random.integers(self._vocab_size, size=prompt).tolist() for _ in versions]
        start_seconds = time.perf_counter()
        numbers = [
            self._driver.submit(tokens, version_id, max_tokens=1)
            for tokens, version_id in zip(prompts, versions, strict=True)
        ]
        seconds: dict[int, float] = {}
        while len(seconds) < len(numbers):
            output = self._driver._step()
            now = time.perf_counter()
            seconds.update({new.number: now - start_seconds for new in output.tokens})
        self._driver._step_until(lambda: all(store.is_landed(version_id) for version_id in versions))
        return 1e3 * statistics.fmean(seconds.values())

    def _pages_besides(self, versions: Sequence[int]) -> int:
        store = self._driver._instance.store
        others = {item.version_id for item in store.evictable()} - {*versions}
        return sum(store.device_pages(version_id) for version_id in others)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="tiny")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--targets", choices=[str(item) for item in Targets], default=str(Targets("qkvo")))
    parser.add_argument("--prompts", type=int, nargs="+", default=[16, 128, 512])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--burst", type=int, default=0)
    parser.add_argument("--burst-prompt", type=int, default=32)
    parser.add_argument("--handoff", default="stream")
    parser.add_argument("--cpu-workers", type=int, default=0)
    parser.add_argument("--merged-rows", type=int)
    parser.add_argument("--graphs", type=int, choices=(0, 1), default=1)
    args = parser.parse_args()
    mix = Mix(max(1, args.burst), (args.rank,), Targets(args.targets))
    cases = [
        Case(Measure.FIRST_TOKEN, max(1, args.burst), mix, prompt) for prompt in (*args.prompts, args.burst_prompt)
    ]
    config = EngineBenchConfig(cases=tuple(cases), shape=args.shape, dtype=args.dtype, device=args.device)
    with prepared(config, print) as ready:
        engine = dataclasses.replace(
            ready.engine,
            handoff=HandoffConfig(mode=args.handoff),
            cpu_workers=args.cpu_workers,
            cpu_slots=16 if args.cpu_workers else 1,
            merged_rows=args.merged_rows,
        )
        with EngineDriver(engine, ready.catalog) as driver:
            if not args.graphs:
                driver._engine._runner._passes = None
            versions = [driver.load(name) for name in ready.names]
            bench = FirstTokens(driver, ready.model.vocab_size)
            runs = {f"prompt {prompt}": (versions[:1], prompt) for prompt in args.prompts}
            if args.burst:
                runs[f"{args.burst} adapters, prompt {args.burst_prompt}"] = (versions, args.burst_prompt)
            timings: dict[tuple[str, bool], list[float]] = {}
            for repeat in range(-WARM_UP_RUNS, args.repeats):
                for name, (members, prompt) in runs.items():
                    for cold in (False, True):
                        milliseconds = bench.milliseconds(members, prompt, cold=cold)
                        if repeat >= 0:
                            timings.setdefault((name, cold), []).append(milliseconds)
    for name in runs:
        warm_ms, cold_ms = (statistics.median(timings[name, item]) for item in (False, True))
        ratio = cold_ms / warm_ms
        print(f"{name}: warm {warm_ms:.3f} ms, cold {cold_ms:.3f} ms, ratio {ratio:.3f} (medians of {args.repeats})")


if __name__ == "__main__":
    main()

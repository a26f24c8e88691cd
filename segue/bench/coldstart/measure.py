"""One measurement: requests arrive whose adapters are where they should be, and what that costs them and others."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from segue.bench.coldstart.config import DECODE_PROMPT, DECODE_TOKENS
from segue.bench.coldstart.points import Mode, Point
from segue.bench.driver import BenchmarkError, EngineDriver
from segue.types import LoraSource, Tier, Timing

_USUAL_STEPS = 12
_STEPS_AFTERWARDS = 3


class PointFailedError(Exception):
    """A measurement was not what it should have been: its figure would be wrong. The message is one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What one measurement gave: the mean time to the first token of those that arrived, the share of their layers
    that the CPU computed, and of the requests that decoded meanwhile the longest and the usual time between two
    tokens (None where none did)."""

    ttft_seconds: float
    cpu_share: float
    longest_step_seconds: float | None = None
    usual_step_seconds: float | None = None


class Stage:
    """Measures points on one engine. ``versions`` are the adapters by name, as are their ``weight_bytes``.

    ``read_bytes_per_second``: how fast the adapters of the point that was begun last came from disk to host memory.
    """

    def __init__(
        self,
        driver: EngineDriver,
        versions: Mapping[str, int],
        decode_names: Sequence[str],
        *,
        weight_bytes: Mapping[str, int],
        layers: int,
        vocab_size: int,
        seed: int,
    ) -> None:
        self._driver = driver
        self._versions = versions
        self._decode_versions = [versions[name] for name in decode_names]
        self._weight_bytes = weight_bytes
        self._layers = layers
        self._vocab_size = vocab_size
        self._random = np.random.default_rng(seed)
        self.read_bytes_per_second = 0.0

    def begin(self, point: Point) -> None:
        """Have the adapters of this point in host memory, those of other points on disk only, and the point's link.

        The link stays throttled between the measurements as well, so that the engine learns no other bandwidth.
        """
        own = {self._versions[name] for name in point.mix.adapter_names}
        keep = own | set(self._decode_versions)
        self._driver.set_link(None)
        self._driver.move([version for version in self._versions.values() if version not in keep], Tier.DISK)
        self._driver.move(self._decode_versions, Tier.DEVICE)
        self._driver.move(sorted(own), Tier.DISK)
        start_seconds = time.monotonic()
        self._driver.move(sorted(own), Tier.HOST)
        read_bytes = sum(self._weight_bytes[name] for name in point.mix.adapter_names)
        self.read_bytes_per_second = read_bytes / (time.monotonic() - start_seconds)
        self._driver.set_link(point.link_bytes_per_second)

    def measure(self, point: Point, mode: Mode) -> Sample:
        """Raises PointFailedError for a measurement that was not of this mode, and BenchmarkError."""
        versions = [self._versions[name] for name in point.mix.adapter_names]
        # What an earlier measurement left on its way lands first.
        tier = Tier.DEVICE if mode is Mode.WARM else point.tier
        if any(self._driver.tier(version) is not Tier.DISK for version in versions):
            self._driver.move(versions, Tier.DEVICE)
        self._driver.move(versions, tier)
        self._driver.set_handoff(mode.handoff(self._layers))
        prompts = [self._random.integers(self._vocab_size, size=point.prompt).tolist() for _ in versions]
        with self._decoding(point.decodes) as gaps:
            self._check_before(versions, tier)
            arrival_seconds = time.monotonic()
            numbers = [
                self._driver.submit(prompt, version, max_tokens=1, arrival_seconds=arrival_seconds)
                for prompt, version in zip(prompts, versions, strict=True)
            ]
            timings = self._driver.run_to_ends(numbers) if gaps is None else gaps.run_to_ends(numbers)
        _check_after(timings, mode, tier, self._layers)
        return Sample(
            ttft_seconds=statistics.fmean(timing.ttft_seconds for timing in timings),
            cpu_share=statistics.fmean(timing.cpu_layers / self._layers for timing in timings),
            longest_step_seconds=None if gaps is None else gaps.longest_seconds,
            usual_step_seconds=None if gaps is None else gaps.usual_seconds,
        )

    def _check_before(self, versions: Sequence[int], tier: Tier) -> None:
        for version in versions:
            found = self._driver.tier(version)
            if found is not tier:
                raise PointFailedError(f"an adapter was at {found.value} before its request, not at {tier.value}")

    @contextmanager
    def _decoding(self, count: int) -> Iterator[_Gaps | None]:
        """So many requests decode in the block, each with an adapter that is on the device."""
        if count == 0:
            yield None
            return
        numbers = [
            self._driver.submit(
                self._random.integers(self._vocab_size, size=DECODE_PROMPT).tolist(),
                self._decode_versions[index],
                max_tokens=DECODE_TOKENS,
            )
            for index in range(count)
        ]
        self._driver.run_to_first_tokens(numbers)
        gaps = _Gaps(self._driver, numbers)
        gaps.watch_usual(_USUAL_STEPS)
        yield gaps
        self._driver.cancel_all()


class _Gaps:
    """The times between two tokens of each of these requests, as they leave the engine."""

    def __init__(self, driver: EngineDriver, numbers: Sequence[int]) -> None:
        self._driver = driver
        self._last_seconds: dict[int, float] = {}
        self._watched = frozenset(numbers)
        self._gaps: list[float] = []
        self.usual_seconds = 0.0
        self.longest_seconds = 0.0

    def watch_usual(self, steps: int) -> None:
        """Step so many times, with nothing else to do: the median time between two tokens is the usual one."""
        for _ in range(steps):
            self._step()
        if not self._gaps:
            raise BenchmarkError("the requests that should decode do not")
        self.usual_seconds = statistics.median(self._gaps)

    def run_to_ends(self, numbers: Sequence[int]) -> list[Timing]:
        """Step until these newcomers have ended and a little longer; the longest time between two tokens meanwhile,
        the one that the arrival fell into among them. Raises BenchmarkError where a watched request ended."""
        self._gaps.clear()
        timings: dict[int, Timing] = {}
        while not timings.keys() >= set(numbers):
            timings.update(self._step())
        for _ in range(_STEPS_AFTERWARDS):
            self._step()
        if not self._gaps:
            raise BenchmarkError("no request decoded beside those that arrived")
        self.longest_seconds = max(self._gaps)
        return [timings[number] for number in numbers]

    def _step(self) -> dict[int, Timing]:
        output = self._driver.step()
        now = time.monotonic()
        for new in output.tokens:
            if new.number not in self._watched:
                continue
            if new.number in self._last_seconds:
                self._gaps.append(now - self._last_seconds[new.number])
            self._last_seconds[new.number] = now
        if any(finished.number in self._watched for finished in output.finished):
            raise BenchmarkError(f"a request that should decode all along ended after {DECODE_TOKENS} tokens")
        return {finished.number: finished.timing for finished in output.finished}


def _check_after(timings: Sequence[Timing], mode: Mode, tier: Tier, layers: int) -> None:
    """The requests must have met their adapters where those should be, and taken the mode's way.

    A disk read that begins with the request may be over by the time that it is admitted. Of requests that arrive
    together, one may be admitted when its adapter has landed; the first never is. Raises PointFailedError.
    """
    allowed = {tier, Tier.HOST} if tier is Tier.DISK else {tier}
    for timing in timings:
        if timing.tier not in allowed:
            raise PointFailedError(f"{mode}: a request met its adapter at {timing.tier.value}, not at {tier.value}")
        if timing.prefill_attempts != 1:
            raise PointFailedError(f"{mode}: a prefill took {timing.prefill_attempts} attempts")
        helped = any(layer.source is LoraSource.CPU for layer in timing.layers)
        if helped and mode not in (Mode.CPU, Mode.PLANNER):
            raise PointFailedError(f"{mode}: the CPU computed {timing.cpu_layers} layers")
    if mode is Mode.CPU and timings[0].cpu_layers != layers:
        raise PointFailedError(f"{mode}: the CPU computed {timings[0].cpu_layers} of {layers} layers")

"""``segue bench server``: many streams through gRPC that decode together, and how long the device waits meanwhile.

A real server, front end and engine in processes of their own, and clients in further ones. Once every stream decodes,
the engine is left alone for a while; what it says before and after, and what arrived between, is measured.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from segue.bench.cases import Case, Measure
from segue.bench.driver import BenchmarkError
from segue.bench.engine import EngineBenchConfig, Prepared, case_row, prepared
from segue.bench.report import Report
from segue.bench.server_state import POLL_SECONDS, server_state, wait_until_idle
from segue.bench.stream_client import ClientProcesses, StreamRecord, StreamRequest
from segue.config import require, require_positive
from segue.server.spawn import SpawnError, spawned_server
from segue.v1 import server_pb2

# What an engine does when streams have just come, is over.
_SETTLE_SECONDS = 0.2
_TOGETHER_SECONDS = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerBenchConfig:
    """Which engine serves which streams: ``engine`` says it, with decode cases alone. Its ``steps`` are the tokens that
    each stream asks for, its ``repeats`` the rounds; none begins later than its ``seconds`` after the server serves.

    ``window_seconds`` are measured in each round of a case, in which no stream may end. ``clients`` processes share the
    streams. ``start_seconds`` bound the server's start.
    """

    engine: EngineBenchConfig
    window_seconds: float = 2.0
    clients: int = 1
    start_seconds: float = 600.0

    def __post_init__(self) -> None:
        decodes = all(case.measure is Measure.DECODE_STEP for case in self.engine.cases)
        require(decodes, "cases", "must be decode steps")
        require_positive(self, "window_seconds", "clients", "start_seconds")


@dataclass(slots=True)
class _Values:
    """What the rounds of a case brought, by measure."""

    by_measure: dict[str, list[float]] = field(default_factory=dict)

    def add(self, measure: str, values: Sequence[float]) -> None:
        self.by_measure.setdefault(measure, []).extend(values)


def run_server_bench(config: ServerBenchConfig, progress: Callable[[str], None]) -> Report:
    """Measure; ``progress`` is told in one line what is done next.

    Raises ConfigError, ModelError or OSError for what cannot be measured, and BenchmarkError.
    """
    with prepared(config.engine, progress) as ready:
        if config.engine.shape is not None:
            write_tokenizer(Path(ready.engine.model_dir), ready.model.vocab_size)
        progress("starting the server")
        try:
            with spawned_server(_server_table(ready), start_seconds=config.start_seconds) as address:
                values = _measure_rounds(config, address, ready.model.vocab_size, progress)
        except SpawnError as error:
            raise BenchmarkError(str(error)) from error
    rows = [case_row(case, measure, found) for case in values for measure, found in values[case].by_measure.items()]
    return Report.here("server", _settings(config), rows)


def write_tokenizer(model_dir: Path, vocab_size: int) -> None:
    """A byte-level tokenizer.json in which every id has a text, so that answers cost what answers cost."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = [*sorted(alphabet), *(f"token{number}" for number in range(len(alphabet), vocab_size))]
    vocabulary = {text: number for number, text in enumerate(texts[:vocab_size])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(model_dir / "tokenizer.json"))


def _server_table(ready: Prepared) -> Mapping[str, object]:
    """Every adapter is on the device before the server serves, and stays there."""
    engine = dataclasses.replace(ready.engine, measure_device_time=True)
    return {
        "adapters_dir": str(ready.adapters_dir),
        "pinned_adapters": ready.names,
        "drain_seconds": 0.0,
        "engine": engine,
    }


def _settings(config: ServerBenchConfig) -> Mapping[str, object]:
    engine = {item.name: getattr(config.engine, item.name) for item in dataclasses.fields(config.engine)}
    del engine["cases"]
    own = {item.name: getattr(config, item.name) for item in dataclasses.fields(config)}
    del own["engine"]
    return {**engine, **own, "max_tokens": config.engine.max_tokens}


def _measure_rounds(
    config: ServerBenchConfig,
    address: str,
    vocab_size: int,
    progress: Callable[[str], None],
) -> dict[Case, _Values]:
    """A first round is not kept: graphs are recorded in it. Raises BenchmarkError."""
    deadline_seconds = time.monotonic() + config.engine.seconds
    values = {case: _Values() for case in config.engine.cases}
    bench = _ServerBench(config, address, vocab_size)
    for repeat in range(config.engine.repeats + 1):
        for number, case in enumerate(config.engine.cases, start=1):
            if time.monotonic() > deadline_seconds:
                if repeat <= 1:
                    limit = config.engine.seconds
                    raise BenchmarkError(f"seconds: {limit:g} were over before the first round that counts")
                return values
            name = f"round {repeat} of {config.engine.repeats}" if repeat else "warming up"
            progress(f"{name}, case {number} of {len(config.engine.cases)}")
            bench.round(case, values[case] if repeat else _Values())
    return values


@dataclass(frozen=True, slots=True, kw_only=True)
class _Window:
    """What the engine said at both ends of the measured time, and when by CLOCK_MONOTONIC."""

    before: server_pb2.DeviceTime
    after: server_pb2.DeviceTime
    begin_seconds: float
    end_seconds: float


class _ServerBench:
    """Measures single rounds of cases on a running server."""

    def __init__(self, config: ServerBenchConfig, address: str, vocab_size: int) -> None:
        self._config = config
        self._address = address
        self._vocab_size = vocab_size
        self._random = np.random.default_rng(0)

    def round(self, case: Case, values: _Values) -> None:
        """Measure one window. Raises BenchmarkError."""
        wait_until_idle(self._address)
        requests = [self._request(case, index) for index in range(case.batch)]
        clients = ClientProcesses(
            self._address, requests, max_tokens=self._config.engine.max_tokens, processes=self._config.clients
        )
        with clients:
            window = self._measure(case.batch, clients)
            records = clients.stop()
        failed = next((record.error for record in records if record.error is not None), None)
        if failed is not None:
            raise BenchmarkError(f"a stream failed: {failed}")
        if window is None:
            raise BenchmarkError(
                f"max_tokens: streams of {self._config.engine.max_tokens} tokens ended before "
                f"{self._config.window_seconds:g} s of all {case.batch} were measured"
            )
        values.add("decode_step_ms", [1e3 * step_seconds(window.before, window.after)])
        values.add("device_idle_fraction", [idle_fraction(window.before, window.after)])
        inside = [within(record, window.begin_seconds, window.end_seconds) for record in records]
        tokens = sum(count for own in inside for _, count in own)
        values.add("tokens_per_second", [tokens / (window.end_seconds - window.begin_seconds)])
        values.add("time_per_token_ms", [1e3 * gap for own in inside for gap in token_gaps(own)])

    def _measure(self, streams: int, clients: ClientProcesses) -> _Window | None:
        """Leave the server alone for a while once all streams decode; None if one of them ended before."""
        all_decode = server_pb2.Queue(decoding=streams)
        deadline_seconds = time.monotonic() + _TOGETHER_SECONDS
        while server_state(self._address).queue != all_decode:
            if clients.has_ended:
                return None
            if time.monotonic() > deadline_seconds:
                raise BenchmarkError(f"{streams} streams do not decode together after {_TOGETHER_SECONDS:g} s")
            time.sleep(POLL_SECONDS)
        time.sleep(_SETTLE_SECONDS)
        before, begin_seconds = server_state(self._address), time.monotonic()
        time.sleep(self._config.window_seconds)
        after, end_seconds = server_state(self._address), time.monotonic()
        if before.queue != all_decode or after.queue != all_decode:
            return None
        return _Window(
            before=before.device_time, after=after.device_time, begin_seconds=begin_seconds, end_seconds=end_seconds
        )

    def _request(self, case: Case, index: int) -> StreamRequest:
        names = case.mix.adapter_names
        prompt = self._random.integers(self._vocab_size, size=case.prompt).tolist()
        return StreamRequest(prompt=tuple(prompt), adapter=names[index % len(names)] if names else None)


def step_seconds(before: server_pb2.DeviceTime, after: server_pb2.DeviceTime) -> float:
    """The mean time from one batch's end to the next one's. Raises BenchmarkError where none has ended."""
    batches = after.batches - before.batches
    if not batches:
        raise BenchmarkError("no step has ended in the measured time")
    return (_seconds(after) - _seconds(before)) / batches


def idle_fraction(before: server_pb2.DeviceTime, after: server_pb2.DeviceTime) -> float:
    """The part of the time between two states that the device waited between batches, at most."""
    return (after.idle_seconds - before.idle_seconds) / (_seconds(after) - _seconds(before))


def within(record: StreamRecord, begin_seconds: float, end_seconds: float) -> list[tuple[float, int]]:
    """The chunks that arrived in the time."""
    return [(at, count) for at, count in record.arrivals if begin_seconds < at <= end_seconds]


def token_gaps(arrivals: Sequence[tuple[float, int]]) -> list[float]:
    """For each token but those of the first chunk: the seconds since the chunk before, shared by a chunk's tokens."""
    gaps: list[float] = []
    for (before, _), (at, count) in pairwise(arrivals):
        gaps += [(at - before) / count] * count
    return gaps


def _seconds(spent: server_pb2.DeviceTime) -> float:
    return spent.busy_seconds + spent.idle_seconds

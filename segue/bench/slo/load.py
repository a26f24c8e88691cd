"""Sends planned requests from several client processes and gathers what became of them."""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Self

from segue.bench.driver import BenchmarkError
from segue.bench.slo import load_client
from segue.bench.slo.config import ClientConfig, SendSlo
from segue.bench.slo.load_client import ClientPlan, ClientRecord, ClientRequest
from segue.bench.slo.trace import BLOCK_TOKENS
from segue.bench.slo.workload import PlannedRequest

_READY_SECONDS = 120.0
_STOP_SECONDS = 30.0
# So that every process knows the moment before it comes.
_LEAD_SECONDS = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadResult:
    """What the clients recorded: ``begin_seconds`` of CLOCK_MONOTONIC is when the run began, ``loop_lags_seconds`` how
    late the clients' event loops were each time they looked."""

    begin_seconds: float
    records: Mapping[int, ClientRecord]
    loop_lags_seconds: Sequence[float]


class LoadProcesses:
    """Client processes that share the requests. Use as a context; a failed process raises BenchmarkError."""

    def __init__(self, address: str, vocab_size: int, requests: Sequence[PlannedRequest], config: ClientConfig) -> None:
        """Start them; they make their prompts and connect."""
        self._lines: queue.SimpleQueue[Mapping[str, Any] | None] = queue.SimpleQueue()
        self._processes: list[subprocess.Popen[str]] = []
        self._readers: list[threading.Thread] = []
        count = max(1, min(config.processes, len(requests)))
        for place in range(count):
            plan = client_plan(address, vocab_size, requests[place::count], config)
            process = subprocess.Popen(
                [sys.executable, "-m", load_client.__name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            self._processes.append(process)
            reader = threading.Thread(target=self._read, args=(process, json.dumps(asdict(plan))), daemon=True)
            self._readers.append(reader)
            reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
        for reader in self._readers:
            reader.join()
        for process in self._processes:
            assert process.stdout is not None
            self._close(process)
            process.stdout.close()

    def run(
        self, seconds: float, on_record: Callable[[ClientRecord], None], on_begin: Callable[[float], None]
    ) -> LoadResult:
        """Send the requests, and stop ``seconds`` after the beginning what has not ended. ``on_record`` is told each
        record as it comes. Raises BenchmarkError."""
        for _ in self._processes:
            self._next(time.monotonic() + _READY_SECONDS, "is not ready")
        begin_seconds = time.monotonic() + _LEAD_SECONDS
        on_begin(begin_seconds)
        for process in self._processes:
            self._write(process, f"{begin_seconds!r}\n")
        records: dict[int, ClientRecord] = {}
        lags: list[float] = []
        summaries = 0
        stopping = False
        while summaries < len(self._processes):
            deadline = begin_seconds + seconds + (_STOP_SECONDS if stopping else 0.0)
            line = self._take(deadline)
            if line is None and not stopping:
                stopping = True
                for process in self._processes:
                    self._close(process)
            elif line is None:
                raise BenchmarkError(f"a client process does not end {_STOP_SECONDS:g} s after it was told to")
            elif "loop_lags_seconds" in line:
                summaries += 1
                lags += line["loop_lags_seconds"]
            else:
                record = ClientRecord(**line)
                records[record.number] = record
                on_record(record)
        return LoadResult(begin_seconds=begin_seconds, records=records, loop_lags_seconds=lags)

    def _read(self, process: subprocess.Popen[str], plan: str) -> None:
        """A thread of its own for each process: hands over the plan, which may be long, then its lines."""
        assert process.stdout is not None
        self._write(process, f"{plan}\n")
        for line in process.stdout:
            self._lines.put(json.loads(line))
        self._lines.put(None)

    def _take(self, deadline_seconds: float) -> Mapping[str, Any] | None:
        """The next line, None if none comes in time. Raises BenchmarkError for a process that has ended too early."""
        try:
            line = self._lines.get(timeout=max(0.0, deadline_seconds - time.monotonic()))
        except queue.Empty:
            return None
        if line is None:
            raise BenchmarkError("a client process has failed; its last words are above")
        return line

    def _next(self, deadline_seconds: float, problem: str) -> Mapping[str, Any]:
        line = self._take(deadline_seconds)
        if line is None:
            raise BenchmarkError(f"a client process {problem} after {_READY_SECONDS:g} s")
        return line

    @staticmethod
    def _write(process: subprocess.Popen[str], text: str) -> None:
        assert process.stdin is not None
        try:
            process.stdin.write(text)
            process.stdin.flush()
        except BrokenPipeError:
            # It has ended, which its reader tells.
            return

    @staticmethod
    def _close(process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        # What was not taken of a plan cannot be written any more.
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()


def client_plan(address: str, vocab_size: int, requests: Sequence[PlannedRequest], config: ClientConfig) -> ClientPlan:
    """What one process is told."""
    return ClientPlan(
        address=address,
        vocab_size=vocab_size,
        block_tokens=BLOCK_TOKENS,
        timeout_seconds=config.timeout_seconds,
        slo_fields=config.send_slo == SendSlo.FIELDS,
        slo_headers=config.send_slo == SendSlo.HEADERS,
        reject_on_miss=config.reject_on_miss,
        requests=tuple(
            ClientRequest(
                number=request.number,
                at_seconds=request.at_seconds,
                adapter=None if request.adapter is None else request.adapter.name,
                prompt_tokens=request.prompt_tokens,
                output_tokens=request.output_tokens,
                prompt_seed=request.prompt_seed,
                blocks=request.blocks,
                ttft_ms=request.slo.ttft_ms,
                tpot_ms=request.slo.tpot_ms,
                tenant=request.tenant,
            )
            for request in requests
        ),
    )

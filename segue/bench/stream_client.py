"""A client process of ``segue bench server``: opens streams and records when their tokens arrive.

A process of its own, so that a server is not slowed by the Python of those who read it: several of them share the
streams. It imports the SDK alone. Plan and record are one line of JSON each, on standard input and output.
"""

from __future__ import annotations

import asyncio
import json
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Self

from segue.client import AsyncClient, RetryPolicy
from segue.errors import SegueError

_STOP_SECONDS = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamRequest:
    """A prompt of token ids for an adapter, None for the base model."""

    prompt: tuple[int, ...]
    adapter: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamRecord:
    """One stream's chunks: seconds of CLOCK_MONOTONIC at arrival, and tokens. ``error`` says how it failed, if so."""

    arrivals: tuple[tuple[float, int], ...]
    error: str | None = None


class ClientProcesses:
    """Streams of greedy answers that stop at ``max_tokens`` alone, shared by several processes. Use as a context."""

    def __init__(self, address: str, requests: Sequence[StreamRequest], *, max_tokens: int, processes: int) -> None:
        """Start them; the streams open as the processes come up."""
        self._processes: list[subprocess.Popen[bytes]] = []
        for place in range(min(processes, len(requests))):
            process = subprocess.Popen([sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            self._processes.append(process)
            plan = {
                "address": address,
                "max_tokens": max_tokens,
                "requests": [asdict(request) for request in requests[place::processes]],
            }
            assert process.stdin is not None
            process.stdin.write(json.dumps(plan).encode() + b"\n")
            process.stdin.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.kill()
            process.communicate()

    @property
    def has_ended(self) -> bool:
        """Whether all streams of one of the processes have ended."""
        outputs = [process.stdout for process in self._processes if process.stdout is not None]
        readable, _, _ = select.select(outputs, [], [], 0)
        return bool(readable)

    def stop(self) -> list[StreamRecord]:
        """Cancel the streams that still run; what all of them recorded. Raises OSError if a process has failed."""
        records = []
        for process in self._processes:
            # Closes its standard input first, which tells it to stop.
            output, _ = process.communicate(timeout=_STOP_SECONDS)
            if process.returncode != 0:
                raise OSError(f"a client process ended with status {process.returncode}")
            records += [
                StreamRecord(arrivals=tuple((at, count) for at, count in item["arrivals"]), error=item["error"])
                for item in json.loads(output)
            ]
        return records


async def _follow(
    client: AsyncClient, request: StreamRequest, max_tokens: int, arrivals: list[tuple[float, int]]
) -> None:
    stream = client.generate(
        list(request.prompt),
        adapter=request.adapter,
        max_tokens=max_tokens,
        ignore_eos=True,
        temperature=0.0,
        stream=True,
    )
    async with stream:
        async for chunk in stream:
            # One after the other, so that those of a stream that is cancelled are there.
            if chunk.token_ids:
                arrivals.append((time.monotonic(), len(chunk.token_ids)))  # noqa: PERF401


async def _record(address: str, requests: Sequence[StreamRequest], max_tokens: int) -> list[StreamRecord]:
    """Run the streams until they end or standard input does."""
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    loop.run_in_executor(None, lambda: (sys.stdin.read(), loop.call_soon_threadsafe(stopped.set)))
    arrivals: list[list[tuple[float, int]]] = [[] for _ in requests]
    async with AsyncClient(address, retry=RetryPolicy(attempts=1)) as client:
        tasks = [
            asyncio.create_task(_follow(client, request, max_tokens, own))
            for request, own in zip(requests, arrivals, strict=True)
        ]
        ended = asyncio.create_task(_tell_end(tasks))
        await stopped.wait()
        ended.cancel()
        for task in tasks:
            task.cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
    records = []
    for own, end in zip(arrivals, ends, strict=True):
        if end is not None and not isinstance(end, SegueError | asyncio.CancelledError):
            raise end
        error = end.message if isinstance(end, SegueError) else None
        records.append(StreamRecord(arrivals=tuple(own), error=error))
    return records


async def _tell_end(tasks: Sequence[asyncio.Task[None]]) -> None:
    """An empty line before the record says that all streams have ended."""
    await asyncio.wait(tasks)
    sys.stdout.write("\n")
    sys.stdout.flush()


def main() -> None:
    plan = json.loads(sys.stdin.readline())
    requests = [StreamRequest(prompt=tuple(item["prompt"]), adapter=item["adapter"]) for item in plan["requests"]]
    records = asyncio.run(_record(plan["address"], requests, plan["max_tokens"]))
    sys.stdout.write(json.dumps([asdict(record) for record in records]))


if __name__ == "__main__":
    main()

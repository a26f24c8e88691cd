"""Where passes are enqueued: one that may rest or wait has a lane of its own, so that no other work waits for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Protocol

import torch

# Of a pass whose weights are landing: what is enqueued further ahead has chosen where its deltas come from too early.
_LAYERS_AHEAD = 2


class Lane(Protocol):
    """A stream of work of one pass."""

    def begin(self) -> None:
        """All that the loop thread has enqueued outside of lanes so far comes before what is enqueued here."""
        ...

    def enter(self) -> AbstractContextManager[object]:
        """What is enqueued inside belongs to the lane."""
        ...

    def wait(self, event: torch.cuda.Event) -> None:
        """What is enqueued from now on comes behind ``event``, which has been recorded."""
        ...

    def mark(self) -> None:
        """Another layer has been enqueued."""
        ...

    @property
    def layers_ahead(self) -> int:
        """Layers that were enqueued, and that the device has not done, when it was last looked."""
        ...

    @property
    def is_close(self) -> bool:
        """Whether the device has got so far that the next layer is at most two layers ahead of it."""
        ...

    def end(self) -> None:
        """Nothing more is enqueued."""
        ...

    def layer_seconds(self) -> Sequence[float]:
        """What each layer took on the device, once the lane is quiet; empty where the caller's clock tells."""
        ...

    @property
    def is_quiet(self) -> bool:
        """After ``end``: whether the device has done all of it. A lane that is quiet may serve another pass."""
        ...


class LoopLane:
    """The loop thread's own order of work: for passes that never wait, and where calls return when all is done."""

    is_quiet = True
    is_close = True
    layers_ahead = 0

    def begin(self) -> None:
        """It is behind everything already."""

    def enter(self) -> AbstractContextManager[object]:
        return nullcontext()

    def wait(self, event: torch.cuda.Event) -> None:  # noqa: ARG002
        raise RuntimeError("a pass in the loop's own order never waits: all that comes later would, too")

    def mark(self) -> None:
        """It has been computed."""

    def end(self) -> None:
        """What is enqueued later comes later."""

    def layer_seconds(self) -> Sequence[float]:
        return ()


class StreamLane:
    """A CUDA stream."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._ended: torch.cuda.Event | None = None
        self._layers: deque[torch.cuda.Event] = deque()
        self._marks: list[torch.cuda.Event] = []

    def begin(self) -> None:
        self._ended = None
        self._layers.clear()
        behind = torch.cuda.Event()  # type: ignore[no-untyped-call]
        behind.record()
        self._stream.wait_event(behind)
        self._marks = [self._timed_mark()]

    def enter(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._stream)

    def wait(self, event: torch.cuda.Event) -> None:
        self._stream.wait_event(event)

    def mark(self) -> None:
        layer = self._timed_mark()
        self._marks.append(layer)
        self._layers.append(layer)

    @property
    def layers_ahead(self) -> int:
        return len(self._layers)

    @property
    def is_close(self) -> bool:
        while self._layers and self._layers[0].query():  # type: ignore[no-untyped-call]
            self._layers.popleft()
        return len(self._layers) < _LAYERS_AHEAD

    def end(self) -> None:
        self._ended = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._ended.record(self._stream)

    def layer_seconds(self) -> Sequence[float]:
        return [before.elapsed_time(after) / 1e3 for before, after in pairwise(self._marks)]

    def _timed_mark(self) -> torch.cuda.Event:
        mark = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        mark.record(self._stream)
        return mark

    @property
    def is_quiet(self) -> bool:
        return self._ended is not None and self._ended.query()  # type: ignore[no-untyped-call]


class Lanes:
    """Lanes for passes, made as they are needed and used again."""

    def __init__(self, make: Callable[[], Lane]) -> None:
        self._make = make
        self._idle: list[Lane] = []

    @classmethod
    def on(cls, device: torch.device) -> Lanes:
        """On CUDA each pass has a stream of its own."""
        return cls(lambda: StreamLane(device)) if device.type == "cuda" else cls(LoopLane)

    def take(self) -> Lane:
        """A lane that nobody uses."""
        return self._idle.pop() if self._idle else self._make()

    def give_back(self, lane: Lane) -> None:
        """The lane is quiet, and its pass will not use it again."""
        self._idle.append(lane)

"""A lane that the device is late with, for the CPU."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

QUERIES = 5


class FakeLateLane:
    """Computes at once, as the CPU does, and says so only when it has been asked several times."""

    def __init__(self) -> None:
        self.queries_left: int | None = None
        self.begun = False
        self.layers_ahead = 0
        self.most_ahead = 0
        self.is_late = False

    def begin(self) -> None:
        assert not self.begun, "another pass is in the lane"
        self.begun = True
        self.queries_left = None
        self.layers_ahead = 0

    def enter(self) -> AbstractContextManager[object]:
        assert self.begun
        assert self.queries_left is None, "the pass had ended"
        return nullcontext()

    def wait(self, event: torch.cuda.Event) -> None:
        raise AssertionError(f"on the CPU nothing lands behind an event: {event}")

    def mark(self) -> None:
        self.layers_ahead += 1
        self.most_ahead = max(self.most_ahead, self.layers_ahead)

    @property
    def is_close(self) -> bool:
        # A layer is done every other time that it is asked.
        self.is_late = not self.is_late
        if self.layers_ahead and not self.is_late:
            self.layers_ahead -= 1
        return self.layers_ahead < 2

    def end(self) -> None:
        self.queries_left = QUERIES

    def layer_seconds(self) -> tuple[float, ...]:
        return ()

    @property
    def is_quiet(self) -> bool:
        if self.queries_left is None:
            return False
        self.queries_left = max(0, self.queries_left - 1)
        self.begun = self.queries_left > 0
        return not self.begun

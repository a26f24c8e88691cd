"""What an engine asks of the interpreter that it runs in."""

from __future__ import annotations

import gc
import sys

SWITCH_SECONDS = 0.5e-3
"""How long a thread waits for the interpreter before it asks for it."""


def settle_interpreter() -> None:
    """Call it when everything that stays has been made; it holds for the whole process.

    What there is now is not collected over again and again, which would hold steps up. And threads that enqueue copies
    beside the loop, which want the interpreter for microseconds, do not wait for it as long as is usual (5 ms).
    """
    gc.collect()
    gc.freeze()
    sys.setswitchinterval(SWITCH_SECONDS)

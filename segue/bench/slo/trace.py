"""What a trace of requests is, whichever file it came from."""

from __future__ import annotations

from dataclasses import dataclass

BLOCK_TOKENS = 512
"""Tokens of a block that ``blocks`` name, as in Mooncake's traces."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """``seconds`` are arrivals in order from the first, and the lengths and blocks those of the same requests; empty
    where a file does not tell. ``function_counts`` are the invocations of each function."""

    seconds: tuple[float, ...] = ()
    prompt_tokens: tuple[int, ...] = ()
    output_tokens: tuple[int, ...] = ()
    blocks: tuple[tuple[int, ...], ...] = ()
    function_counts: tuple[int, ...] = ()

    def blocks_of(self, number: int) -> tuple[int, ...]:
        """The blocks of the prompt of a request, by its number in a run that repeats the trace."""
        return self.blocks[number % len(self.blocks)] if self.blocks else ()


NO_TRACE = Trace()

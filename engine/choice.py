"""Tokens of a pass that the sampler was asked for, on their way."""

from __future__ import annotations

from dataclasses import dataclass

from segue.engine.request import Request
from segue.engine.sampler import PendingTokens
from segue.engine.sampling import SampledToken


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """``wanted`` are the requests that get a token, in the order of ``tokens``; None where no request does."""

    wanted: tuple[Request, ...]
    tokens: PendingTokens | None

    def read(self) -> list[tuple[Request, SampledToken | None]]:
        """Wait for them; each request with its token, None where none can be chosen."""
        tokens = [] if self.tokens is None else self.tokens.read()
        return list(zip(self.wanted, tokens, strict=True))

"""The server that is measured, as it describes itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from segue.client import Client

_ANSWER_SECONDS = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A server. ``adapters`` are (name, rank) of those that it can serve."""

    address: str
    model: str
    device: str
    dtype: str
    vocab_size: int
    context_tokens: int
    adapters: Sequence[tuple[str, int]]


def ask_target(address: str) -> Target:
    """Raises SegueError for a server that cannot be reached or does not serve."""
    with Client(address) as client:
        info = client.info(timeout=_ANSWER_SECONDS)
        adapters = client.adapters.list(timeout=_ANSWER_SECONDS)
    return Target(
        address=address,
        model=info.model,
        device=info.device,
        dtype=info.dtype,
        vocab_size=info.vocab_size,
        context_tokens=info.context_tokens,
        adapters=[(adapter.name, adapter.rank) for adapter in adapters if not adapter.problem],
    )

"""What a request is checked against: the model's sizes, and the bounds that the interface promises."""

from __future__ import annotations

from dataclasses import dataclass

MAX_REQUEST_ID_CHARACTERS = 128
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 256
MAX_STOP_TOKENS = 64
MAX_LOGPROBS = 20
MAX_LOGIT_BIASES = 1024
MAX_ANSWERS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLimits:
    """The base model that is served. ``eos_token_ids`` end an answer unless a request ignores them.

    Without ``has_text`` its tokens have no text.
    """

    name: str
    vocab_size: int
    context_tokens: int
    eos_token_ids: tuple[int, ...]
    default_max_tokens: int
    has_text: bool

"""Text of a growing answer, piece by piece, equal to decoding all of its tokens at once.

Two kinds of tokenizer are told apart. In a byte-level one every token stands for fixed bytes, and an incremental UTF-8
decoder holds back a character's bytes until it is whole. In all others a token's text depends on its neighbours, so a
window of tokens is decoded from the last place where the text was settled; tokens that stand for single bytes
(``<0x0A>``) are settled only by the token after their run, because one invalid byte changes the text of all of it.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from tokenizers import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


class Detokenizer(Protocol):
    """Turns one answer's tokens into text. Special tokens have none."""

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that is settled now and was not before; it never ends within a character."""
        ...

    def flush(self) -> str:
        """The rest, when no more tokens will come; an unfinished character is U+FFFD."""
        ...


class ByteLevelDetokenizer:
    """For tokenizers whose decoder is ByteLevel. ``token_bytes`` gives a token's bytes."""

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        # Replaces as Rust's from_utf8_lossy does: one U+FFFD for each maximal part of a character.
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_ids: Sequence[int]) -> str:
        return self._decoder.decode(b"".join(map(self._token_bytes, token_ids)))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer:
    """For all other tokenizers. ``is_text`` says that a token has text, ``is_byte`` that it stands for a byte."""

    def __init__(
        self, decode: Callable[[list[int]], str], is_text: Callable[[int], bool], is_byte: Callable[[int], bool]
    ) -> None:
        self._decode = decode
        self._is_text = is_text
        self._is_byte = is_byte
        # The last token whose text was given out, kept for what it does to the next ones, and the tokens after it.
        self._settled: list[int] = []
        self._pending: list[int] = []

    def push(self, token_ids: Sequence[int]) -> str:
        # Tokens without text are left out before decoding, as the tokenizer does, so that they separate nothing.
        self._pending += [token_id for token_id in token_ids if self._is_text(token_id)]
        if not self._pending or self._is_byte(self._pending[-1]):
            return ""
        return self._settle()

    def flush(self) -> str:
        return self._settle() if self._pending else ""

    def _settle(self) -> str:
        before = self._decode(self._settled)
        text = self._decode(self._settled + self._pending)[len(before) :]
        self._settled = self._pending[-1:]
        self._pending = []
        return text


class SilentDetokenizer:
    """For models without a tokenizer: no token has text."""

    def push(self, token_ids: Sequence[int]) -> str:  # noqa: ARG002
        return ""

    def flush(self) -> str:
        return ""


class DetokenizerFactory:
    """Makes detokenizers for one tokenizer, of the kind that its decoder needs."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        special = tokenizer.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in special.items() if token.special)
        self._byte_level = _is_byte_level(json.loads(tokenizer.to_str())["decoder"])
        self._bytes: dict[int, bytes] = {}

    def create(self) -> Detokenizer:
        if self._byte_level:
            return ByteLevelDetokenizer(self._token_bytes)
        return WindowDetokenizer(self._decode, self._is_text, self._is_byte)

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)

    def _is_text(self, token_id: int) -> bool:
        # A model's vocabulary may be larger than its tokenizer's.
        return token_id not in self._special_ids and self._tokenizer.id_to_token(token_id) is not None

    def _is_byte(self, token_id: int) -> bool:
        token = self._tokenizer.id_to_token(token_id)
        return token is not None and _BYTE_TOKEN.fullmatch(token) is not None

    def _token_bytes(self, token_id: int) -> bytes:
        known = self._bytes.get(token_id)
        if known is None:
            token = self._tokenizer.id_to_token(token_id)
            known = b"" if token is None or token_id in self._special_ids else _bytes_of(token)
            self._bytes[token_id] = known
        return known


def _is_byte_level(decoder: Any) -> bool:
    if decoder is None:
        return False
    if decoder["type"] == "Sequence":
        return len(decoder["decoders"]) == 1 and _is_byte_level(decoder["decoders"][0])
    return bool(decoder["type"] == "ByteLevel")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: itself if it is visible, else the next free one from U+0100 on."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + place): byte for place, byte in enumerate(hidden)}


_BYTE_ALPHABET = _byte_alphabet()


def _bytes_of(token: str) -> bytes:
    """A byte-level token's bytes; a token that was added as plain text may have characters outside the alphabet."""
    try:
        return bytes(_BYTE_ALPHABET[character] for character in token)
    except KeyError:
        return token.encode()

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest
from tokenizers import Tokenizer, decoders, models

from segue.server.detokenize import _BYTE_ALPHABET, DetokenizerFactory
from tests.server.rig import byte_level_tokenizer

TEXT = "a né 你好 😀 👩‍👩‍👧 \t\n"


def byte_fallback_tokenizer() -> Tokenizer:
    """As Llama 2's: words with a mark for the space before them, and a token for every byte."""
    words = ["▁", "▁hello", "▁world", "x", "▁▁", "é", "你", "�"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    vocab = {name: token_id for token_id, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>", "</s>", "<unk>"])
    return tokenizer


def random_answers(tokenizer: Tokenizer, count: int) -> Iterator[list[int]]:
    """Any tokens at all, with the bytes of whole characters among them."""
    generator = random.Random(7)
    byte_ids = ids_of(tokenizer, [f"<0x{byte:02X}>" for byte in range(256)])
    for _ in range(count):
        tokens: list[int] = []
        while len(tokens) < 24:
            if byte_ids and generator.random() < 0.4:
                tokens += [byte_ids[byte] for byte in generator.choice(TEXT).encode()]
            elif generator.random() < 0.2:
                tokens += tokenizer.encode(generator.choice(TEXT)).ids
            else:
                tokens.append(generator.randrange(tokenizer.get_vocab_size() + 2))
        yield tokens[: generator.randrange(1, 25)]


def ids_of(tokenizer: Tokenizer, tokens: list[str]) -> list[int]:
    """The ids of those tokens that the tokenizer has."""
    found = [tokenizer.token_to_id(token) for token in tokens]
    return [token_id for token_id in found if token_id is not None]


def pieces(tokenizer: Tokenizer, tokens: list[int], sizes: Iterator[int]) -> list[str]:
    detokenizer = DetokenizerFactory(tokenizer).create()
    texts, start = [], 0
    while start < len(tokens):
        size = next(sizes)
        texts.append(detokenizer.push(tokens[start : start + size]))
        start += size
    return [*texts, detokenizer.flush()]


@pytest.mark.parametrize("make", [byte_level_tokenizer, byte_fallback_tokenizer])
def test_pieces_make_up_the_decoded_whole(make: Callable[[], Tokenizer]) -> None:
    tokenizer = make()
    generator = random.Random(3)
    sizes = iter(lambda: generator.randrange(1, 4), 0)
    for tokens in random_answers(tokenizer, 2000):
        assert "".join(pieces(tokenizer, tokens, sizes)) == tokenizer.decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize("make", [byte_level_tokenizer, byte_fallback_tokenizer])
def test_no_piece_ends_within_a_character(make: Callable[[], Tokenizer]) -> None:
    tokenizer = make()
    text = "né 你好 😀"
    visible = {byte: character for character, byte in _BYTE_ALPHABET.items()}
    names = [[f"<0x{byte:02X}>", visible[byte]] for byte in text.encode()]
    tokens = [ids_of(tokenizer, pair)[0] for pair in names]
    texts = pieces(tokenizer, tokens, iter(lambda: 1, 0))
    assert "".join(texts) == text
    assert not any("�" in piece for piece in texts)


def test_a_special_token_between_words_changes_nothing() -> None:
    tokenizer = byte_fallback_tokenizer()
    tokens = ids_of(tokenizer, ["▁hello", "</s>", "▁world"])
    assert pieces(tokenizer, tokens, iter(lambda: 1, 0)) == ["hello", "", " world", ""]


@pytest.mark.parametrize("make", [byte_level_tokenizer, byte_fallback_tokenizer])
def test_work_per_token_does_not_grow_with_the_answer(
    make: Callable[[], Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counts the tokens that are decoded: at most three for each one pushed, however bad the bytes."""
    tokenizer = make()
    decoded = 0
    factory = DetokenizerFactory(tokenizer)
    real = factory._decode

    def count(token_ids: list[int]) -> str:
        nonlocal decoded
        decoded += len(token_ids)
        return real(token_ids)

    monkeypatch.setattr(factory, "_decode", count)
    bad_byte, word = ids_of(tokenizer, ["<0xE4>", "ä", "x"])
    tokens = [bad_byte] * 500 + [word] * 500 + [bad_byte, word] * 500
    detokenizer = factory.create()
    for token in tokens:
        detokenizer.push([token])
    detokenizer.flush()
    assert decoded <= 3 * len(tokens)

"""Philox4x32-10 against its published known answers and a reference in plain integers."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from segue.engine.philox import Place, philox4x32, uniforms

CPU = torch.device("cpu")

# kat_vectors of Random123: counter, key, answer.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def reference(counter: list[int], key: list[int], bits: int) -> list[int]:
    """Philox4x32-10 or Philox4x64-10 in Python's integers."""
    multipliers, steps = {
        32: ((0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)),
        64: ((0xD2E7470EE14C6C93, 0xCA5A826395121157), (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)),
    }[bits]
    word = (1 << bits) - 1
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        first, second = multipliers[0] * c0, multipliers[1] * c2
        c0, c1, c2, c3 = (second >> bits) ^ c1 ^ k0, second & word, (first >> bits) ^ c3 ^ k1, first & word
        k0, k1 = (k0 + steps[0]) & word, (k1 + steps[1]) & word
    return [c0, c1, c2, c3]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers(counter: str, key: str, answer: str) -> None:
    assert philox4x32(torch.tensor(words(counter)), torch.tensor(words(key))).tolist() == words(answer)
    assert reference(words(counter), words(key), 32) == words(answer)


def test_the_reference_is_numpys_generator_in_64_bits() -> None:
    key = [0x0123456789ABCDEF, 0xFEDCBA9876543210]
    counter = [2**64 - 5, 7, 11, 2**63 + 1]
    # numpy counts up before its first block.
    generator = np.random.Philox(key=np.array(key, np.uint64), counter=np.array(counter, np.uint64))
    assert generator.random_raw(4).tolist() == reference([counter[0] + 1, *counter[1:]], key, 64)


def test_many_blocks_at_once_are_those_of_the_reference() -> None:
    source = random.Random(1)
    counters = [[source.getrandbits(32) for _ in range(4)] for _ in range(100)]
    keys = [[source.getrandbits(32) for _ in range(2)] for _ in range(100)]
    blocks = philox4x32(torch.tensor(counters).T, torch.tensor(keys).T).T.tolist()
    assert blocks == [reference(counter, key, 32) for counter, key in zip(counters, keys, strict=True)]


def test_uniforms_are_the_words_of_their_place() -> None:
    places = [Place(seed=0xFEDCBA9876543210, sample=3, position=70_000), Place(seed=1, sample=0, position=0)]
    numbers = uniforms(places, 10, CPU)
    assert numbers.shape == (2, 10)
    expected = [
        (word + 0.5) / 2**32
        for block in range(3)
        for word in reference([block, 0, 70_000, 3], [0x76543210, 0xFEDCBA98], 32)
    ]
    assert numbers[0].tolist() == expected[:10]
    assert uniforms(places[1:], 10, CPU)[0].tolist() == numbers[1].tolist()


def test_the_ends_are_never_reached() -> None:
    assert 0.5 * 2.0**-32 > 0
    assert (2.0**32 - 0.5) * 2.0**-32 < 1
    numbers = uniforms([Place(seed, 0, 0) for seed in range(64)], 4096, CPU)
    assert numbers.min() > 0
    assert numbers.max() < 1
    # 5 standard errors of the mean of 262,144 uniform numbers.
    assert abs(float(numbers.mean()) - 0.5) < 5 * (1 / 12 / numbers.numel()) ** 0.5


@pytest.mark.parametrize("other", [Place(2**63, 2, 3), Place(2**63 + 1, 0, 3), Place(2**63 + 1, 2, 4)])
def test_each_part_of_a_place_counts(other: Place) -> None:
    both = uniforms([Place(2**63 + 1, 2, 3), other], 512, CPU)
    assert not (both[0] == both[1]).any()


@pytest.mark.gpu
def test_the_device_gives_the_same_numbers() -> None:
    places = [Place(2**64 - 1 - seed, seed, 2**32 - 1 - seed) for seed in range(50)]
    assert torch.equal(uniforms(places, 757, torch.device("cuda")).cpu(), uniforms(places, 757, CPU))

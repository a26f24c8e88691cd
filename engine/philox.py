"""Random numbers that depend on nothing but their place: the counter-based generator Philox4x32-10.

J. Salmon, M. Moraes, R. Dror, D. Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011. There is no state: the
numbers of a place are the same in any batch, on any device, and however often they are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


class Place(NamedTuple):
    """What a token's random numbers depend on: ``seed`` has 64 bits, ``sample`` and ``position`` 32 each."""

    seed: int
    sample: int
    position: int


def philox4x32(counter: Tensor, key: Tensor) -> Tensor:
    """The four words of each block: int64 [4, ...] in [0, 2**32), from ``counter`` [4, ...] and ``key`` [2, ...].

    Both are int64 with values in [0, 2**32), and their shapes after the first dimension broadcast.
    """
    trailing = (1,) * (counter.dim() - 1)
    multipliers = counter.new_tensor(_MULTIPLIERS).view(2, *trailing)
    steps = counter.new_tensor(_KEY_STEPS).view(2, *trailing)
    even, odd = counter[0::2], counter[1::2]
    for index in range(_ROUNDS):
        # The product of two words needs 64 bits: int64 wraps, which leaves the bits as they should be.
        product = (even * multipliers).flip(0)
        even = (product >> 32 & _WORD) ^ odd ^ (key + index * steps & _WORD)
        odd = product & _WORD
    return torch.stack([even[0], odd[0], even[1], odd[1]])


def uniforms(places: Sequence[Place], count: int, device: torch.device) -> Tensor:
    """``count`` numbers for each place, uniform in (0, 1) with 32 bits: float64 [places, count].

    The seed is the key; the counter is (block, 0, position, sample), where block i gives the numbers 4i to 4i + 3.
    """
    words = [(place.seed & _WORD, place.seed >> 32, place.position, place.sample) for place in places]
    seed_low, seed_high, position, sample = torch.tensor(words, dtype=torch.int64).to(device).T.unsqueeze(-1)
    block = torch.arange(-(-count // 4), device=device).expand(len(places), -1)
    counter = torch.stack([block, torch.zeros_like(block), position.expand_as(block), sample.expand_as(block)])
    random = philox4x32(counter, torch.stack([seed_low, seed_high]))
    return (random.permute(1, 2, 0).flatten(1)[:, :count].double() + 0.5) * 2.0**-32

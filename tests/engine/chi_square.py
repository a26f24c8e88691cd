"""How well draws agree with a distribution."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def chi_square(tokens: Tensor, probabilities: Tensor) -> float:
    """The statistic less its mean, in standard deviations. Tokens expected less than 10 times count as one."""
    expected = probabilities * len(tokens)
    counts = torch.bincount(tokens, minlength=len(probabilities)).double()
    assert not counts[probabilities == 0].any(), "an impossible token was drawn"
    is_rare = expected < 10
    expected = torch.cat([expected[~is_rare], expected[is_rare].sum()[None]])
    counts = torch.cat([counts[~is_rare], counts[is_rare].sum()[None]])
    used = expected >= 10
    statistic = float(((counts - expected).square() / expected)[used].sum())
    freedom = int(used.sum()) - 1
    return (statistic - freedom) / math.sqrt(2 * freedom)

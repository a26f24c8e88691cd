"""Drawing tokens: temperature, the filters min_p, top_k and top_p, and the choice itself.

The choice is a race of exponentials (the Gumbel-max trick): with independent uniform u_i, the token of the greatest
w_i / -log(u_i) has probability w_i / sum(w). It is run twice, first among groups of neighbouring token ids with their
summed weights, then among the tokens of the group that won: the same distribution, for a few hundred random numbers
instead of one for each token.

Why not the inverse of the cumulative distribution, with one random number? In float32 the same request alone and in a
crowd has logits that differ by some 1e-6, because matrix products of other shapes add in another order. The inverse
adds these differences up along the vocabulary and so moves every boundary between tokens; in order of probability
near-equal tokens even swap places. In a race each token keeps its own random number. With a total variation distance d
between the two distributions the answers differ with probability at most 2d / (1 + d), the least that any method can
reach that draws without knowing the other distribution (Bavarian, Ghazi, Haramaty, Kamath, Rivest, Sudan, "Optimality
of Correlated Sampling Strategies", 2020; Daliri, Musco, Suresh, "Coupling without Communication and Drafter-Invariant
Speculative Decoding", 2024). Over two races it is at most 6d: 2d for the groups and, since the distributions within
groups are on average at most 2d apart, 4d for the tokens. A token that enters or leaves at a filter's edge matters only
by its own weight. Measured with 128,256 Gaussian logits and d near 5e-5: 1.2 to 1.6 times d for the races, 7 to 18,000
times d for the inverse.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from segue.engine.philox import Place, uniforms
from segue.engine.sampling_params import SamplingParams

_GROUP_TOKENS = 256
_SORTED_TOKENS = 512
_MAX_HALVINGS = 24
_LEAST_SCORE = -104.0  # exp of less is 0 in float32
_SCORE_SLACK = 1e-3  # more than a score is rounded by

_Filter = Callable[[Tensor, Tensor, Tensor], None]


def draw_tokens(logits: Tensor, best: Tensor, params: Sequence[SamplingParams], places: Sequence[Place]) -> Tensor:
    """Draw a token for each row of ``logits``, as ``filtered_weights`` and ``race`` do: int64 [rows]."""
    return race(filtered_weights(logits, best, params), places)


def filtered_weights(logits: Tensor, best: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """What each token is to be drawn in proportion to: float32 [rows, vocab], at most 1, and 0 where it is dropped.

    ``logits`` (float32 [rows, vocab]) are overwritten. ``best`` [rows] is the greatest of each row and is finite;
    logits of -inf are never drawn. In this order:

    - temperature: logits are divided by it;
    - min_p: drops tokens less likely than ``min_p`` times the most likely one;
    - top_k: drops tokens less likely than the ``top_k``-th; those as likely as it stay;
    - top_p: of what is left, keeps the smallest set of most likely tokens whose probability reaches ``top_p``; where
      only some of several equally likely tokens belong to it, those with the lowest ids.

    The order is vLLM's, and each filter is that of the transformers library (TemperatureLogitsWarper,
    MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper; the last leaves the choice among equals open).
    """
    temperature = logits.new_tensor([[item.temperature] for item in params]).clamp_(max=torch.finfo(logits.dtype).max)
    # The maximum is taken off first, so that no temperature, however small, overflows.
    scores = logits.sub_(best.unsqueeze(-1)).div_(temperature)
    weights = scores.exp()
    _filter(_keep_min_p, scores, weights, {row: item.min_p for row, item in enumerate(params) if item.min_p > 0})
    _filter(_keep_top_k, scores, weights, {row: item.top_k for row, item in enumerate(params) if item.top_k > 0})
    _filter(_keep_top_p, scores, weights, {row: item.top_p for row, item in enumerate(params) if item.top_p < 1})
    return weights


def race(weights: Tensor, places: Sequence[Place]) -> Tensor:
    """Choose a token of each row in proportion to ``weights`` (float32 [rows, vocab], not negative): int64 [rows].

    Numbers 0 to 255 of a place are those of the tokens within a group, by their order in it; those of groups follow.
    """
    vocab = weights.shape[1]
    sums = _group_sums(weights)
    times = uniforms(places, _GROUP_TOKENS + sums.shape[1], weights.device).log_().neg_()
    group = (sums / times[:, _GROUP_TOKENS:]).argmax(-1, keepdim=True)
    ids = group * _GROUP_TOKENS + torch.arange(_GROUP_TOKENS, device=weights.device)
    members = weights.gather(1, ids.clamp(max=vocab - 1)).masked_fill_(ids >= vocab, 0)
    winner = (members / times[:, :_GROUP_TOKENS]).argmax(-1, keepdim=True)
    return ids.gather(1, winner).squeeze(-1)


def _group_sums(weights: Tensor) -> Tensor:
    """The sum of each group of ``_GROUP_TOKENS`` neighbours, of which the last may be smaller: [rows, groups]."""
    rows, vocab = weights.shape
    groups = vocab // _GROUP_TOKENS
    whole = groups * _GROUP_TOKENS
    sums = weights[:, :whole].reshape(rows, groups, _GROUP_TOKENS).sum(-1)
    return sums if whole == vocab else torch.cat([sums, weights[:, whole:].sum(-1, keepdim=True)], dim=1)


def _filter(keep: _Filter, scores: Tensor, weights: Tensor, strengths: Mapping[int, float]) -> None:
    """Apply a filter to the rows that ``strengths`` names."""
    if not strengths:
        return
    rows = list(strengths)
    column = torch.tensor(list(strengths.values()), dtype=torch.float64).to(scores.device).unsqueeze(-1)
    if len(rows) == len(scores):
        keep(scores, weights, column)
    else:
        part = weights[rows]
        keep(scores[rows], part, column)
        weights[rows] = part


# A filter sets the weights of the tokens that it drops to 0. It gets scores and weights, both float32 [rows, vocab],
# where a weight is 0 or the exponential of its score and the greatest score is 0, and its strengths, float64 [rows, 1].


def _keep_min_p(scores: Tensor, weights: Tensor, min_p: Tensor) -> None:
    weights.masked_fill_(scores < min_p.log().to(scores.dtype), 0)


def _keep_top_k(scores: Tensor, weights: Tensor, top_k: Tensor) -> None:
    ranks = top_k.long().clamp(max=scores.shape[1])
    last = scores.topk(int(ranks.max())).values.gather(1, ranks - 1)
    weights.masked_fill_(scores < last, 0)


def _keep_top_p(scores: Tensor, weights: Tensor, top_p: Tensor) -> None:
    total = _group_sums(weights).double().sum(-1, keepdim=True)
    target = top_p * total
    bracket = _bracket(scores, weights, target, total)
    width = int(bracket.tokens.max())
    likely = scores.masked_fill(scores > bracket.high, -math.inf).topk(width).values
    mass = likely.exp().double()
    kept = (bracket.mass_above + mass.cumsum(-1) - mass < target).sum(-1, keepdim=True)
    edge = likely.gather(1, kept - 1)
    weights.masked_fill_(scores < edge, 0)
    is_cut = (likely.gather(1, kept.clamp(max=width - 1)) == edge) & (kept < width)
    if is_cut.any():
        kept_at_edge = kept - (likely > edge).sum(-1, keepdim=True)
        at_edge = scores == edge
        weights.masked_fill_(at_edge & (at_edge.cumsum(-1) > kept_at_edge), 0)


class _Bracket(NamedTuple):
    """Scores between which each row's last kept token lies: low < score <= high. All are [rows, 1]."""

    low: Tensor
    high: Tensor
    mass_above: Tensor
    tokens: Tensor


def _bracket(scores: Tensor, weights: Tensor, target: Tensor, total: Tensor) -> _Bracket:
    """Halve the range of scores of each row until few enough are left in it to be sorted.

    A row's bracket depends on that row alone, whatever the others need.
    """
    # The last token kept and those after it weigh more than total - target, and it is the greatest of them.
    least = (total - target) / (weights > 0).sum(-1, keepdim=True)
    low = least.log().clamp_(min=_LEAST_SCORE).sub_(_SCORE_SLACK).to(scores.dtype)
    high = torch.zeros_like(low)
    mass_above = torch.zeros_like(target)
    above_low, above_high = (scores > low).sum(-1, keepdim=True), torch.zeros_like(low, dtype=torch.int64)
    for _ in range(_MAX_HALVINGS):
        is_wide = above_low - above_high > _SORTED_TOKENS
        if not is_wide.any():
            break
        middle = (low + high) / 2
        # As numbers once, since both uses would convert it; sums of ones are exact.
        is_above = (scores > middle).to(weights.dtype)
        mass = _group_sums(weights * is_above).double().sum(-1, keepdim=True)
        tokens = is_above.sum(-1, keepdim=True).long()
        # Where no token lies between low and middle, rounding must not make the bracket empty.
        is_reached = (mass >= target) | (tokens == above_low)
        raise_low, lower_high = is_wide & is_reached, is_wide & ~is_reached
        low, above_low = torch.where(raise_low, middle, low), torch.where(raise_low, tokens, above_low)
        high, above_high = torch.where(lower_high, middle, high), torch.where(lower_high, tokens, above_high)
        mass_above = torch.where(lower_high, mass, mass_above)
    return _Bracket(low=low, high=high, mass_above=mass_above, tokens=above_low - above_high)

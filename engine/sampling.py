"""From the model's logits to the next token of each request, with the log probabilities that were asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from segue.engine.draw import draw_tokens
from segue.engine.philox import Place
from segue.engine.sampling_params import SamplingParams
from segue.engine.token_counts import TokenCounts
from segue.types import TokenLogprob

_CPU_CHUNK_ELEMENTS = 1 << 19


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingRow:
    """What one row of logits is to give.

    ``position`` is how many tokens the request has generated before this one. ``counts`` are its tokens so far; it may
    be None if ``params.has_penalties`` is false.
    """

    params: SamplingParams
    position: int
    counts: TokenCounts | None = None


@dataclass(frozen=True, slots=True)
class SampledToken:
    """The token of one row; ``logprob`` is there when it was asked for."""

    token_id: int
    logprob: TokenLogprob | None


class UnusableLogitsError(ValueError):
    """No token can be chosen from some rows: ``problems`` says for each row's index why."""

    def __init__(self, problems: Mapping[int, str]) -> None:
        super().__init__("; ".join(f"row {row}: {problem}" for row, problem in problems.items()))
        self.problems = dict(problems)


@torch.inference_mode()
def sample(logits: Tensor, rows: Sequence[SamplingRow]) -> list[SampledToken]:
    """Choose a token for each row of ``logits`` (float32 [rows, vocab], left as it is).

    A row's logits are changed in this order, which is vLLM's:

    - stop tokens are banned while ``position`` < ``min_tokens``;
    - ``logit_bias`` is added;
    - ``repetition_penalty`` r, over the tokens of prompt and answer: logits above 0 are divided by r, others multiplied
      (Keskar et al., "CTRL", 2019, as in the transformers library);
    - ``frequency_penalty`` times the token's count, then ``presence_penalty``, is taken off each token of the answer
      (OpenAI's API; the prompt does not count).

    Then a greedy row takes the most likely token, among equals the lowest id, and another row draws one, see
    ``filtered_weights``. The draw depends on the row's logits and on (seed, sample, position) alone, so a request gets
    the same tokens alone, in any batch, and after preemption. Rows that are greedy with nothing to change cost a
    maximum over the vocabulary.

    Log probabilities are those of the logits as given: neither bans, biases, penalties nor temperature count.

    Raises UnusableLogitsError for rows with NaN or +inf and rows where every token is banned. Raises ValueError when
    shapes or dtype differ from the above, or counts are missing.
    """
    if logits.dtype != torch.float32 or logits.dim() != 2 or logits.shape[0] != len(rows):
        raise ValueError(f"logits are {logits.dtype} {list(logits.shape)}, not float32 [{len(rows)}, vocab]")
    if not rows:
        return []
    best, chosen = logits.max(dim=-1)
    changed = [index for index, row in enumerate(rows) if _is_changed(row)]
    if not changed:
        # One copy for both: a token id is exact in float64.
        greatest, token_ids = torch.stack((best.double(), chosen.double())).tolist()
        _check(greatest, range(len(rows)))
        return _with_logprobs(logits, rows, [int(token_id) for token_id in token_ids])
    _check(best.tolist(), range(len(rows)))
    problems: dict[int, str] = {}
    for part in _chunks(changed, logits):
        try:
            chosen[part] = _choose(logits[part], rows, part)
        except UnusableLogitsError as error:
            problems |= error.problems
    if problems:
        raise UnusableLogitsError(problems)
    return _with_logprobs(logits, rows, chosen.tolist())


def _with_logprobs(logits: Tensor, rows: Sequence[SamplingRow], token_ids: Sequence[int]) -> list[SampledToken]:
    logprobs = _logprobs(logits, rows, token_ids)
    return [SampledToken(token_id, logprobs.get(index)) for index, token_id in enumerate(token_ids)]


def _is_changed(row: SamplingRow) -> bool:
    return not row.params.is_greedy or row.params.changes_logits(row.position)


def _chunks(indices: list[int], logits: Tensor) -> list[list[int]]:
    """On the CPU few rows at a time, so that what is computed of them stays in its caches; elsewhere all at once."""
    size = max(1, _CPU_CHUNK_ELEMENTS // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def _choose(logits: Tensor, batch: Sequence[SamplingRow], indices: Sequence[int]) -> Tensor:
    """The tokens [rows] for ``logits`` [rows, vocab], which are overwritten and belong to ``indices`` of ``batch``."""
    rows = [batch[index] for index in indices]
    _ban_stops(logits, rows)
    _add_biases(logits, rows)
    _apply_penalties(logits, rows)
    best, chosen = logits.max(dim=-1)
    _check(best.tolist(), indices)
    drawn = [index for index, row in enumerate(rows) if not row.params.is_greedy]
    if not drawn:
        return chosen
    params = [rows[index].params for index in drawn]
    places = [Place(rows[index].params.seed, rows[index].params.sample, rows[index].position) for index in drawn]
    if len(drawn) == len(rows):
        return draw_tokens(logits, best, params, places)
    chosen[drawn] = draw_tokens(logits[drawn], best[drawn], params, places)
    return chosen


def _check(best: Sequence[float], indices: Sequence[int]) -> None:
    """Raise UnusableLogitsError unless the greatest logit of each row is a number to choose by."""
    problems = {}
    for index, logit in zip(indices, best, strict=True):
        if logit == -math.inf:
            problems[index] = "every token is banned"
        elif not math.isfinite(logit):
            problems[index] = f"a logit is {logit}"
    if problems:
        raise UnusableLogitsError(problems)


def _ban_stops(logits: Tensor, rows: Sequence[SamplingRow]) -> None:
    banned = [row.params.stop_token_ids if row.params.bans_stops(row.position) else () for row in rows]
    if any(banned):
        row_ids = np.repeat(np.arange(len(rows)), [len(ids) for ids in banned])
        index = torch.from_numpy(np.stack([row_ids, np.fromiter(chain(*banned), np.int64)])).to(logits.device)
        logits[index[0], index[1]] = -torch.inf


def _add_biases(logits: Tensor, rows: Sequence[SamplingRow]) -> None:
    biases = [row.params.logit_bias for row in rows]
    if any(biases):
        row_ids = np.repeat(np.arange(len(rows)), [len(bias) for bias in biases])
        index = torch.from_numpy(np.stack([row_ids, np.fromiter(chain(*biases), np.int64)])).to(logits.device)
        values = torch.tensor(list(chain.from_iterable(bias.values() for bias in biases)), dtype=logits.dtype)
        logits[index[0], index[1]] += values.to(logits.device)


def _apply_penalties(logits: Tensor, rows: Sequence[SamplingRow]) -> None:
    penalised = [(index, row.params, _counts(row)) for index, row in enumerate(rows) if row.params.has_penalties]
    if not penalised:
        return
    slots = [len(counts.ids) for _, _, counts in penalised]
    row_ids = np.repeat([index for index, _, _ in penalised], slots)
    ids = np.concatenate([counts.ids for _, _, counts in penalised])
    index = torch.from_numpy(np.stack([row_ids, ids])).to(logits.device)
    triples = [(item.repetition_penalty, item.frequency_penalty, item.presence_penalty) for _, item, _ in penalised]
    strengths = np.repeat(np.array(triples, dtype=np.float32), slots, axis=0).T
    generated = np.concatenate([counts.counts for _, _, counts in penalised])
    table = torch.from_numpy(np.concatenate([strengths, generated[None]])).to(logits.device)
    repetition, frequency, presence, count = table
    seen = logits[index[0], index[1]]
    seen = torch.where(seen < 0, seen * repetition, seen / repetition)
    logits[index[0], index[1]] = seen - frequency * count - presence * (count > 0)


def _counts(row: SamplingRow) -> TokenCounts:
    if row.counts is None:
        raise ValueError("a row with penalties needs the counts of its tokens")
    return row.counts


def _logprobs(logits: Tensor, rows: Sequence[SamplingRow], token_ids: Sequence[int]) -> dict[int, TokenLogprob]:
    """Of each row that asked: the log probability of its token and of as many of the most likely as it wants."""
    wanted = {index: row.params.logprobs for index, row in enumerate(rows) if row.params.logprobs is not None}
    if not wanted:
        return {}
    indices = list(wanted)
    chosen = torch.tensor([[token_ids[index]] for index in indices]).to(logits.device)
    logprobs = torch.log_softmax(logits[indices], dim=-1)
    top = logprobs.topk(min(max(wanted.values()), logits.shape[1]))
    found = zip(indices, logprobs.gather(1, chosen).tolist(), top.indices.tolist(), top.values.tolist(), strict=True)
    return {
        index: TokenLogprob(
            token_id=token_ids[index],
            logprob=logprob,
            top=dict(zip(ids[: wanted[index]], values[: wanted[index]], strict=True)),
        )
        for index, (logprob,), ids, values in found
    }

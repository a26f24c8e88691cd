"""Choosing tokens in the device's own time: two or three launches, one copy there and one back, nothing waited for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from segue.engine.sampling import SampledToken, SamplingRow
from segue.gpu_kernels.sample_tokens import NO_DISTANCE, ROW_DTYPE, ROW_WORDS, sample_tokens
from segue.types import TokenLogprob

_NO_TOKEN = -1
_SIGNED_WORD = 1 << 31
_LARGEST_TEMPERATURE = float(np.finfo(np.float32).max)


class _TopLogits(NamedTuple):
    """The greatest logits of the rows ``indices``, and whose they are: both [len(indices), most]."""

    indices: list[int]
    values: Tensor
    token_ids: Tensor


class KernelSampler:
    """See ``segue.engine.sampler.Sampler``: ``sampling.sample`` by ``gpu_kernels.sample_tokens``.

    What ``launch`` returns is on its way; reading it waits for these tokens, and for nothing enqueued behind them.
    """

    @torch.inference_mode()
    def launch(self, logits: Tensor, rows: Sequence[SamplingRow]) -> LaunchedTokens:
        """Raises ValueError when shapes do not agree, or counts are missing."""
        if logits.dim() != 2 or logits.shape[0] != len(rows):
            raise ValueError(f"logits are {list(logits.shape)}, not [{len(rows)}, vocab]")
        packed = pack_rows(rows)
        table = _to_device(torch.from_numpy(packed.words), logits.device)
        chosen = sample_tokens(
            logits, table, edited_rows=packed.edited_rows, searched_rows=packed.searched_rows
        )  # fmt: skip
        return LaunchedTokens(chosen.token_ids, _to_host(chosen.results), rows, _top_logits(logits, rows))


class LaunchedTokens:
    """See ``segue.engine.sampler.PendingTokens``."""

    def __init__(
        self, token_ids: Tensor, results: Tensor, rows: Sequence[SamplingRow], top_logits: _TopLogits | None
    ) -> None:
        """``results`` [rows, 4] is what ``sample_tokens`` returns, and, as the top logits, on its way to the host."""
        self.token_ids = token_ids
        self._results = results
        self._rows = rows
        self._top_logits = top_logits
        self._arrived: torch.cuda.Event | None = None
        if token_ids.is_cuda:
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def read(self) -> list[SampledToken | None]:
        if self._arrived is not None:
            self._arrived.synchronize()
        tops: dict[int, tuple[list[int], list[float]]] = {}
        if self._top_logits is not None:
            indices, values, token_ids = self._top_logits
            tops = dict(zip(indices, zip(token_ids.tolist(), values.tolist(), strict=True), strict=True))
        tokens: list[SampledToken | None] = []
        for index, (row, (token, logprob, best, log_sum)) in enumerate(
            zip(self._rows, self._results.tolist(), strict=True)
        ):
            if token == _NO_TOKEN:
                tokens.append(None)
                continue
            wanted = row.params.logprobs
            if wanted is None:
                tokens.append(SampledToken(int(token), None))
                continue
            ids, logits = tops.get(index, ([], []))
            top = {top_id: logit - best - log_sum for top_id, logit in zip(ids[:wanted], logits[:wanted], strict=True)}
            tokens.append(SampledToken(int(token), TokenLogprob(token_id=int(token), logprob=logprob, top=top)))
        return tokens


class PackedRows(NamedTuple):
    """``words`` int32 and the numbers of slots, as ``sample_tokens`` takes them."""

    words: NDArray[np.int32]
    edited_rows: int
    searched_rows: int


def pack_rows(rows: Sequence[SamplingRow]) -> PackedRows:
    """The table of a launch: what each row's token is drawn by, then the lists of the rows that have some.

    Raises ValueError when a row has penalties and no counts.
    """
    lists = _Lists(len(rows) * ROW_WORDS)
    searched_rows = 0
    records = []
    for row in rows:
        params = row.params
        search_slot = -1
        if not params.is_greedy and (params.top_k > 0 or params.top_p < 1):
            search_slot = searched_rows
            searched_rows += 1
        records.append(
            (
                params.seed,
                row.position,
                params.sample,
                1.0 if params.is_greedy else min(params.temperature, _LARGEST_TEMPERATURE),
                min(params.top_k, _SIGNED_WORD - 1),
                abs(math.log(params.min_p)) if params.min_p > 0 else NO_DISTANCE,
                params.is_greedy,
                params.logprobs is not None,
                lists.slot if params.changes_logits(row.position) else -1,
                search_slot,
                *lists.add(row),
                params.repetition_penalty,
                params.frequency_penalty,
                params.presence_penalty,
                params.top_p,
            )
        )
    table = np.array(records, dtype=ROW_DTYPE).view(np.int32)
    return PackedRows(np.concatenate([table, *lists.parts]), lists.slot, searched_rows)


class _Lists:
    """What is behind the rows of a table. ``slot`` counts the rows that have lists."""

    def __init__(self, first_word: int) -> None:
        self.slot = 0
        self.parts: list[NDArray[np.int32]] = []
        self._end = first_word

    def add(self, row: SamplingRow) -> tuple[int, int, int, int, int, int]:
        """Where the row's bans, biases and seen tokens begin, each with its length."""
        params = row.params
        if not params.changes_logits(row.position):
            return (0,) * 6
        self.slot += 1
        bans = params.stop_token_ids if params.bans_stops(row.position) else ()
        biases = params.logit_bias
        places = [self._append(np.fromiter(bans, np.int32, len(bans))), len(bans)]
        places += [self._append(np.fromiter(biases, np.int32, len(biases))), len(biases)]
        self._append(np.fromiter(biases.values(), np.float32, len(biases)).view(np.int32))
        if not params.has_penalties:
            return places[0], places[1], places[2], places[3], 0, 0
        if row.counts is None:
            raise ValueError("a row with penalties needs the counts of its tokens")
        seen = self._append(row.counts.ids.astype(np.int32))
        self._append(row.counts.counts.view(np.int32))
        return places[0], places[1], places[2], places[3], seen, len(row.counts.ids)

    def _append(self, words: NDArray[np.int32]) -> int:
        start = self._end
        self.parts.append(words)
        self._end += len(words)
        return start


def _top_logits(logits: Tensor, rows: Sequence[SamplingRow]) -> _TopLogits | None:
    """Of the rows that want other tokens than their own beside it."""
    wanted = {index: row.params.logprobs for index, row in enumerate(rows) if row.params.logprobs}
    if not wanted:
        return None
    indices = list(wanted)
    chosen = logits.index_select(0, _to_device(torch.tensor(indices), logits.device))
    top = chosen.float().topk(min(max(wanted.values()), logits.shape[1]))
    return _TopLogits(indices, _to_host(top.values), _to_host(top.indices))


def _to_device(values: Tensor, device: torch.device) -> Tensor:
    if device.type != "cuda":
        return values
    return values.pin_memory().to(device, non_blocking=True)


def _to_host(values: Tensor) -> Tensor:
    """On its way; there when an event that is recorded from now on has been reached."""
    if not values.is_cuda:
        return values
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return host.copy_(values, non_blocking=True)

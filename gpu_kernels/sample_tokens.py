"""Choosing a token for each row of logits on one GPU, in two launches, or three where logits are changed first.

The meaning is that of ``segue.engine.sampling.sample``, whose torch code is the reference: what changes logits, in
which order, the filters, and the race that draws. Sums are in another order, so a draw differs where two tokens are
within float rounding of each other in the race or at a filter's edge. Rows without filters cost one pass over their
logits, and those with min_p a second; rows with top_k or top_p read theirs three or four times, and bisect the keys
that may be the edge.

Everything that depends on the batch is one table on the device: the call neither synchronises nor recompiles when it
changes, and a row's result depends on that row alone, to the bit.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import triton
from torch import Tensor
from triton import knobs

from segue.gpu_kernels.sample_tokens_kernels import choose_kernel, edit_kernel, scan_kernel
from segue.gpu_kernels.sample_tokens_search import LARGEST_KEY

GROUP_TOKENS = 256
_TILE_GROUPS = 16
_LIST_ENTRIES = 256
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

ROW_DTYPE = np.dtype(
    [
        ("seed", "<u8"),
        ("position", "<u4"),
        ("sample", "<u4"),
        ("temperature", "<f4"),
        ("top_k", "<i4"),
        ("min_p_distance", "<f4"),
        ("is_greedy", "<i4"),
        ("wants_logprob", "<i4"),
        ("edit_slot", "<i4"),
        ("search_slot", "<i4"),
        ("bans", "<i4"),
        ("ban_count", "<i4"),
        ("biases", "<i4"),
        ("bias_count", "<i4"),
        ("seen", "<i4"),
        ("seen_count", "<i4"),
        ("repetition_penalty", "<f4"),
        ("frequency_penalty", "<f4"),
        ("presence_penalty", "<f4"),
        ("top_p", "<f8"),
    ]
)
"""A row of the table, 22 words.

``temperature`` is above 0 for rows that draw. ``top_k`` 0 and ``top_p`` 1 filter nothing; ``min_p_distance`` is
-log(min_p), or ``NO_DISTANCE``. ``edit_slot`` numbers the rows with bans, biases or penalties, ``search_slot`` those
with top_k or top_p; -1 for others. ``bans``, ``biases`` and ``seen`` are word offsets into the table: of ban_count
token ids; of bias_count ids and then as many float32; of the ids of the tokens so far and then how often each was
generated, float32. An id comes once in each list.
"""

ROW_WORDS = ROW_DTYPE.itemsize // 4
NO_DISTANCE = float(np.int32(LARGEST_KEY).view(np.float32))


class Chosen(NamedTuple):
    """``token_ids`` int64 [rows], 0 where no token can be chosen.

    ``results`` is float64 [rows, 4] for one copy to the host: the token or -1; and, where asked for, the token's log
    probability, the greatest logit m, and log(sum(exp(logits - m))), all of the logits as given.
    """

    token_ids: Tensor
    results: Tensor


def sample_tokens(logits: Tensor, table: Tensor, *, edited_rows: int, searched_rows: int) -> Chosen:
    """Choose a token for each row of ``logits`` [rows, vocab] (float32, bfloat16 or float16), left as they are.

    ``table`` is int32 [words] on the same device: ``rows`` rows of ``ROW_DTYPE`` and the lists that they name.
    ``edited_rows`` and ``searched_rows`` are how many edit and search slots it uses; each takes a copy of a row in
    32 bits. What the table says is not checked. Raises ValueError for a wrong shape, dtype or device.
    """
    _check(logits, table)
    rows, vocab = logits.shape
    groups = triton.cdiv(vocab, GROUP_TOKENS)
    device = logits.device
    token_ids = torch.empty(rows, dtype=torch.int64, device=device)
    results = torch.empty(rows, 4, dtype=torch.float64, device=device)
    if not rows:
        return Chosen(token_ids, results)
    # The greatest logit and the sum of each group: of the row as it is drawn from, then as it was given.
    workspace = torch.empty(rows, 4, groups, dtype=torch.float32, device=device)
    edited = torch.empty(max(edited_rows, 1), vocab if edited_rows else 1, dtype=torch.float32, device=device)
    scratch = torch.empty(max(searched_rows, 1), vocab if searched_rows else 1, dtype=torch.int32, device=device)
    interpreted = knobs.runtime.interpret
    stride, tiles = logits.stride(0), triton.cdiv(groups, _TILE_GROUPS)
    if edited_rows:
        edit_kernel[(rows, tiles)](
            logits, stride, table, edited, vocab=vocab, tile=_TILE_GROUPS * GROUP_TOKENS, entries=_LIST_ENTRIES,
            row_words=ROW_WORDS, interpreted=interpreted, num_warps=8,
        )  # fmt: skip
    scan_kernel[(rows, tiles)](
        logits, stride, table, edited, workspace, vocab=vocab, groups=groups, tile_groups=_TILE_GROUPS,
        row_words=ROW_WORDS, num_warps=8,
    )  # fmt: skip
    choose_kernel[(rows,)](
        logits, stride, table, edited, workspace, scratch, token_ids, results, vocab=vocab, groups=groups,
        group_block=triton.next_power_of_2(groups), tile_groups=_TILE_GROUPS, row_words=ROW_WORDS,
        interpreted=interpreted, num_warps=16,
    )  # fmt: skip
    return Chosen(token_ids, results)


def _check(logits: Tensor, table: Tensor) -> None:
    if not logits.is_cuda and not knobs.runtime.interpret:
        raise ValueError(f"logits: the kernels need a CUDA device, they are on {logits.device}")
    if table.device != logits.device:
        raise ValueError(f"table: is on {table.device}, logits on {logits.device}")
    if logits.dim() != 2 or logits.dtype not in _DTYPES or logits.shape[1] < 1 or logits.stride(1) != 1:
        raise ValueError(f"logits: need [rows, vocab] of {_DTYPES}, are {logits.dtype} {list(logits.shape)}")
    if table.dim() != 1 or table.dtype != torch.int32 or len(table) < len(logits) * ROW_WORDS:
        raise ValueError(
            f"table: must be int32 [at least {len(logits) * ROW_WORDS}], is {table.dtype} {list(table.shape)}"
        )

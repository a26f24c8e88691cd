"""Attention over paged KV against a softmax written out row by row, over windows, page sizes and mixes of rows."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from segue.engine.attention import AttentionPlan, paged_attention, write_kv
from segue.engine.batch import SequenceInput, build_batch

HEADS, KV_HEADS, HEAD_DIM = 6, 3, 8
MIX = [(0, 1), (0, 37), (200, 1), (16, 16), (15, 1), (63, 1), (64, 1), (65, 2), (100, 29), (31, 1), (47, 3)]


def expected_row(q: Tensor, k: Tensor, v: Tensor, position: int, window: int | None) -> Tensor:
    """One row's q [heads, head_dim] over its sequence's k and v [tokens, kv_heads, head_dim], in float64."""
    first = 0 if window is None else max(0, position - window + 1)
    out = []
    for head in range(HEADS):
        seen = slice(first, position + 1), head // (HEADS // KV_HEADS)
        probabilities = (k[seen].double() @ q[head].double() / HEAD_DIM**0.5).softmax(0)
        out.append(probabilities @ v[seen].double())
    return torch.stack(out)


@pytest.mark.parametrize("page_tokens", [1, 8, 16])
@pytest.mark.parametrize("window", [None, 1, 2, 7, 8, 16, 17, 50, 201, 202, 10_000])
def test_every_row_sees_its_window(window: int | None, page_tokens: int) -> None:
    """(context, rows) of eleven sequences in one batch; slots without a token and pages before the window are NaN."""
    generator, deal = torch.Generator().manual_seed(0), random.Random(0)
    counts = [-(-(context + rows) // page_tokens) for context, rows in MIX]
    pages = deal.sample(range(sum(counts) + 5), sum(counts))
    kv = torch.full((sum(counts) + 5, 2, page_tokens, KV_HEADS, HEAD_DIM), torch.nan)
    inputs, sequences = [], []
    for (context, rows), count in zip(MIX, counts, strict=True):
        own, pages = pages[:count], pages[count:]
        k, v = torch.randn(2, context + rows, KV_HEADS, HEAD_DIM, generator=generator)
        sequences.append((k, v))
        unseen = 0 if window is None else max(0, context - window + 1) // page_tokens * page_tokens
        slots = torch.arange(unseen, context)
        write_kv(kv, torch.tensor(own)[slots // page_tokens], slots % page_tokens, k[unseen:context], v[unseen:context])
        inputs.append(SequenceInput(token_ids=[0] * rows, context_tokens=context, pages=own))
    batch = build_batch(inputs, page_tokens)
    fresh = [torch.cat([pair[half][-rows:] for pair, (_, rows) in zip(sequences, MIX, strict=True)]) for half in (0, 1)]
    write_kv(kv, batch.slot_pages, batch.slot_offsets, *fresh)
    q = torch.randn(len(batch.token_ids), HEADS, HEAD_DIM, generator=generator)
    out = paged_attention(q, kv, AttentionPlan.of(batch, page_tokens, window))
    row = 0
    for (k, v), (context, rows) in zip(sequences, MIX, strict=True):
        for position in range(context, context + rows):
            torch.testing.assert_close(
                out[row].double(), expected_row(q[row], k, v, position, window), rtol=0, atol=1e-5
            )
            row += 1
    assert row == len(out)


def test_decode_reads_only_pages_of_the_window() -> None:
    batch = build_batch([SequenceInput(token_ids=[0], context_tokens=1000, pages=list(range(63)))], page_tokens=16)
    (group,) = AttentionPlan.of(batch, 16, window=20).decodes
    assert group.page_tables.tolist() == [[61, 62]]
    assert (~group.hidden).sum() == 20

"""The launches of ``sample_tokens``: edit rows, scan all rows in pieces, and choose, one program a row.

Tokens are in groups of 256 neighbours, as in the race of ``segue.engine.draw``: a scan leaves the greatest logit and
the sum of weights of each group, and the choice is between groups and then within one. A row's numbers are the same in
every batch: nothing is split or added in an order that depends on other rows.
"""

from __future__ import annotations

import triton
from triton import language as tl

from segue.gpu_kernels.paged_rows import loop_bound
from segue.gpu_kernels.sample_tokens_search import find_edge, key_weights, load_row, row_keys


@triton.jit
def edit_kernel(
    logits: tl.tensor,
    stride: tl.tensor,
    table: tl.tensor,
    edited: tl.tensor,
    vocab: tl.constexpr,
    tile: tl.constexpr,
    entries: tl.constexpr,
    row_words: tl.constexpr,
    interpreted: tl.constexpr,
) -> None:
    """Program (row, t) copies tile t of a row that is to be changed, and changes the copy: bans, biases, penalties."""
    entry = table + tl.program_id(0) * row_words
    slot = tl.load(entry + 9)
    if slot >= 0:
        start = tl.program_id(1) * tile
        stop = tl.minimum(start + tile, vocab)
        ids = start + tl.arange(0, tile)  # [tile]
        source = logits + tl.program_id(0).to(tl.int64) * stride + ids
        target = edited + slot.to(tl.int64) * vocab
        tl.store(target + ids, tl.load(source, mask=ids < vocab, other=0.0).to(tl.float32), mask=ids < vocab)
        # Each change reads what another thread may have written.
        tl.debug_barrier()
        bans = table + tl.load(entry + 11)
        ban_count = tl.load(entry + 12)
        for done in range(0, loop_bound(ban_count, interpreted), entries):
            place = done + tl.arange(0, entries)  # [entries]
            token = tl.load(bans + place, mask=place < ban_count, other=-1)  # [entries]
            banned = tl.zeros((entries,), dtype=tl.float32) + float("-inf")  # [entries]
            tl.store(target + token, banned, mask=(token >= start) & (token < stop))
        tl.debug_barrier()
        biases = table + tl.load(entry + 13)
        bias_count = tl.load(entry + 14)
        for done in range(0, loop_bound(bias_count, interpreted), entries):
            place = done + tl.arange(0, entries)  # [entries]
            token = tl.load(biases + place, mask=place < bias_count, other=-1)  # [entries]
            own = (token >= start) & (token < stop)
            bias = tl.load(biases + bias_count + place, mask=own, other=0).to(tl.float32, bitcast=True)  # [entries]
            tl.store(target + token, tl.load(target + token, mask=own, other=0.0) + bias, mask=own)
        tl.debug_barrier()
        seen = table + tl.load(entry + 15)
        seen_count = tl.load(entry + 16)
        repetition = tl.load(entry + 17).to(tl.float32, bitcast=True)
        frequency = tl.load(entry + 18).to(tl.float32, bitcast=True)
        presence = tl.load(entry + 19).to(tl.float32, bitcast=True)
        for done in range(0, loop_bound(seen_count, interpreted), entries):
            place = done + tl.arange(0, entries)  # [entries]
            token = tl.load(seen + place, mask=place < seen_count, other=-1)  # [entries]
            own = (token >= start) & (token < stop)
            times = tl.load(seen + seen_count + place, mask=own, other=0).to(tl.float32, bitcast=True)  # [entries]
            x = tl.load(target + token, mask=own, other=0.0)  # [entries]
            x = tl.where(x < 0, x * repetition, tl.div_rn(x, tl.zeros_like(x) + repetition))
            x = x - frequency * times - presence * (times > 0).to(tl.float32)
            tl.store(target + token, x, mask=own)


@triton.jit
def _scan(
    x: tl.tensor,
    scale: tl.tensor,
    needs_sums: tl.tensor,
    maxima: tl.tensor,
    sums: tl.tensor,
    group: tl.tensor,
    groups: tl.constexpr,
) -> None:
    """Of ``x`` [G, 256]: each group's greatest, NaN if one is NaN or +inf, and its weights' sum relative to that."""
    is_bad = (x != x) | (x == float("inf"))  # [G, 256]
    x = tl.where(is_bad, float("-inf"), x)
    best = tl.max(x, 1)  # [G]
    marked = tl.where(tl.max(is_bad.to(tl.int32), 1) > 0, float("nan"), best)  # [G]
    tl.store(maxima + group, marked, mask=group < groups)
    if needs_sums:
        base = tl.where(best == float("-inf"), 0.0, best)
        weights = tl.where(x == float("-inf"), 0.0, tl.exp((x - base[:, None]) * scale))  # [G, 256]
        tl.store(sums + group, tl.sum(weights, 1), mask=group < groups)


@triton.jit
def scan_kernel(
    logits: tl.tensor,
    stride: tl.tensor,
    table: tl.tensor,
    edited: tl.tensor,
    workspace: tl.tensor,
    vocab: tl.constexpr,
    groups: tl.constexpr,
    tile_groups: tl.constexpr,
    row_words: tl.constexpr,
) -> None:
    """Program (row, t) scans ``tile_groups`` groups of a row; workspace is [rows, 4, groups], see ``sample_tokens``."""
    row = tl.program_id(0)
    entry = table + row * row_words
    slot = tl.load(entry + 9)
    group = tl.program_id(1) * tile_groups + tl.arange(0, tile_groups)  # [tile_groups]
    ids = group[:, None] * 256 + tl.arange(0, 256)[None, :]  # [tile_groups, 256]
    own = workspace + row.to(tl.int64) * 4 * groups
    x = load_row(logits, stride, edited, row, slot, ids, vocab)  # [tile_groups, 256]
    scale = 1.0 / tl.load(entry + 4).to(tl.float32, bitcast=True)
    _scan(x, scale, tl.load(entry + 7) == 0, own, own + groups, group, groups)
    wants_logprob = tl.load(entry + 8) == 1
    if (slot >= 0) | wants_logprob:
        given = load_row(logits, stride, edited, row, slot * 0 - 1, ids, vocab)  # [tile_groups, 256]
        _scan(given, scale * 0.0 + 1.0, wants_logprob, own + 2 * groups, own + 3 * groups, group, groups)


@triton.jit
def _race_times(entry: tl.tensor, numbers: tl.tensor) -> tl.tensor:
    """-log of the uniform ``numbers`` of a row's place, float64: Philox4x32-10 as in ``segue.engine.philox``."""
    key_even = tl.load(entry).to(tl.int64) & 0xFFFFFFFF
    key_odd = tl.load(entry + 1).to(tl.int64) & 0xFFFFFFFF
    zero = (numbers * 0).to(tl.int64)
    c0 = (numbers // 4).to(tl.int64)
    c1 = zero
    c2 = zero + (tl.load(entry + 2).to(tl.int64) & 0xFFFFFFFF)
    c3 = zero + (tl.load(entry + 3).to(tl.int64) & 0xFFFFFFFF)
    for _ in tl.static_range(10):
        # Words of 32 bits: int64 wraps, which leaves the bits of the product as they should be.
        first = c0 * 0xD2511F53
        second = c2 * 0xCD9E8D57
        c0 = ((second >> 32) & 0xFFFFFFFF) ^ c1 ^ key_even
        c2 = ((first >> 32) & 0xFFFFFFFF) ^ c3 ^ key_odd
        c1 = second & 0xFFFFFFFF
        c3 = first & 0xFFFFFFFF
        key_even = (key_even + 0x9E3779B9) & 0xFFFFFFFF
        key_odd = (key_odd + 0xBB67AE85) & 0xFFFFFFFF
    word = numbers % 4
    words = tl.where(word == 0, c0, tl.where(word == 1, c1, tl.where(word == 2, c2, c3)))
    return -tl.log((words.to(tl.float64) + 0.5) * 2.3283064365386963e-10)


@triton.jit
def _is_kept(key: tl.tensor, ids: tl.tensor, edge: tl.tensor, last_id: tl.tensor) -> tl.tensor:
    return (key < edge) | ((key == edge) & (ids <= last_id))


@triton.jit
def _sum_kept(
    logits: tl.tensor,
    stride: tl.tensor,
    edited: tl.tensor,
    row: tl.tensor,
    slot: tl.tensor,
    best: tl.tensor,
    temperature: tl.tensor,
    edge: tl.tensor,
    last_id: tl.tensor,
    sums: tl.tensor,
    vocab: tl.constexpr,
    groups: tl.constexpr,
    tile_groups: tl.constexpr,
) -> None:
    """Write the weights that are kept of each group, relative to the row's best, to ``sums`` [groups]."""
    for first in range(0, groups, tile_groups):
        group = first + tl.arange(0, tile_groups)  # [tile_groups]
        ids = group[:, None] * 256 + tl.arange(0, 256)[None, :]  # [tile_groups, 256]
        key = row_keys(best, load_row(logits, stride, edited, row, slot, ids, vocab), temperature)
        weights = tl.where(_is_kept(key, ids, edge, last_id), key_weights(key), 0.0)  # [tile_groups, 256]
        tl.store(sums + group, tl.sum(weights, 1), mask=group < groups)
    tl.debug_barrier()


@triton.jit
def choose_kernel(
    logits: tl.tensor,
    stride: tl.tensor,
    table: tl.tensor,
    edited: tl.tensor,
    workspace: tl.tensor,
    scratch: tl.tensor,
    token_ids: tl.tensor,
    results: tl.tensor,
    vocab: tl.constexpr,
    groups: tl.constexpr,
    group_block: tl.constexpr,
    tile_groups: tl.constexpr,
    row_words: tl.constexpr,
    interpreted: tl.constexpr,
) -> None:
    """One program a row: the filters' edge where there are filters, the race, and the log probability."""
    row = tl.program_id(0)
    entry = table + row * row_words
    slot = tl.load(entry + 9)
    wants_logprob = tl.load(entry + 8) == 1
    own = workspace + row.to(tl.int64) * 4 * groups
    group = tl.arange(0, group_block)  # [group_block]
    known = group < groups
    maxima = tl.load(own + group, mask=known, other=float("-inf"))  # [group_block]
    bad = tl.sum((maxima != maxima).to(tl.int32))
    given_best = tl.zeros((), dtype=tl.float32)
    log_sum = tl.zeros((), dtype=tl.float32)
    if (slot >= 0) | wants_logprob:
        given = tl.load(own + 2 * groups + group, mask=known, other=float("-inf"))  # [group_block]
        bad += tl.sum((given != given).to(tl.int32))
        if wants_logprob:
            given_best = tl.max(given)
            sums = tl.load(own + 3 * groups + group, mask=known, other=0.0)  # [group_block]
            log_sum = tl.log(tl.sum(sums * tl.exp(given - given_best)))
    best = tl.max(maxima)
    token = tl.zeros((), dtype=tl.int32)
    is_usable = (bad == 0) & (best > float("-inf")) & (best < float("inf"))
    if is_usable:
        temperature = tl.load(entry + 4).to(tl.float32, bitcast=True)
        edge = tl.load(entry + 6)
        last_id = edge * 0 + vocab
        if tl.load(entry + 7) == 1:
            winner = tl.argmax(maxima, 0)
            ids = winner * 256 + tl.arange(0, 256)  # [256]
            x = load_row(logits, stride, edited, row, slot, ids, vocab)  # [256]
            token = tl.min(tl.where(x == best, ids, vocab))
        else:
            group_keys = row_keys(best, maxima, temperature)  # [group_block]
            weights = tl.load(own + groups + group, mask=known, other=0.0) * key_weights(group_keys)  # [group_block]
            top_k = tl.load(entry + 5)
            low_word = tl.load(entry + 20).to(tl.int64) & 0xFFFFFFFF
            top_p = (low_word | (tl.load(entry + 21).to(tl.int64) << 32)).to(tl.float64, bitcast=True)
            if (top_k > 0) | (top_p < 1.0):
                keys = scratch + tl.load(entry + 10).to(tl.int64) * vocab
                edge, last_id = find_edge(
                    logits, stride, edited, row, slot, best, temperature, group_keys, tl.sum(weights.to(tl.float64)),
                    edge, top_k, top_p, keys, vocab, tile_groups * 256, interpreted,
                )  # fmt: skip
            if edge < 0x7F7FFFFF:
                _sum_kept(
                    logits, stride, edited, row, slot, best, temperature, edge, last_id, own + groups, vocab, groups,
                    tile_groups,
                )  # fmt: skip
                weights = tl.load(own + groups + group, mask=known, other=0.0)  # [group_block]
            winner = tl.argmax(weights.to(tl.float64) / _race_times(entry, 256 + group), 0)
            place = tl.arange(0, 256)  # [256]
            ids = winner * 256 + place
            x = load_row(logits, stride, edited, row, slot, ids, vocab)  # [256]
            kept = _is_kept(row_keys(best, x, temperature), ids, edge, last_id)  # [256]
            # Relative to the group's best, so that a group that was drawn has a token, however unlikely.
            members = tl.where(kept, key_weights(row_keys(tl.max(x), x, temperature)), 0.0)  # [256]
            token = winner * 256 + tl.argmax(members.to(tl.float64) / _race_times(entry, place), 0)
    tl.store(token_ids + row, token.to(tl.int64))
    logprob = tl.load(logits + row.to(tl.int64) * stride + token).to(tl.float32) - given_best - log_sum
    result = results + row.to(tl.int64) * 4
    tl.store(result, tl.where(is_usable, token, -1).to(tl.float64))
    tl.store(result + 1, logprob.to(tl.float64))
    tl.store(result + 2, given_best.to(tl.float64))
    tl.store(result + 3, log_sum.to(tl.float64))

"""Which tokens of a row the filters min_p, top_k and top_p keep, found without sorting the row.

A token's key is how far its score lies below the row's best, as the bits of a float32 that is not negative: such bits
are ordered as the numbers are, so the k-th score or the edge of the nucleus is a bisection over integers. Only keys
below a bound that certainly holds the edge are collected, once, and bisected.

One program does a row. All sums are in one order that depends on nothing but the row.
"""

from __future__ import annotations

import triton
from triton import language as tl

from segue.gpu_kernels.paged_rows import loop_bound

LARGEST_KEY = 0x7F7FFFFF  # the largest finite float32; the key of a token that cannot be drawn is infinity's


@triton.jit
def load_row(
    logits: tl.tensor,
    stride: tl.tensor,
    edited: tl.tensor,
    row: tl.tensor,
    slot: tl.tensor,
    ids: tl.tensor,
    vocab: tl.constexpr,
) -> tl.tensor:
    """Logits like ``ids``, float32: row ``slot`` of ``edited`` if that is at least 0. -inf behind the vocabulary."""
    # The interpreter makes integers of a scalar condition that is broadcast, and takes no mask of integers.
    slots = slot + ids * 0  # like ids
    inside = ids < vocab
    given = logits + row.to(tl.int64) * stride + ids
    values = tl.load(given, mask=inside & (slots < 0), other=float("-inf")).to(tl.float32)
    changed = edited + tl.maximum(slot, 0).to(tl.int64) * vocab + ids
    return tl.where(slots < 0, values, tl.load(changed, mask=inside & (slots >= 0), other=float("-inf")))


@triton.jit
def row_keys(best: tl.tensor, x: tl.tensor, temperature: tl.tensor) -> tl.tensor:
    """Keys like ``x``, int32. The quotient is rounded as torch rounds it, so that equal scores stay equal."""
    return tl.div_rn(best - x, tl.zeros_like(x) + temperature).to(tl.int32, bitcast=True)


@triton.jit
def key_weights(keys: tl.tensor) -> tl.tensor:
    """The weights of tokens with these keys: 1 for the row's best, 0 for the key of infinity."""
    return tl.exp(-keys.to(tl.float32, bitcast=True))


@triton.jit
def _measure(
    keys: tl.tensor,
    count: tl.tensor,
    limit: tl.tensor,
    by_mass: tl.constexpr,
    tile: tl.constexpr,
    interpreted: tl.constexpr,
) -> tl.tensor:
    """How many of ``keys`` [count] are at most ``limit``, or how much they weigh: float64. Grows with ``limit``."""
    total = tl.zeros((tile,), dtype=tl.float32)  # [tile]
    for start in range(0, loop_bound(count, interpreted), tile):
        place = start + tl.arange(0, tile)  # [tile]
        key = tl.load(keys + place, mask=place < count, other=0x7F800000)  # [tile]
        if by_mass:
            total += tl.where(key <= limit, key_weights(key), 0.0)
        else:
            total += tl.where(key <= limit, 1.0, 0.0)
    return tl.sum(total.to(tl.float64))


@triton.jit
def _search(
    keys: tl.tensor,
    count: tl.tensor,
    limit: tl.tensor,
    wanted: tl.tensor,
    by_mass: tl.constexpr,
    tile: tl.constexpr,
    interpreted: tl.constexpr,
) -> tl.tensor:
    """The smallest key up to which there is as much as is ``wanted``; ``limit`` where there is not."""
    low = limit * 0 - 1
    high = limit
    while high - low > 1:
        middle = low + (high - low) // 2
        is_reached = _measure(keys, count, middle, by_mass, tile, interpreted) >= wanted
        high = tl.where(is_reached, middle, high)
        low = tl.where(is_reached, low, middle)
    return high


@triton.jit
def _kth_group_key(group_keys: tl.tensor, limit: tl.tensor, rank: tl.tensor) -> tl.tensor:
    """The ``rank``-th smallest of the groups' best keys, which the row's ``rank``-th smallest does not exceed."""
    low = limit * 0 - 1
    high = limit
    while high - low > 1:
        middle = low + (high - low) // 2
        is_reached = tl.sum((group_keys <= middle).to(tl.int32)) >= rank
        high = tl.where(is_reached, middle, high)
        low = tl.where(is_reached, low, middle)
    return high


@triton.jit
def _collect(
    logits: tl.tensor,
    stride: tl.tensor,
    edited: tl.tensor,
    row: tl.tensor,
    slot: tl.tensor,
    best: tl.tensor,
    temperature: tl.tensor,
    bound: tl.tensor,
    keys: tl.tensor,
    vocab: tl.constexpr,
    tile: tl.constexpr,
) -> tl.tensor:
    """Write the keys up to ``bound`` to ``keys``, in the order of the tokens' ids, and return how many there are."""
    filled = bound * 0
    for start in range(0, vocab, tile):
        ids = start + tl.arange(0, tile)  # [tile]
        key = row_keys(best, load_row(logits, stride, edited, row, slot, ids, vocab), temperature)  # [tile]
        is_near = (key <= bound).to(tl.int32)  # [tile]
        tl.store(keys + filled + tl.cumsum(is_near, 0) - 1, key, mask=is_near > 0)
        filled += tl.sum(is_near)
    # Other threads read what these have written.
    tl.debug_barrier()
    return filled


@triton.jit
def _last_kept_id(
    logits: tl.tensor,
    stride: tl.tensor,
    edited: tl.tensor,
    row: tl.tensor,
    slot: tl.tensor,
    best: tl.tensor,
    temperature: tl.tensor,
    edge: tl.tensor,
    kept: tl.tensor,
    vocab: tl.constexpr,
    tile: tl.constexpr,
) -> tl.tensor:
    """The id of the ``kept``-th token whose key is ``edge``."""
    passed = edge * 0
    last = edge * 0
    for start in range(0, vocab, tile):
        ids = start + tl.arange(0, tile)  # [tile]
        key = row_keys(best, load_row(logits, stride, edited, row, slot, ids, vocab), temperature)  # [tile]
        at_edge = (key == edge).to(tl.int32)  # [tile]
        is_kept = (at_edge > 0) & (passed + tl.cumsum(at_edge, 0) <= kept)
        last = tl.maximum(last, tl.max(tl.where(is_kept, ids, 0)))
        passed += tl.sum(at_edge)
    return last


@triton.jit
def find_edge(
    logits: tl.tensor,
    stride: tl.tensor,
    edited: tl.tensor,
    row: tl.tensor,
    slot: tl.tensor,
    best: tl.tensor,
    temperature: tl.tensor,
    group_keys: tl.tensor,
    all_mass: tl.tensor,
    limit: tl.tensor,
    top_k: tl.tensor,
    top_p: tl.tensor,
    keys: tl.tensor,
    vocab: tl.constexpr,
    tile: tl.constexpr,
    interpreted: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The key of the last token that top_k and top_p keep, and the last id that is kept of those with this key.

    ``group_keys`` [groups] are the smallest key of each group, ``all_mass`` is the weight of the whole row, and
    ``limit`` the largest key that min_p keeps; ``top_p`` and masses are float64. ``keys`` int32 [vocab] is scratch.
    """
    is_first_filter = (top_k == 0) & (limit == 0x7F7FFFFF)
    bound = limit
    if top_k > 0:
        bound = _kth_group_key(group_keys, limit, top_k)
    if is_first_filter:
        # The last token kept and those after it weigh more than (1 - top_p) of all, and it is the heaviest of them.
        share = tl.maximum((1.0 - top_p) * all_mass / vocab, 1e-37).to(tl.float32)
        furthest = 1e-3 - tl.log(share)
        bound = tl.minimum(bound, tl.maximum(furthest, 0.0).to(tl.int32, bitcast=True))
    count = _collect(logits, stride, edited, row, slot, best, temperature, bound, keys, vocab, tile)
    edge = bound
    last_id = bound * 0 + vocab
    if top_k > 0:
        edge = _search(keys, count, bound, top_k.to(tl.float64), False, tile, interpreted)
    if top_p < 1.0:
        mass = all_mass
        if not is_first_filter:
            mass = _measure(keys, count, edge, True, tile, interpreted)
        target = top_p * mass
        edge = _search(keys, count, edge, target, True, tile, interpreted)
        before = edge - 1
        left = target - _measure(keys, count, before, True, tile, interpreted)
        kept = tl.ceil(left / tl.maximum(key_weights(edge), 1e-37).to(tl.float64))
        at_edge = _measure(keys, count, edge, False, tile, interpreted)
        at_edge -= _measure(keys, count, before, False, tile, interpreted)
        if kept < at_edge:
            whole = tl.maximum(kept, 1.0).to(tl.int32)
            last_id = _last_kept_id(
                logits, stride, edited, row, slot, best, temperature, edge, whole, vocab, tile
            )  # fmt: skip
    return edge, last_id

"""Register-tiled micro-kernels, written in LLVM IR through numba.

Loops in plain numba reach 17 GFLOP/s on a core where these reach 150 in float32 and numpy's BLAS 115: LLVM neither
keeps a tile of accumulators in registers nor shares their final sums. All multiply ``X @ W^T`` with X and W row-major
along the common axis, as LoRA's shrink and expand need it.

- ``dot_tiles_MxN``: tiles of M rows of X by N rows of W. Sixteen vector accumulators run along the common axis; their
  horizontal sums are taken together, 45 operations for all sixteen. For long common axes, or few rows of X. One row
  takes 2x8 as well, where the weights' way from memory is what takes time.
- ``outer_tile``: LANES rows of X (given transposed) by LANES rows of W. Each accumulator holds one row of W for all
  rows of X, and the tile is transposed in registers at the end. For short common axes: nothing is summed across lanes.

Each comes for float32 and for pairs of bfloat16 (``pairs``), which the CPU multiplies and adds in float32 two at a time
where it can (AVX-512 BF16). A dot tile of float32 rows also reads 16-bit weights in place, widened on the way into the
register.

Rows beyond the last valid one are computed from the last valid one, never read; their results must find room in the
destination. No fast-math flag is set that would assume away NaN or infinity.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from segue.compiled import types
from segue.cpu_lora.native import intrinsic, ir
from segue.cpu_lora.vectors import I16, I32, I64, LANES, VECTOR, Emitter, data, loop, only_if

TILE = 4
SUMS = 16

_HALF_VECTOR = ir.VectorType(I16, LANES)
_PAIR_VECTOR = ir.VectorType(I16, 2 * LANES)
_WORD_VECTOR = ir.VectorType(I32, LANES)


@dataclass(frozen=True, slots=True)
class _Operand:
    """How elements in memory become a register: load vectors of ``kind``, then ``widen`` them."""

    kind: Any
    widen: Callable[[Emitter, Any], Any]

    def load(self, emit: Emitter, rows: list[Any], at: Any) -> list[Any]:
        return [self.widen(emit, emit.load(emit.at(row, at), self.kind)) for row in rows]

    def load_first(self, emit: Emitter, rows: list[Any], at: Any, count: Any) -> list[Any]:
        return [self.widen(emit, emit.load_first(emit.at(row, at), count, self.kind)) for row in rows]


_FLOAT32 = _Operand(VECTOR, lambda _, vector: vector)
_BFLOAT16 = _Operand(_HALF_VECTOR, Emitter.widened_bfloat16)
_FLOAT16 = _Operand(_HALF_VECTOR, Emitter.widened_float16)
_PAIRS = _Operand(_PAIR_VECTOR, lambda emit, vector: emit.builder.bitcast(vector, _WORD_VECTOR))


def _dot_tiles(x_count: int, x_operand: _Operand, w_operand: _Operand) -> Any:
    """Tiles of ``x_count`` rows of X and SUMS / x_count rows of W."""
    w_count = SUMS // x_count
    lanes = w_operand.kind.count
    multiply = Emitter.add_pair_products if w_operand is _PAIRS else Emitter.fma

    def products(emit: Emitter, xs: list[Any], ws: list[Any], sums: list[Any]) -> list[Any]:
        return [multiply(emit, x, w, sums[i * w_count + j]) for i, x in enumerate(xs) for j, w in enumerate(ws)]

    def tile_sums(emit: Emitter, xs: list[Any], ws: list[Any], depth: Any) -> list[Any]:
        whole = emit.builder.and_(depth, I64(-lanes))

        def step(k: Any, sums: list[Any]) -> list[Any]:
            x_vectors = x_operand.load(emit, xs, k)  # [x_count, lanes]
            return products(emit, x_vectors, w_operand.load(emit, ws, k), sums)

        def rest(sums: list[Any]) -> list[Any]:
            left = emit.builder.sub(depth, whole)
            x_vectors = x_operand.load_first(emit, xs, whole, left)
            return products(emit, x_vectors, w_operand.load_first(emit, ws, whole, left), sums)

        sums = loop(emit, whole, lanes, SUMS, step)
        return only_if(emit, emit.builder.icmp_signed("<", whole, depth), sums, rest)

    def dot_tiles(
        _typing: Any, x: Any, x_at: Any, x_stride: Any, x_rows: Any, w: Any, w_at: Any, w_stride: Any, w_rows: Any,
        depth: Any, out: Any, out_at: Any, out_stride: Any,
    ) -> Any:  # fmt: skip
        """``out[i, j] += dot(x[i, :depth], w[j, :depth])`` for all i < x_rows, j < w_rows, both up to whole tiles.

        Arrays are flat with an element offset and a row stride, ``out`` is float32.
        """

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            emit = Emitter(builder)
            _, x_at, x_stride, x_rows, _, w_at, w_stride, w_rows, depth, _, out_at, out_stride = args
            x, w, out = (data(context, builder, signature, args, position) for position in (0, 4, 9))

            def tile(i: Any, j: Any, ws: list[Any]) -> list[Any]:
                start = builder.add(x_at, builder.mul(i, x_stride))
                xs = emit.row_pointers(x, start, x_stride, builder.sub(x_rows, i), x_count)
                corner = emit.at(out, out_at, builder.mul(i, out_stride), j)
                _add_sums(emit, tile_sums(emit, xs, ws, depth), w_count, corner, out_stride)
                return []

            def column(j: Any, _: list[Any]) -> list[Any]:
                start = builder.add(w_at, builder.mul(j, w_stride))
                ws = emit.row_pointers(w, start, w_stride, builder.sub(w_rows, j), w_count)
                return loop(emit, x_rows, x_count, 0, lambda i, _: tile(i, j, ws))

            loop(emit, w_rows, w_count, 0, column)
            return context.get_dummy_value()

        return types.void(
            x, x_at, x_stride, x_rows, w, w_at, w_stride, w_rows, depth, out, out_at, out_stride
        ), generate  # fmt: skip

    return intrinsic(dot_tiles)


def _add_sums(emit: Emitter, sums: list[Any], columns: int, out: Any, out_stride: Any) -> None:
    """Add the horizontal sum of ``sums[i * columns + j]`` to ``out[i * out_stride + j]``."""
    vectors, sources = emit.sums(sums)
    place = {source: (v, lane) for v, row in enumerate(sources) for lane, source in enumerate(row)}
    width = min(columns, LANES)
    for first in range(0, len(sums), width):
        # Sums of LANES neighbours end in one vector.
        places = [place[first + j] for j in range(width)]
        vector = vectors[places[0][0]]
        part = emit.shuffle(vector, vector, [lane for _, lane in places])
        row, column = divmod(first, columns)
        pointer = emit.at(out, emit.builder.mul(I64(row), out_stride), I64(column))
        old = emit.load(pointer, ir.VectorType(ir.FloatType(), width))
        emit.store(emit.builder.fadd(old, part), pointer)


dot_tiles_2x8 = _dot_tiles(2, _FLOAT32, _FLOAT32)
dot_tiles_4x4 = _dot_tiles(4, _FLOAT32, _FLOAT32)
dot_tiles_2x8_bfloat16 = _dot_tiles(2, _FLOAT32, _BFLOAT16)
dot_tiles_4x4_bfloat16 = _dot_tiles(4, _FLOAT32, _BFLOAT16)
dot_tiles_2x8_float16 = _dot_tiles(2, _FLOAT32, _FLOAT16)
dot_tiles_4x4_float16 = _dot_tiles(4, _FLOAT32, _FLOAT16)
dot_tiles_2x8_pairs = _dot_tiles(2, _PAIRS, _PAIRS)
dot_tiles_4x4_pairs = _dot_tiles(4, _PAIRS, _PAIRS)


@intrinsic
def outer_tile(
    _typing: Any, xt: Any, xt_at: Any, w: Any, w_at: Any, w_stride: Any, w_rows: Any,
    depth: Any, out: Any, out_at: Any, out_stride: Any,
) -> Any:  # fmt: skip
    """``out[i, j] = dot(xt[:depth, i], w[j, :depth])`` for i, j in 0..LANES-1; writes LANES x LANES elements.

    ``xt`` is ``[depth, LANES]``, contiguous from ``xt_at``; ``w_rows`` (1 to LANES, or more) are the rows of w that
    exist.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit = Emitter(builder)
        _, xt_at, _, w_at, w_stride, w_rows, depth, _, out_at, out_stride = args
        x = emit.at(data(context, builder, signature, args, 0), xt_at)
        ws = emit.row_pointers(data(context, builder, signature, args, 2), w_at, w_stride, w_rows, LANES)

        def step(k: Any, sums: list[Any]) -> list[Any]:
            vector = emit.load(emit.at(x, builder.mul(k, I64(LANES))))  # [LANES]
            weights = [emit.broadcast(builder.load(emit.at(row, k))) for row in ws]  # [LANES] scalars
            return [emit.fma(vector, weight, total) for weight, total in zip(weights, sums, strict=True)]

        sums = loop(emit, depth, 1, LANES, step)
        _store_transposed(emit, sums, data(context, builder, signature, args, 7), out_at, out_stride)
        return context.get_dummy_value()

    return types.void(xt, xt_at, w, w_at, w_stride, w_rows, depth, out, out_at, out_stride), generate


@intrinsic
def outer_tile_pairs(
    _typing: Any, xt: Any, xt_at: Any, w: Any, w_at: Any, w_stride: Any, w_rows: Any,
    depth: Any, out: Any, out_at: Any, out_stride: Any,
) -> Any:  # fmt: skip
    """``outer_tile`` of bfloat16 bits: ``xt`` is ``[ceil(depth / 2), LANES, 2]``, zero beyond an odd depth."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit = Emitter(builder)
        _, xt_at, _, w_at, w_stride, w_rows, depth, _, out_at, out_stride = args
        x = emit.at(data(context, builder, signature, args, 0), xt_at)
        ws = emit.row_pointers(data(context, builder, signature, args, 2), w_at, w_stride, w_rows, LANES)

        def products(k: Any, weights: list[Any], sums: list[Any]) -> list[Any]:
            halves = emit.load(emit.at(x, builder.mul(k, I64(LANES))), _PAIR_VECTOR)
            vector = builder.bitcast(halves, _WORD_VECTOR)  # [LANES] pairs
            pairs = [emit.broadcast(weight) for weight in weights]
            return [emit.add_pair_products(vector, pair, total) for pair, total in zip(pairs, sums, strict=True)]

        def word(row: Any, k: Any) -> Any:
            value = builder.load(builder.bitcast(emit.at(row, k), I32.as_pointer()))
            value.align = 2
            return value

        whole = builder.and_(depth, I64(-2))
        sums = loop(emit, whole, 2, LANES, lambda k, sums: products(k, [word(row, k) for row in ws], sums))

        def rest(sums: list[Any]) -> list[Any]:
            # The neighbour of the last element is another row's, or nobody's: zero stands for it.
            return products(whole, [builder.zext(builder.load(emit.at(row, whole)), I32) for row in ws], sums)

        sums = only_if(emit, builder.icmp_signed("<", whole, depth), sums, rest)
        _store_transposed(emit, sums, data(context, builder, signature, args, 7), out_at, out_stride)
        return context.get_dummy_value()

    return types.void(xt, xt_at, w, w_at, w_stride, w_rows, depth, out, out_at, out_stride), generate


def _store_transposed(emit: Emitter, columns: list[Any], out: Any, out_at: Any, out_stride: Any) -> None:
    for i, row in enumerate(emit.transposed(columns)):
        emit.store(row, emit.at(out, out_at, emit.builder.mul(I64(i), out_stride)))

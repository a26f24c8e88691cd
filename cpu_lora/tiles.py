"""Register-tiled micro-kernels for float32, written in LLVM IR through numba.

Loops in plain numba reach 17 GFLOP/s on a core where these reach 165 and numpy's BLAS 115: LLVM neither keeps a tile of
accumulators in registers nor shares their final sums. Both kernels multiply ``X @ W^T`` with X and W row-major along
the common axis, as LoRA's shrink and expand need it.

- ``dot_tile``: 4 rows of X by 4 rows of W. Sixteen vector accumulators run along the common axis; their horizontal sums
  are taken together, 45 operations for all sixteen. For long common axes, or few rows of X.
- ``outer_tile``: LANES rows of X (given transposed) by LANES rows of W. Each accumulator holds one row of W for all
  rows of X, and the tile is transposed in registers at the end. For short common axes: nothing is summed across lanes.

Rows beyond the last valid one are computed from the last valid one, never read; their results must find room in the
destination. No fast-math flag is set that would assume away NaN or infinity.
"""

from __future__ import annotations

import itertools
from typing import Any

import llvmlite.binding as llvm  # type: ignore[import-untyped]

from segue.cpu_lora.native import intrinsic, ir, types


def _vector_lanes() -> int:
    """float32 lanes of the widest vector register of this machine."""
    features = llvm.get_host_cpu_features()
    if features.get("avx512f"):
        return 16
    return 8 if features.get("avx") else 4


LANES = _vector_lanes()
TILE = 4

_I32 = ir.IntType(32)
_I64 = ir.IntType(64)
_VECTOR = ir.VectorType(ir.FloatType(), LANES)
_QUARTET = ir.VectorType(ir.FloatType(), TILE)
_MASK = ir.VectorType(ir.IntType(1), LANES)
_ZERO = ir.Constant(_VECTOR, None)


class _Emitter:
    """Emits vector instructions at an IR builder's position."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder

    def _call(self, name: str, result: Any, args: list[Any]) -> Any:
        module = self.builder.module
        function = module.globals.get(name) or ir.Function(
            module, ir.FunctionType(result, [arg.type for arg in args]), name
        )
        return self.builder.call(function, args)

    def at(self, base: Any, *offsets: Any) -> Any:
        """Pointer to ``base[sum(offsets)]``."""
        for offset in offsets:
            base = self.builder.gep(base, [offset])
        return base

    def load(self, pointer: Any) -> Any:
        value = self.builder.load(self.builder.bitcast(pointer, _VECTOR.as_pointer()))
        value.align = 4
        return value

    def load_masked(self, pointer: Any, mask: Any) -> Any:
        pointer = self.builder.bitcast(pointer, _VECTOR.as_pointer())
        name = f"llvm.masked.load.v{LANES}f32.p0"
        return self._call(name, _VECTOR, [pointer, ir.Constant(_I32, 4), mask, _ZERO])

    def store(self, value: Any, pointer: Any) -> None:
        self.builder.store(value, self.builder.bitcast(pointer, value.type.as_pointer())).align = 4

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        return self._call(f"llvm.fma.v{LANES}f32", _VECTOR, [a, b, c])

    def shuffle(self, a: Any, b: Any, lanes: list[int]) -> Any:
        return self.builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, len(lanes)), lanes))

    def broadcast(self, scalar: Any) -> Any:
        empty = ir.Constant(ir.VectorType(scalar.type, LANES), ir.Undefined)
        vector = self.builder.insert_element(empty, scalar, _I32(0))
        return self.shuffle(vector, vector, [0] * LANES)

    def row_pointers(self, base: Any, offset: Any, stride: Any, valid: Any, count: int) -> list[Any]:
        """Pointers to ``count`` rows; those beyond the ``valid`` ones repeat the last."""
        last = self.builder.sub(valid, _I64(1))
        pointers = []
        for row in range(count):
            index = self.builder.select(self.builder.icmp_signed("<", last, _I64(row)), last, _I64(row))
            pointers.append(self.at(base, offset, self.builder.mul(index, stride)))
        return pointers

    def sums(self, vectors: list[Any]) -> tuple[list[Any], list[list[int]]]:
        """Horizontal sums of all vectors together: result vectors, and the input whose sum stands in each lane.

        Each round adds the halves of every block of lanes, joining two vectors into one, so the work halves by round.
        """
        sources = [[index] for index in range(len(vectors))]
        block = LANES
        while block > 1:
            half = block // 2
            low, high = [], []
            for start in range(0, LANES, block):
                low += [*range(start, start + half), *range(LANES + start, LANES + start + half)]
                high += [*range(start + half, start + block), *range(LANES + start + half, LANES + start + block)]
            pairs = list(zip(vectors[0::2], vectors[1::2], strict=True))
            vectors = [self.builder.fadd(self.shuffle(a, b, low), self.shuffle(a, b, high)) for a, b in pairs]
            sources = [
                list(itertools.chain.from_iterable(zip(a, b, strict=True)))
                for a, b in zip(sources[0::2], sources[1::2], strict=True)
            ]
            block = half
        return vectors, sources

    def transposed(self, rows: list[Any]) -> list[Any]:
        """Transpose LANES vectors of LANES elements by swapping off-diagonal blocks, from half the size down to one."""
        half = LANES // 2
        while half:
            low = [lane if not lane & half else LANES + lane - half for lane in range(LANES)]
            high = [lane + half if not lane & half else LANES + lane for lane in range(LANES)]
            swapped = list(rows)
            for i in range(LANES):
                if not i & half:
                    swapped[i] = self.shuffle(rows[i], rows[i + half], low)
                    swapped[i + half] = self.shuffle(rows[i], rows[i + half], high)
            rows, half = swapped, half // 2
        return rows


def _data(context: Any, builder: Any, signature: Any, args: Any, position: int) -> Any:
    return context.make_array(signature.args[position])(context, builder, args[position]).data


def _loop(emitter: _Emitter, stop: Any, step: int, count: int, body: Any) -> tuple[Any, list[Any]]:
    """Emit ``for i in range(0, stop, step)`` that carries ``count`` accumulators through ``body(i, accumulators)``.

    Returns the block before the loop's end label and the accumulators there; zeros when the loop does not run.
    """
    builder = emitter.builder
    entry, loop, done = builder.block, builder.append_basic_block("loop"), builder.append_basic_block("done")
    builder.cbranch(builder.icmp_signed(">", stop, _I64(0)), loop, done)
    builder.position_at_end(loop)
    index = builder.phi(_I64)
    carried = [builder.phi(_VECTOR) for _ in range(count)]
    results = body(index, carried)
    following = builder.add(index, _I64(step))
    index.add_incoming(_I64(0), entry)
    index.add_incoming(following, loop)
    for phi, result in zip(carried, results, strict=True):
        phi.add_incoming(_ZERO, entry)
        phi.add_incoming(result, loop)
    builder.cbranch(builder.icmp_signed("<", following, stop), loop, done)
    builder.position_at_end(done)
    final = [builder.phi(_VECTOR) for _ in range(count)]
    for phi, result in zip(final, results, strict=True):
        phi.add_incoming(_ZERO, entry)
        phi.add_incoming(result, loop)
    return done, final


def _products(emitter: _Emitter, xs: list[Any], ws: list[Any], sums: list[Any]) -> list[Any]:
    return [emitter.fma(x, w, sums[i * TILE + j]) for i, x in enumerate(xs) for j, w in enumerate(ws)]


@intrinsic
def dot_tile(
    _typing: Any, x: Any, x_at: Any, x_stride: Any, x_rows: Any, w: Any, w_at: Any, w_stride: Any, w_rows: Any,
    depth: Any, out: Any, out_at: Any, out_stride: Any,
) -> Any:  # fmt: skip
    """``out[i, j] += dot(x[i, :depth], w[j, :depth])`` for i, j in 0..3; writes all 16 elements of ``out``.

    Arrays are flat float32 with an element offset and a row stride; ``x_rows`` and ``w_rows`` (1 to 4, or more) are the
    rows that exist.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit = _Emitter(builder)
        _, x_at, x_stride, x_rows, _, w_at, w_stride, w_rows, depth, _, out_at, out_stride = args
        xs = emit.row_pointers(_data(context, builder, signature, args, 0), x_at, x_stride, x_rows, TILE)
        ws = emit.row_pointers(_data(context, builder, signature, args, 4), w_at, w_stride, w_rows, TILE)
        whole = builder.and_(depth, _I64(-LANES))

        def step(k: Any, sums: list[Any]) -> list[Any]:
            x_vectors = [emit.load(emit.at(row, k)) for row in xs]  # [4, LANES]
            return _products(emit, x_vectors, [emit.load(emit.at(row, k)) for row in ws], sums)

        before, sums = _loop(emit, whole, LANES, TILE * TILE, step)
        rest, done = builder.append_basic_block("rest"), builder.append_basic_block("rest_done")
        builder.cbranch(builder.icmp_signed("<", whole, depth), rest, done)
        builder.position_at_end(rest)
        left = emit.broadcast(builder.trunc(builder.sub(depth, whole), _I32))
        mask = builder.icmp_signed("<", ir.Constant(ir.VectorType(_I32, LANES), list(range(LANES))), left)
        x_vectors = [emit.load_masked(emit.at(row, whole), mask) for row in xs]
        w_vectors = [emit.load_masked(emit.at(row, whole), mask) for row in ws]
        rest_sums = _products(emit, x_vectors, w_vectors, sums)
        builder.branch(done)
        builder.position_at_end(done)
        total = [builder.phi(_VECTOR) for _ in sums]
        for phi, without, with_rest in zip(total, sums, rest_sums, strict=True):
            phi.add_incoming(without, before)
            phi.add_incoming(with_rest, rest)
        _add_quartets(emit, total, _data(context, builder, signature, args, 9), out_at, out_stride)
        return context.get_dummy_value()

    return types.void(
        x, x_at, x_stride, x_rows, w, w_at, w_stride, w_rows, depth, out, out_at, out_stride
    ), generate  # fmt: skip


def _add_quartets(emit: _Emitter, sums: list[Any], out: Any, out_at: Any, out_stride: Any) -> None:
    """Add the horizontal sum of ``sums[4 * i + j]`` to ``out[out_at + i * out_stride + j]``."""
    vectors, sources = emit.sums(sums)
    place = {source: (v, lane) for v, row in enumerate(sources) for lane, source in enumerate(row)}
    for i in range(TILE):
        places = [place[i * TILE + j] for j in range(TILE)]
        vector = vectors[places[0][0]]
        quartet = emit.shuffle(vector, vector, [lane for _, lane in places])
        pointer = emit.at(out, out_at, emit.builder.mul(_I64(i), out_stride))
        old = emit.builder.load(emit.builder.bitcast(pointer, _QUARTET.as_pointer()))
        old.align = 4
        emit.store(emit.builder.fadd(old, quartet), pointer)


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
        emit = _Emitter(builder)
        _, xt_at, _, w_at, w_stride, w_rows, depth, _, out_at, out_stride = args
        x = emit.at(_data(context, builder, signature, args, 0), xt_at)
        ws = emit.row_pointers(_data(context, builder, signature, args, 2), w_at, w_stride, w_rows, LANES)

        def step(k: Any, sums: list[Any]) -> list[Any]:
            vector = emit.load(emit.at(x, builder.mul(k, _I64(LANES))))  # [LANES]
            weights = [emit.broadcast(builder.load(emit.at(row, k))) for row in ws]  # [LANES] scalars
            return [emit.fma(vector, weight, total) for weight, total in zip(weights, sums, strict=True)]

        _, sums = _loop(emit, depth, 1, LANES, step)
        out = _data(context, builder, signature, args, 7)
        for i, row in enumerate(emit.transposed(sums)):
            emit.store(row, emit.at(out, out_at, builder.mul(_I64(i), out_stride)))
        return context.get_dummy_value()

    return types.void(xt, xt_at, w, w_at, w_stride, w_rows, depth, out, out_at, out_stride), generate

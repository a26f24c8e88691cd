"""Vector instructions and loops in LLVM IR, emitted through numba: what the tiles are made of."""

from __future__ import annotations

import itertools
from typing import Any

from segue.cpu_lora.native import compiles_for, ir, llvm_version


def _vector_lanes() -> int:
    """float32 lanes of the widest vector register of this machine."""
    if compiles_for("avx512f"):
        return 16
    return 8 if compiles_for("avx") else 4


LANES = _vector_lanes()
# LLVM's intrinsic takes bfloat vectors since version 16, integers before.
HAS_BFLOAT16_PRODUCTS = LANES == 16 and compiles_for("avx512bf16") and llvm_version() >= 16


class _BFloat16Type(ir.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite does not have."""

    def __str__(self) -> str:
        return "bfloat"


I16 = ir.IntType(16)
I32 = ir.IntType(32)
I64 = ir.IntType(64)
VECTOR = ir.VectorType(ir.FloatType(), LANES)
_ZERO = ir.Constant(VECTOR, None)
_WORDS = ir.VectorType(I32, LANES)
_PAIRS = ir.VectorType(I16, 2 * LANES)
_BFLOAT16_PAIRS = ir.VectorType(_BFloat16Type(), 2 * LANES)


class Emitter:
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

    def load(self, pointer: Any, kind: Any = VECTOR) -> Any:
        """A vector of type ``kind``, of any alignment that its elements may have."""
        value = self.builder.load(self.builder.bitcast(pointer, kind.as_pointer()))
        value.align = _item_bytes(kind)
        return value

    def load_first(self, pointer: Any, count: Any, kind: Any = VECTOR) -> Any:
        """The first ``count`` (i64) elements of a vector, zeros behind them; those are not read."""
        lanes = ir.VectorType(I32, kind.count)
        left = self.broadcast(self.builder.trunc(count, I32), kind.count)
        mask = self.builder.icmp_signed("<", ir.Constant(lanes, list(range(kind.count))), left)
        pointer = self.builder.bitcast(pointer, kind.as_pointer())
        name = f"llvm.masked.load.v{kind.count}{kind.element.intrinsic_name}.p0"
        return self._call(name, kind, [pointer, ir.Constant(I32, _item_bytes(kind)), mask, ir.Constant(kind, None)])

    def store(self, value: Any, pointer: Any) -> None:
        self.builder.store(value, self.builder.bitcast(pointer, value.type.as_pointer())).align = 4

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        return self._call(f"llvm.fma.v{LANES}f32", VECTOR, [a, b, c])

    def shuffle(self, a: Any, b: Any, lanes: list[int]) -> Any:
        return self.builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))

    def broadcast(self, scalar: Any, count: int = LANES) -> Any:
        empty = ir.Constant(ir.VectorType(scalar.type, count), ir.Undefined)
        vector = self.builder.insert_element(empty, scalar, I32(0))
        return self.shuffle(vector, vector, [0] * count)

    def widened_bfloat16(self, bits: Any) -> Any:
        """float32 [LANES] of bfloat16 bits [LANES]."""
        return self.builder.bitcast(self.builder.shl(self.builder.zext(bits, _WORDS), _words(16)), VECTOR)

    def widened_float16(self, bits: Any) -> Any:
        """float32 [LANES] of float16 bits [LANES]."""
        return self.builder.fpext(self.builder.bitcast(bits, ir.VectorType(ir.HalfType(), LANES)), VECTOR)

    def add_pair_products(self, a: Any, b: Any, total: Any) -> Any:
        """``total[i] + a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1]``, a and b 2 * LANES bfloat16 as i32 [LANES].

        VDPBF16PS where the CPU has it, which takes denormal inputs for zero and flushes denormal sums; else two
        products in float32.
        """
        if HAS_BFLOAT16_PRODUCTS:
            a, b = (self.builder.bitcast(pairs, _BFLOAT16_PAIRS) for pairs in (a, b))
            return self._call("llvm.x86.avx512bf16.dpbf16ps.512", VECTOR, [total, a, b])
        low_a, low_b = (self.builder.bitcast(self.builder.shl(pairs, _words(16)), VECTOR) for pairs in (a, b))
        high_a, high_b = (
            self.builder.bitcast(self.builder.and_(pairs, _words(0xFFFF0000)), VECTOR) for pairs in (a, b)
        )
        return self.fma(high_a, high_b, self.fma(low_a, low_b, total))

    def row_pointers(self, base: Any, offset: Any, stride: Any, valid: Any, count: int) -> list[Any]:
        """Pointers to ``count`` rows; those beyond the ``valid`` ones repeat the last."""
        last = self.builder.sub(valid, I64(1))
        pointers = []
        for row in range(count):
            index = self.builder.select(self.builder.icmp_signed("<", last, I64(row)), last, I64(row))
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


def data(context: Any, builder: Any, signature: Any, args: Any, position: int) -> Any:
    return context.make_array(signature.args[position])(context, builder, args[position]).data


def loop(emitter: Emitter, stop: Any, step: int, count: int, body: Any) -> list[Any]:
    """Emit ``for i in range(0, stop, step)`` that carries ``count`` accumulators through ``body(i, accumulators)``.

    Returns the accumulators behind it; zeros when the loop does not run.
    """
    builder = emitter.builder
    entry, loop, done = builder.block, builder.append_basic_block("loop"), builder.append_basic_block("done")
    builder.cbranch(builder.icmp_signed(">", stop, I64(0)), loop, done)
    builder.position_at_end(loop)
    index = builder.phi(I64)
    carried = [builder.phi(VECTOR) for _ in range(count)]
    results = body(index, carried)
    following, last = builder.add(index, I64(step)), builder.block
    index.add_incoming(I64(0), entry)
    index.add_incoming(following, last)
    for phi, result in zip(carried, results, strict=True):
        phi.add_incoming(_ZERO, entry)
        phi.add_incoming(result, last)
    builder.cbranch(builder.icmp_signed("<", following, stop), loop, done)
    builder.position_at_end(done)
    final = [builder.phi(VECTOR) for _ in range(count)]
    for phi, result in zip(final, results, strict=True):
        phi.add_incoming(_ZERO, entry)
        phi.add_incoming(result, last)
    return final


def only_if(emitter: Emitter, condition: Any, values: list[Any], body: Any) -> list[Any]:
    """Emit ``body(values)`` under a condition. Returns its results, or the values as they were."""
    builder = emitter.builder
    before, inside, done = builder.block, builder.append_basic_block("only_if"), builder.append_basic_block("done")
    builder.cbranch(condition, inside, done)
    builder.position_at_end(inside)
    results = body(values)
    builder.branch(done)
    builder.position_at_end(done)
    final = [builder.phi(value.type) for value in values]
    for phi, value, result in zip(final, values, results, strict=True):
        phi.add_incoming(value, before)
        phi.add_incoming(result, inside)
    return final


def _words(value: int) -> Any:
    return ir.Constant(_WORDS, [value] * LANES)


def _item_bytes(kind: Any) -> int:
    return 2 if kind.element == I16 else 4

"""Flags between processes: atomic loads and stores, the spin-wait hint, and the loops that need nothing else.

A plain loop over an array element is no wait: LLVM hoists the load and the loop never ends. These load and store are
atomic, with acquire and release order, so what was written before a flag is seen after it.
"""

from __future__ import annotations

import platform
from typing import Any

import numpy as np
import numpy.typing as npt

from segue.compiled import LONGS, WORDS, compiled, types
from segue.cpu_lora.native import cgutils, intrinsic, ir

# LLVM's spin-wait hint of each architecture, with its arguments; none elsewhere.
_PAUSES: dict[str, tuple[str, tuple[int, ...]]] = {
    "x86_64": ("llvm.x86.sse2.pause", ()),
    "aarch64": ("llvm.aarch64.hint", (1,)),
}

sched_yield = types.ExternalFunction("sched_yield", types.int32())
usleep = types.ExternalFunction("usleep", types.int32(types.uint32))


def _element_pointer(context: Any, builder: Any, signature: Any, array: Any, index: Any) -> Any:
    data = context.make_array(signature.args[0])(context, builder, array).data
    return cgutils.gep(builder, data, index)


@intrinsic
def load_acquire(_typing: Any, words: Any, _index: Any) -> Any:
    """Atomically load an element of ``words`` (integers) at an index; later reads are not moved before it."""
    size_bytes = words.dtype.bitwidth // 8

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(_element_pointer(context, builder, signature, *args), "acquire", size_bytes)

    return words.dtype(words, types.int64), generate


@intrinsic
def store_release(_typing: Any, words: Any, _index: Any, _value: Any) -> Any:
    """Atomically store an element of ``words`` (integers): index, value; earlier writes are not moved behind it."""
    size_bytes = words.dtype.bitwidth // 8

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array, index, value = args
        pointer = _element_pointer(context, builder, signature, array, index)
        builder.store_atomic(value, pointer, "release", size_bytes)
        return context.get_dummy_value()

    return types.void(words, types.int64, words.dtype), generate


@intrinsic
def cpu_pause(_typing: Any) -> Any:
    """Tell the core that this is a spin-wait loop."""

    def generate(context: Any, builder: Any, _signature: Any, _args: Any) -> Any:
        name, operands = _PAUSES.get(platform.machine(), ("", ()))
        if name:
            word = ir.IntType(32)
            kind = ir.FunctionType(ir.VoidType(), [word] * len(operands))
            builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [word(o) for o in operands])
        return context.get_dummy_value()

    return types.void(), generate


@compiled(types.void(WORDS, types.int64, types.uint32))
def publish(words: npt.NDArray[np.uint32], index: int, value: int) -> None:
    """Store ``value`` to ``words[index]`` with release order."""
    store_release(words, index, value)


@compiled(types.uint32(WORDS, types.int64))
def observe(words: npt.NDArray[np.uint32], index: int) -> Any:
    """Load ``words[index]`` with acquire order."""
    return load_acquire(words, index)


@compiled(types.boolean(WORDS, LONGS, types.int64, types.int64, types.uint32))
def all_equal(words: npt.NDArray[np.uint32], indices: npt.NDArray[np.int64], begin: int, end: int, value: int) -> bool:
    """Whether every ``words[indices[begin:end]]`` is ``value``, each loaded with acquire order."""
    for i in range(begin, end):  # noqa: SIM110 (compiled code has no generators)
        if load_acquire(words, indices[i]) != value:
            return False
    return True


@compiled(types.boolean(WORDS, LONGS, LONGS, WORDS, types.int64, types.int64))
def spin_until_any(
    words: npt.NDArray[np.uint32],
    indices: npt.NDArray[np.int64],
    ends: npt.NDArray[np.int64],
    values: npt.NDArray[np.uint32],
    pauses: int,
    yields: int,
) -> bool:
    """Wait until a group of flags is complete; group g is ``indices[ends[g-1]:ends[g]]``, each equal to ``values[g]``.

    Looks ``pauses`` times with the spin-wait hint between, then ``yields`` times giving up the core between. Returns
    whether a group is complete.
    """
    for attempt in range(pauses + yields):
        begin = 0
        for group in range(len(ends)):
            if all_equal(words, indices, begin, ends[group], values[group]):
                return True
            begin = ends[group]
        if attempt < pauses:
            cpu_pause()
        else:
            sched_yield()
    return False

"""Python that numba compiles, as kernels and the engine use it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

_Function = TypeVar("_Function", bound=Callable[..., Any])

# Their own annotations do not describe types that are built by untyped calls.
types: Any = numba.types
carray: Any = numba.carray  # type: ignore[attr-defined]

WORDS = types.Array(types.uint32, 1, "C")
INTS = types.Array(types.int32, 1, "C")
LONGS = types.Array(types.int64, 1, "C")
DOUBLES = types.Array(types.float64, 1, "C")
FLOATS = types.Array(types.float32, 1, "C")
HALVES = types.Array(types.uint16, 1, "C")
INT_ROWS = types.Array(types.int32, 2, "C")
LONG_ROWS = types.Array(types.int64, 2, "C")
INT = types.int64


def compiled(signature: Any, *, nogil: bool = True) -> Callable[[_Function], _Function]:
    """Compile a function at once for this signature alone, kept in numba's cache on disk.

    It runs without the GIL, unless ``nogil`` is False: for what takes less time than getting the GIL back may.

    The cache notices changes of the function's own file only: after editing what it calls in another file, delete the
    ``__pycache__`` folder of its package.
    """
    return cast("Callable[[_Function], _Function]", numba.njit(signature, cache=True, nogil=nogil))

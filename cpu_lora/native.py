"""numba and llvmlite as this package uses them.

Their own annotations do not describe code that is only ever compiled (an intrinsic's first parameter is not passed by
its callers, types are built by untyped calls), so they are typed anew here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numba.extending
from llvmlite import ir as _ir  # type: ignore[import-untyped]
from numba.core import cgutils as _cgutils

_Function = TypeVar("_Function", bound=Callable[..., Any])

ir: Any = _ir
cgutils: Any = _cgutils
types: Any = numba.types

WORDS = types.Array(types.uint32, 1, "C")
LONGS = types.Array(types.int64, 1, "C")
DOUBLES = types.Array(types.float64, 1, "C")
FLOATS = types.Array(types.float32, 1, "C")
HALVES = types.Array(types.uint16, 1, "C")
INT = types.int64


def intrinsic(define: Callable[..., Any]) -> Any:
    """Make an operation of compiled code from ``define(typing_context, *argument_types) -> (signature, emitter)``."""
    return numba.extending.intrinsic(define)


def compiled(signature: Any) -> Callable[[_Function], _Function]:
    """Compile a function at once for this signature alone, without the GIL, kept in numba's cache on disk.

    The cache notices changes of the function's own file only: after editing what it calls in another file, delete the
    ``__pycache__`` folder of this package.
    """
    return cast("Callable[[_Function], _Function]", numba.njit(signature, cache=True, nogil=True))

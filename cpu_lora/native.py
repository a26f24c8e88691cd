"""numba and llvmlite as this package uses them.

Their own annotations do not describe code that is only ever compiled (an intrinsic's first parameter is not passed by
its callers), so they are typed anew here. What others compile with as well is in ``segue.compiled``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba.extending
from llvmlite import binding as _binding  # type: ignore[import-untyped]
from llvmlite import ir as _ir
from numba.core import cgutils as _cgutils
from numba.core import codegen as _codegen
from numba.core import config as _config

ir: Any = _ir
cgutils: Any = _cgutils


def compiles_for(feature: str) -> bool:
    """Whether numba compiles for CPUs with this feature (LLVM's name): the host's, or what NUMBA_CPU_FEATURES says.

    The same features are part of the key of numba's cache: code of one machine is not taken for another's.
    """
    features = _config.CPU_FEATURES  # type: ignore[attr-defined]
    return f"+{feature}" in (host_cpu_features() if features is None else features).split(",")


def host_cpu_features() -> str:
    """The host's features as LLVM writes them: ``+avx,-avx512f`` and so on, all that it knows."""
    return str(_codegen.get_host_cpu_features())  # type: ignore[no-untyped-call]


def llvm_version() -> int:
    """The major version of numba's LLVM."""
    return int(_binding.llvm_version_info[0])


def intrinsic(define: Callable[..., Any]) -> Any:
    """Make an operation of compiled code from ``define(typing_context, *argument_types) -> (signature, emitter)``."""
    return numba.extending.intrinsic(define)

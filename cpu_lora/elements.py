"""Element types of rows, deltas and adapter weights in shared memory."""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np


class ElementType(IntEnum):
    """A floating-point format. The numbers are part of the shared-memory layout."""

    FLOAT32 = 0
    BFLOAT16 = 1
    FLOAT16 = 2

    @property
    def item_bytes(self) -> int:
        """Bytes of one element."""
        return 4 if self is ElementType.FLOAT32 else 2

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """float32, float16, or uint16 for bfloat16, which numpy does not have: its bits."""
        return _NUMPY_DTYPES[self]

    @classmethod
    def of(cls, dtype: np.dtype[Any]) -> ElementType:
        """The element type that ``dtype`` carries. Raises ValueError for any other dtype."""
        for element, candidate in _NUMPY_DTYPES.items():
            if candidate == dtype:
                return element
        raise ValueError(f"rows must be float32, float16 or uint16 (bfloat16 bits), not {dtype}")


_NUMPY_DTYPES: dict[ElementType, np.dtype[Any]] = {
    ElementType.FLOAT32: np.dtype(np.float32),
    ElementType.BFLOAT16: np.dtype(np.uint16),
    ElementType.FLOAT16: np.dtype(np.float16),
}

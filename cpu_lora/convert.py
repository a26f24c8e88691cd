"""Conversions between float32 and the 16-bit formats, for compiled code. Widening is exact."""

from __future__ import annotations

from typing import Any

from segue.compiled import types
from segue.cpu_lora.native import intrinsic, ir

_I16, _I32 = ir.IntType(16), ir.IntType(32)
_F16, _F32 = ir.HalfType(), ir.FloatType()


@intrinsic
def bfloat16_to_float32(_typing: Any, bits: Any) -> Any:
    """The float32 whose upper half is ``bits`` (uint16)."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.bitcast(builder.shl(builder.zext(args[0], _I32), _I32(16)), _F32)

    return types.float32(bits), generate


@intrinsic
def float16_to_float32(_typing: Any, bits: Any) -> Any:
    """The float32 of the float16 with these bits (uint16)."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.fpext(builder.bitcast(args[0], _F16), _F32)

    return types.float32(bits), generate


@intrinsic
def float32_to_bfloat16(_typing: Any, value: Any) -> Any:
    """bfloat16 bits (uint16) of a float32, rounded to nearest, ties to even; NaN stays NaN."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        bits = builder.bitcast(args[0], _I32)
        upper = builder.lshr(bits, _I32(16))
        rounding = builder.add(_I32(0x7FFF), builder.and_(upper, _I32(1)))
        rounded = builder.lshr(builder.add(bits, rounding), _I32(16))
        # Rounding could carry a NaN's payload over into infinity or zero: keep it and set the quiet bit instead.
        quiet = builder.or_(upper, _I32(0x40))
        is_nan = builder.fcmp_unordered("uno", args[0], args[0])
        return builder.trunc(builder.select(is_nan, quiet, rounded), _I16)

    return types.uint16(value), generate


@intrinsic
def float32_to_float16(_typing: Any, value: Any) -> Any:
    """float16 bits (uint16) of a float32, rounded to nearest, ties to even; beyond 65,504 infinity."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.bitcast(builder.fptrunc(args[0], _F16), _I16)

    return types.uint16(value), generate

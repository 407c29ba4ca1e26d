"""Triton: what coded K/V stand for (reference: `fp8.decode_pair`), by arithmetic that every GPU has."""

import triton
import triton.language as tl

__all__ = ["decoded"]


@triton.jit
def decoded(codes, exponents):
    """Decode a tile of e4m3 codes ``[tokens, channels]`` with the scales of its tokens; float32."""
    bits = codes.to(tl.int32)
    # The exponent of float32 has another offset, which is made up for; numbers without one are exact too.
    number = (((bits & 0x7F) << 20) | ((bits & 0x80) << 24)).to(tl.float32, bitcast=True)
    number *= 1.329227995784916e36
    number = tl.where((bits & 0x7F) == 0x7F, float("nan"), number)
    return number * (exponents.to(tl.int32) << 23).to(tl.float32, bitcast=True)[:, None]

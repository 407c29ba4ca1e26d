"""K/V in 8 bits: e4m3 with a power of two as the scale of each token's key and value.

A number x of a row whose largest is m comes back within ``max(|x| / 16, m / 229376)``: e4m3 rounds to 4 bits,
and the row's largest lies above half of its range, 448, so that its smallest step is below m / 114688. Coding
again what was decoded changes nothing. NaN stays NaN; infinities become NaN.
"""

import math

import torch
from torch import Tensor

__all__ = ["EXTRA", "blank", "decode_pages", "decode_pair", "encode_pair"]

EXTRA = 4
"""Bytes behind each coded value: the exponents of key and value, and two that keep rows at multiples of 4."""

_LARGEST = 448.0
# As in e8m0: a scale is 2 to the power of its byte less this.
_BIAS = 127


def encode_pair(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Code rows of K and V.

    Parameters
    ----------
    key, value : Tensor
        ``[..., dim]`` and ``[..., v_dim]``, of a floating-point type.

    Returns
    -------
    tuple of Tensor
        uint8 ``[..., dim]``, and ``[..., v_dim + EXTRA]``: codes of the value, exponents of key and value.
    """
    key_codes, key_exponents = _encoded(key)
    value_codes, value_exponents = _encoded(value)
    rest = torch.zeros_like(value_exponents).expand(*value.shape[:-1], EXTRA - 2)
    return key_codes, torch.cat([value_codes, key_exponents, value_exponents, rest], -1)


def decode_pair(key: Tensor, value: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the rows of `dtype` that were coded as `key` and `value` (see `encode_pair`)."""
    v_dim = value.shape[-1] - EXTRA
    exponents = value[..., v_dim : v_dim + 2].unbind(-1)
    return _decoded(key, exponents[0], dtype), _decoded(value[..., :v_dim], exponents[1], dtype)


def decode_pages(pages: Tensor, group_size: int, dim: int, dtype: torch.dtype) -> Tensor:
    """Decode whole pages.

    Parameters
    ----------
    pages : Tensor
        uint8 ``[..., group_size * (dim + v_dim + EXTRA)]``: coded keys, then coded values, of a group.
    group_size, dim : int
        Tokens of a page, channels of a key.
    dtype : torch.dtype
        Of what is returned.

    Returns
    -------
    Tensor
        ``[..., group_size * (dim + v_dim)]``.
    """
    split = group_size * dim
    coded = (
        pages[..., :split].unflatten(-1, (group_size, dim)),
        pages[..., split:].unflatten(-1, (group_size, -1)),
    )
    return torch.cat([part.flatten(-2) for part in decode_pair(*coded, dtype)], -1)


def blank(dtype: torch.dtype) -> float:
    """Return what poisons memory of a type: NaN, for bytes the code that stands for it."""
    return math.nan if dtype.is_floating_point else 0xFF


def _encoded(rows: Tensor) -> tuple[Tensor, Tensor]:
    number = rows.float()
    # The largest number that 4 bits have and the rows' type too; clamping to it is within the bound.
    most = math.ldexp(15 / 8, 15 if rows.dtype == torch.float16 else 127)
    number = number.clamp(-most, most).masked_fill(~number.isfinite(), math.nan)
    peak = number.abs().nan_to_num(0.0).amax(-1, keepdim=True)
    part, exponent = torch.frexp(peak)
    # The least power of two with which the peak is at most 448, which is 7/8 of 2 ** 9.
    exponent = (exponent - 9 + (part > _LARGEST / 512)).clamp(1 - _BIAS, _BIAS)
    inverse = ((_BIAS - exponent).to(torch.int32) << 23).view(torch.float32)
    codes = (number * inverse).to(torch.float8_e4m3fn).view(torch.uint8)
    return codes, (exponent + _BIAS).to(torch.uint8)


def _decoded(codes: Tensor, exponents: Tensor, dtype: torch.dtype) -> Tensor:
    # Scales of all rows are numbers of bfloat16, not of float16.
    wide = torch.float32 if dtype == torch.float16 else dtype
    scale = (exponents.to(torch.int32) << 23).view(torch.float32)[..., None]
    out = codes.contiguous().view(torch.float8_e4m3fn).to(wide)
    return out.mul_(scale.to(wide)).to(dtype)

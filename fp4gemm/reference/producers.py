"""What comes before a quantizer in a layer, in float32 operations that a kernel can repeat (docs/numerics.md)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fp4gemm.formats import BLOCK
from fp4gemm.reference.rounding import constant, divide

# log2(e), and what tanh's form of GELU multiplies x and x^3 by, negated; as float32.
_SILU = -1.0 / math.log(2.0)
_GELU = (_SILU * 2 * math.sqrt(2 / math.pi), _SILU * 2 * math.sqrt(2 / math.pi) * 0.044715)
_GELU_SLOPE = (2 * math.sqrt(2 / math.pi), 2 * math.sqrt(2 / math.pi) * 3 * 0.044715)
_QUICK = 1.702
# 2^f = 1 + f (c1 + f (c2 + f (c3 + f c4))) to 2.9e-6 where |f| <= 1/2.
_POWER = tuple(map(float.fromhex, ("0x1.62e12cp-1", "0x1.ec0378p-3", "0x1.c9fc48p-5", "0x1.3a02cap-7")))
_RECIPROCAL = 0x7EF31000  # less the bits of d: those of 1 / d, to 5.1 %
_LIMIT = 64.0
_INTEGER = 1.5 * 2.0**23  # added to a small number, it leaves an integer
_LANES = 32


@torch.no_grad()
def produce(x: Tensor, producer: str) -> Tensor:
    """[M, K] of the dtype of ``x``, which is [M, 2 K] for ``silu_mul`` (gate, then up) and else [M, K].

    ``silu_mul``, ``gelu_tanh`` and ``relu2`` to the bits that docs/numerics.md gives them.
    """
    if producer == "silu_mul":
        gate, up = x.float().chunk(2, dim=1)
        result = gate * _logistic(gate * constant(_SILU, x)) * up
    elif producer == "gelu_tanh":
        values = x.float()
        inner = fma(values * values, constant(_GELU[1], x), constant(_GELU[0], x))
        result = values * _logistic(values * inner)
    else:
        positive = torch.where(x < 0, torch.zeros_like(x), x).float()
        result = positive * positive
    return result.to(x.dtype)


@torch.no_grad()
def produce_gradient(g: Tensor, h: Tensor, activation: str) -> Tensor:
    """g times the derivative of an activation at h, of the dtype of ``g``, whose shape and dtype ``h`` has.

    The activations of ``formats.GRADIENTS``, to the bits that docs/numerics.md gives them.
    """
    gradient, x = g.float(), h.float()
    if activation in ("relu", "relu2"):
        some = gradient if activation == "relu" else gradient * (x + x)
        return torch.where(x <= 0, torch.zeros_like(x), some).to(g.dtype)
    a = x
    if activation == "gelu_tanh":
        square = x * x
        t = x * fma(square, constant(_GELU[1], x), constant(_GELU[0], x))
        a = x * fma(square, constant(_GELU_SLOPE[1], x), constant(_GELU_SLOPE[0], x))
    elif activation == "quick_gelu":
        t, a = x * constant(_SILU * _QUICK, x), x * constant(_QUICK, x)
    else:
        t = x * constant(_SILU, x)
    s = torch.where(t >= _LIMIT, torch.zeros_like(t), _logistic(t))
    one = constant(1.0, x)
    return (gradient * (s * fma(a, 1.0 - s, one))).to(g.dtype)


@torch.no_grad()
def rmsnorm(x: Tensor, weight: Tensor, eps: float = 1e-6, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(RMSNorm of h [M, K] times ``weight`` [K], h = x + residual), both of the dtype of ``x``; h is x without one."""
    h = x if residual is None else (x.float() + residual.float()).to(x.dtype)
    values = h.float()
    mean = divide(_sum_of_squares(values), constant(x.shape[1], x))
    # torch's float32 root is not rounded correctly on every CPU; a float64 one is, once it is rounded to float32.
    scale = divide(1.0, (mean + constant(eps, x)).double().sqrt().float())
    return (values * scale * weight.float()).to(x.dtype), h


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c of float32 tensors, rounded once.

    The product is exact in float64; the sum is rounded to odd there, after which rounding to float32 is as if it were
    the only one (Boldo and Melquiond, 2008).
    """
    product, addend = a.double() * b.double(), c.double()
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)
    bits = total.view(torch.int64)
    inexact = (error != 0) & (bits & 1 == 0) & total.isfinite()
    toward = torch.where((error > 0) == (total > 0), 1, -1)
    return torch.where(inexact, bits + toward, bits).view(torch.float64).float()


def _logistic(t: Tensor) -> Tensor:
    """1 / (1 + 2^t), to 4e-6; NaN counts as 64."""
    t = torch.nan_to_num(t, nan=_LIMIT).clamp(-_LIMIT, _LIMIT)
    whole = t + _INTEGER - _INTEGER
    f = t - whole
    p = constant(_POWER[3], t)
    for c in (_POWER[2], _POWER[1], _POWER[0], 1.0):
        p = fma(p, f, constant(c, t))
    d = (p.view(torch.int32) + (whole.to(torch.int32) << 23)).view(torch.float32) + 1.0
    one = constant(1.0, t)
    r = (_RECIPROCAL - d.view(torch.int32)).view(torch.float32)
    error = fma(-d, r, one)
    r = fma(r, fma(error, error, error), r)
    return fma(r, fma(-d, r, one), r)


def _sum_of_squares(values: Tensor) -> Tensor:
    """Of each row, [M, 1]: halves of a block fold onto each other, then halves of 32 blocks; these follow in order."""
    m, k = values.shape
    group = BLOCK * _LANES
    squares = F.pad(values * values, (0, -k % group)).reshape(m, -(-k // group), _LANES, BLOCK)
    for _ in range(4):
        squares = _fold(squares)
    lanes = squares.squeeze(-1)
    for _ in range(5):
        lanes = _fold(lanes)
    total = torch.zeros(m, dtype=torch.float32, device=values.device)
    for part in lanes.squeeze(-1).unbind(1):
        total = total + part
    return total.unsqueeze(1)


def _fold(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x[..., :half] + x[..., half:]

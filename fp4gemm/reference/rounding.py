"""The two roundings of NVFP4 and the division they rest on, as torch operations with the same bits on every device."""

from __future__ import annotations

import torch
from torch import Tensor

from fp4gemm.formats import E4M3_MAX

FLT_MAX = torch.finfo(torch.float32).max

# Largest |v| that still rounds to code 0, 1, .. 6 (7 above). A tie goes to the even code, so where the upper neighbour
# is even (0.75, 1.75, 3.5) the bound is the float just below the midpoint.
_E2M1_BOUNDS = (0.25, 0.75 - 2.0**-24, 1.25, 1.75 - 2.0**-23, 2.5, 3.5 - 2.0**-22, 5.0)


def encode_e2m1(values: Tensor) -> Tensor:
    """Rounds float32 values to e2m1 codes (uint8, same shape): nearest, ties to even, saturating at +-6.

    The sign of zero is kept; NaN becomes code 7, as in the hardware's ``cvt.rn.satfinite``.
    """
    places = values.abs()
    if values.device.type == "cpu":  # whose search is slower than all comparisons
        magnitude = torch.zeros_like(places, dtype=torch.uint8)
        for bound in _E2M1_BOUNDS:
            magnitude += ~(places <= bound)  # of NaN, too: 7
    else:
        bounds = torch.tensor(_E2M1_BOUNDS, dtype=torch.float32, device=values.device)
        magnitude = torch.bucketize(places.contiguous(), bounds, out_int32=True).to(torch.uint8)  # NaN comes last: 7
    negative = torch.signbit(values) & (values == values)
    return magnitude | (negative.to(torch.uint8) << 3)


def encode_e2m1_stochastic(values: Tensor, random: Tensor) -> Tensor:
    """Rounds float32 values to e2m1 codes up or down by chance: the place of |v| among them, plus uint8 ``random``
    / 256, rounded down.

    A value between neighbours a < b becomes b with probability floor(256 (|v| - a) / (b - a)) / 256. Sign, saturation
    and NaN as in :func:`encode_e2m1`.
    """
    magnitude = values.abs()
    # In 1/256 of a code and rounded down. The products are exact; sums would not be before the rounding.
    place = torch.where(
        magnitude < 2,
        (magnitude * 512).floor(),
        torch.where(magnitude < 4, (magnitude * 256).floor() + 512, (magnitude * 128).floor() + 1024),
    )
    code = ((place + random) / 256).floor().clamp(max=7)  # NaN stays NaN
    code = torch.where(torch.isnan(values), 7.0, code).to(torch.uint8)
    negative = torch.signbit(values) & (values == values)
    return code | (negative.to(torch.uint8) << 3)


def encode_e4m3(values: Tensor) -> Tensor:
    """Rounds non-negative float32 values to float8_e4m3fn: nearest even, saturating at 448; NaN becomes 448.

    torch's cast does not saturate, hence the minimum; ``fmin`` because it drops NaN as CUDA's ``fminf`` does. NaN comes
    from Inf * 0 or Inf / Inf: an infinite block under an infinite amax.
    """
    return torch.fmin(values, constant(E4M3_MAX, values)).to(torch.float8_e4m3fn)


def constant(value: float, like: Tensor) -> Tensor:
    """A float32 scalar on the device of ``like``."""
    return torch.full((), value, dtype=torch.float32, device=like.device)


def divide(numerator: Tensor | float, denominator: Tensor) -> Tensor:
    """IEEE float32 division.

    torch may turn a division with a Python number on either side into a product with a reciprocal, which differs in the
    last bit: both operands must be tensors on the device.
    """
    if not isinstance(numerator, Tensor):
        numerator = constant(numerator, denominator)
    return numerator / denominator

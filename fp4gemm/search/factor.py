"""Block Hessians as what a search computes with: triangular factors, and how far a single error can go."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_ASYMMETRY = 1e-4  # of the largest element: float32 sums of products are symmetric to 1e-6
_INDEFINITE = 1e-5  # an eigenvalue below minus this times the largest: not a sum of squares
# Of the mean diagonal element: what rounding of sums in that dtype does to a Hessian. It is added to the diagonal: this
# keeps factors of dependent columns from being noise, and lets squares decide between errors that H does not see.
_RIDGE = {torch.float32: 2.0**-20, torch.float64: 2.0**-44}
_UNIT = 2.0**-24
_LEAST = 0.25  # how much of |U d| rounding must leave for a bound to be used


class Factor(NamedTuple):
    """A block Hessian, checked and factored: ``search_scales`` takes it in place of one, and waits for nothing then.

    ``upper`` float32 [units, n, n], U^T U = H / 4^exponent; ``reach`` float32 [units, n]; ``exponent`` int32 [units].

    An error d whose element i is larger than reach_i * e has |U d| > e, as a kernel computes it; infinite where that
    does not hold for any reach.
    """

    upper: Tensor
    reach: Tensor
    exponent: Tensor
    packed: Tensor
    """What a kernel reads: all triangles, from the last row and column on, then all reaches; float32, flat."""

    @property
    def block(self) -> int:
        return self.upper.shape[-1]

    @property
    def units(self) -> int:
        return self.upper.shape[0]

    def split(self) -> list[Factor]:
        """A factor of each unit alone."""
        triangles = self.packed[: -self.reach.numel()].reshape(self.units, -1)
        packed = torch.cat((triangles, self.reach), 1)
        each = range(self.units)
        return [Factor(self.upper[i : i + 1], self.reach[i : i + 1], self.exponent[i : i + 1], packed[i]) for i in each]


def diagonal_blocks(hessian: Tensor, block: int) -> Tensor:
    """[K, K] -> [ceil(K / block), block, block], contiguous; columns past K are 0."""
    pad = -hessian.shape[0] % block
    padded = F.pad(hessian, (0, pad, 0, pad))
    units = padded.shape[0] // block
    grid = padded.reshape(units, block, units, block)
    return grid.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


def check_form(hessian: object, shape: tuple[int, ...], device: torch.device) -> None:
    """Raises TypeError or ValueError that says what a Hessian is not; reads no values."""
    if not isinstance(hessian, Tensor):
        raise TypeError(f"hessian: expected a tensor {list(shape)}, got {type(hessian).__name__}")
    if hessian.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"hessian: expected float32 or float64, got {hessian.dtype}")
    if tuple(hessian.shape) != shape:
        raise ValueError(f"hessian: expected shape {shape}, got {tuple(hessian.shape)}")
    if hessian.device != device:
        raise ValueError(f"hessian: expected device {device} (that of w), got {hessian.device}")


def check_symmetric(hessian: Tensor) -> None:
    """Raises ValueError unless all [units, n, n] are finite and symmetric; waits for the device."""
    if not bool(hessian.isfinite().all()):
        raise ValueError("hessian: expected finite values, got NaN or Inf")
    largest = hessian.abs().amax((1, 2))
    asymmetry = (hessian - hessian.transpose(1, 2)).abs().amax((1, 2))
    if bool((wrong := asymmetry > _ASYMMETRY * largest).any()):
        where = int(wrong.nonzero()[0])
        raise ValueError(f"hessian: expected symmetric blocks, got one ({where}) that differs from its transpose")


def check_semidefinite(hessian: Tensor) -> None:
    """The same where one is not positive semidefinite."""
    eigenvalues = torch.linalg.eigvalsh(hessian.double().cpu())
    if bool((wrong := eigenvalues[:, 0] < -_INDEFINITE * eigenvalues.abs().amax(-1)).any()):
        where = int(wrong.nonzero()[0])
        raise ValueError(f"hessian: expected positive semidefinite blocks, got one ({where}) that is not")


def factor(hessian: Tensor) -> Factor:
    """Factors of checked Hessians [units, n, n], float32 or float64; a block of zeros counts as the identity, which
    makes its error that of squares.

    To the diagonal is added 2^-20 of its mean (2^-44 in float64), which is what the sums that made it are good for.
    float64 operations one by one, in a fixed order: the same bits in each run; between
    devices only square roots may differ, in their last bit.
    """
    h = hessian.double()
    h = (h + h.transpose(1, 2)) * 0.5
    n = h.shape[-1]
    zero = (h == 0).all(-1).all(-1)
    h = torch.where(zero.reshape(-1, 1, 1), torch.eye(n, dtype=torch.float64, device=h.device), h)
    diagonal = h.diagonal(dim1=1, dim2=2)
    _, exponent = torch.frexp(diagonal.amax(-1))
    exponent = torch.div(exponent, 2, rounding_mode="floor")
    h = h * _power(-2 * exponent).reshape(-1, 1, 1)
    ridge = _sum(h.diagonal(dim1=1, dim2=2)) * (_RIDGE[hessian.dtype] / n)
    upper = _cholesky(h + torch.diag_embed(ridge.unsqueeze(-1).expand(-1, n))).float()
    reach = _reach(upper.double())
    return Factor(upper, reach, exponent.int(), _packed(upper, reach))


def _power(exponent: Tensor) -> Tensor:
    """2^exponent, exactly: pow need not be."""
    return ((exponent.long() + 1023) << 52).view(torch.float64)


def _sum(values: Tensor) -> Tensor:
    """Over the last dimension, in order."""
    first, *others = values.unbind(-1)
    for value in others:
        first = first + value
    return first


def _cholesky(h: Tensor) -> Tensor:
    """Upper triangular U with U^T U = h [units, n, n], float64; where nothing is left of a column, a row of zeros."""
    n = h.shape[-1]
    rest, upper = h.clone(), torch.zeros_like(h)
    for i in range(n):
        pivot = rest[:, i, i]
        depends = pivot <= 0
        root = torch.where(depends, 1.0, pivot).sqrt()
        row = torch.where(depends.unsqueeze(-1), 0.0, rest[:, i, i:] / root.unsqueeze(-1))
        upper[:, i, i:] = row
        rest[:, i:, i:] = rest[:, i:, i:] - row.unsqueeze(-1) * row.unsqueeze(-2)
    return upper


def _reach(upper: Tensor) -> Tensor:
    """sqrt((U^T U)^-1)_ii with what rounding can take from |U d|; infinite for singular blocks (docs/search.md)."""
    n = upper.shape[-1]
    regular = (upper.diagonal(dim1=1, dim2=2) > 0).all(-1)
    eye = torch.eye(n, dtype=torch.float64, device=upper.device)
    inverse = _inverse(torch.where(regular.reshape(-1, 1, 1), upper, eye))
    norms = upper.square().sum((1, 2)).sqrt() * inverse.square().sum((1, 2)).sqrt()
    left = 1 - (n + 2) * _UNIT * norms * 1.01
    usable = regular & (left >= _LEAST)
    reach = inverse.square().sum(-1).sqrt() / torch.where(usable, left, 1.0).unsqueeze(-1) * (1 + 2.0**-18)
    return torch.where(usable.unsqueeze(-1), reach, torch.inf).float()


def _inverse(upper: Tensor) -> Tensor:
    """Of a regular upper triangular matrix, by substitution from the last row."""
    n = upper.shape[-1]
    inverse = torch.zeros_like(upper)
    for i in range(n - 1, -1, -1):
        unit = torch.zeros(upper.shape[0], n, dtype=upper.dtype, device=upper.device)
        unit[:, i] = 1
        for j in range(i + 1, n):
            unit = unit - upper[:, i, j].unsqueeze(-1) * inverse[:, j]
        inverse[:, i] = unit / upper[:, i, i].unsqueeze(-1)
    return inverse


def _packed(upper: Tensor, reach: Tensor) -> Tensor:
    n = upper.shape[-1]
    rows, columns = torch.triu_indices(n, n, device=upper.device).flip(1)
    return torch.cat((upper[:, rows, columns].reshape(-1), reach.reshape(-1)))

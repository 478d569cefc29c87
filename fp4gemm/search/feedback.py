"""Error feedback: each block makes up for what the rounding of those before it has cost in the outputs.

With H = R R^T, R upper triangular, the error of a row is a sum over blocks: d^T H d = sum of |R_bb^T d_b + t_b|^2 with
t_b = sum of R_ab^T d_a over the blocks a before b. So block b is quantized in place of w_b as w_b - R_bb^-T t_b, under
the Hessian R_bb R_bb^T: what is left of that of w_b once the blocks behind answer in turn (docs/search.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fp4gemm.formats import BLOCK, decode_e2m1, pack_e2m1, padded_k, scale_columns, scale_layout, unpack_e2m1
from fp4gemm.reference.rounding import encode_e2m1
from fp4gemm.reference.search import SearchArguments, to_scale
from fp4gemm.search.factor import Factor, diagonal_blocks, factor
from fp4gemm.tensor import FP4Tensor

Search = Callable[[SearchArguments, Factor], FP4Tensor]


@torch.no_grad()
def improve(args: SearchArguments, plain: FP4Tensor, hessian: Tensor, search: Search) -> FP4Tensor:
    """``plain``, the result of the search without feedback, with each row replaced that feedback makes better.

    ``hessian`` [K, K], float32 or float64, checked to be symmetric. ``search`` chooses the scales of one block.
    Raises ValueError where the Hessian is not positive definite.
    """
    walk = _Walk(args, hessian)
    for place in range(walk.units):
        walk.quantize(place, search)
    byte, codes, errors = walk.result()
    columns = scale_columns(plain.k)
    plain_codes = unpack_e2m1(plain.data)
    plain_byte = plain.linear_block_scale().view(torch.uint8)
    better = (errors < walk.errors_of(plain_codes, plain_byte)).unsqueeze(-1)
    codes = torch.where(better, codes[:, : padded_k(plain.k)], plain_codes)
    byte = torch.where(better, byte.repeat_interleave(args.block // BLOCK, dim=1)[:, :columns], plain_byte)
    stored = scale_layout(args.sf_layout).from_linear(byte.view(torch.float8_e4m3fn))
    return FP4Tensor(pack_e2m1(codes), stored, plain.outer_scale, plain.shape, args.sf_layout)


class _Block(NamedTuple):
    """Targets [rows, block]; a code is that of a value times ``coefficient``, and stands for its own times ``step``.

    Both [rows, 1].
    """

    target: Tensor
    root: Tensor
    coefficient: Tensor
    step: Tensor


class _Walk:
    """Blocks in the order of their weight in H, the heaviest first: those at the end have nobody to make up for them.

    float64, one row independent of the others; what is at a ``place`` is in that order.
    """

    def __init__(self, args: SearchArguments, hessian: Tensor) -> None:
        self.args, self.units = args, args.units
        rows, block, device = args.source.shape[0], args.block, hessian.device
        blocks = diagonal_blocks(hessian.double(), block)
        weight = blocks.diagonal(dim1=1, dim2=2).sum(1)
        self.order = weight.argsort(descending=True, stable=True)
        self.root = _root(self._permuted(hessian.double()))
        roots = diagonal_blocks(self.root, block)
        self.factors = factor(roots @ roots.mT).split()
        self.roots = roots
        eye = torch.eye(block, dtype=torch.float64, device=device).expand_as(roots)
        self.inverses = torch.linalg.solve_triangular(roots, eye, upper=True)
        self.exact = self._in_order(args.source.double())
        self.e2m1 = decode_e2m1(torch.arange(16, dtype=torch.uint8, device=device)).double()
        self.outer = args.outer.double().expand(rows).unsqueeze(-1)
        self.encode = args.encode.expand(rows).unsqueeze(-1)
        self.difference = torch.zeros_like(self.exact)
        self.error = torch.zeros(rows, dtype=torch.float64, device=device)
        self.byte = torch.zeros((rows, self.units), dtype=torch.uint8, device=device)
        self.codes = torch.zeros(self.exact.shape, dtype=torch.uint8, device=device)

    def _in_order(self, values: Tensor) -> Tensor:
        """[rows, K or more] -> [rows, units * block], blocks at their places."""
        block = self.args.block
        padded = F.pad(values, (0, self.units * block - values.shape[1]))
        return padded.reshape(-1, self.units, block)[:, self.order].flatten(1)

    def _permuted(self, h: Tensor) -> Tensor:
        h = (h + h.t()) * 0.5
        h = self._in_order(self._in_order(h).t()).t()
        return h + torch.diag_embed((h.diagonal() == 0).double())  # an input that is never there: any weight will do

    def quantize(self, place: int, search: Search) -> None:
        at, end = place * self.args.block, (place + 1) * self.args.block
        root, one = self.roots[place], self.factors[place]
        carried = self.difference[:, :at] @ self.root[:at, at:end]
        target = self.exact[:, at:end] - carried @ self.inverses[place]
        args = replace(self.args, source=target.float(), sf_layout="linear", factor=one.upper, reach=one.reach)
        byte = search(args, one).block_scale.view(torch.uint8)[:, 0]
        scale = to_scale(byte).unsqueeze(-1)
        coefficient = args.rule.scaled(torch.ones_like(scale), scale, self.encode)
        b = _Block(target, root, coefficient, scale.double() * self.outer)
        at_once, in_turn = _encoded(target, b), self._in_turn(b)
        errors = [_squares((self._values(codes, b.step) - target) @ root) for codes in (at_once, in_turn)]
        codes = torch.where((errors[1] < errors[0]).unsqueeze(-1), in_turn, at_once)
        self.error += torch.minimum(*errors)
        self.byte[:, place], self.codes[:, at:end] = byte, codes
        self.difference[:, at:end] = self._values(codes, b.step) - self.exact[:, at:end]

    def _values(self, codes: Tensor, step: Tensor) -> Tensor:
        return self.e2m1[codes.int()] * step

    def _in_turn(self, b: _Block) -> Tensor:
        """Feedback within the block, column by column."""
        ratio = b.root / b.root.diagonal()
        difference, codes = torch.zeros_like(b.target), []
        for j in range(self.args.block):
            carried = difference[:, :j] @ ratio[:j, j : j + 1]
            codes.append(_encoded(b.target[:, j : j + 1] - carried, b))
            difference[:, j : j + 1] = self._values(codes[-1], b.step) - b.target[:, j : j + 1]
        return torch.cat(codes, 1)

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """Scale bytes [rows, units], codes [rows, units * block], d^T H d [rows]."""
        back = self.order.argsort()
        codes = self.codes.reshape(-1, self.units, self.args.block)[:, back].flatten(1)
        return self.byte[:, back], codes, self.error

    def errors_of(self, codes: Tensor, byte: Tensor) -> Tensor:
        """d^T H d [rows] of codes [rows, ceil16(K)] and bytes [rows, ceil(K / 16)]."""
        step = to_scale(byte).double() * self.outer
        difference = self._in_order(self._values(codes, step.repeat_interleave(BLOCK, dim=1))) - self.exact
        return _squares(difference @ self.root)


def _encoded(values: Tensor, b: _Block) -> Tensor:
    return encode_e2m1(values.float() * b.coefficient)


def _squares(rows: Tensor) -> Tensor:
    return rows.square().sum(1)


def _root(h: Tensor) -> Tensor:
    """Upper triangular R with R R^T = h: the Cholesky factor, counted from the last row and column."""
    lower, info = torch.linalg.cholesky_ex(h.flip(0, 1))
    if int(info):
        raise ValueError(
            "hessian: expected a positive definite [K, K] where there is feedback, got one that is not; damping makes "
            "it so"
        )
    root: Tensor = lower.flip(0, 1)
    return root

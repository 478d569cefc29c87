"""``search_scales``: a weight in NVFP4 whose block scales have the lowest error of all that there are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fp4gemm import ops, reference
from fp4gemm.dispatch import direct, on_its_device, on_kernels
from fp4gemm.formats import METRICS, SEARCH_BLOCKS, padded_k, scale_layout
from fp4gemm.reference import search as reference_search
from fp4gemm.reference.arguments import check_finite_values, check_quantize
from fp4gemm.reference.options import check_name
from fp4gemm.reference.search import LAST, SearchArguments
from fp4gemm.search import calls
from fp4gemm.search.factor import Factor, check_form, check_semidefinite, check_symmetric, diagonal_blocks, factor
from fp4gemm.search.feedback import improve
from fp4gemm.tensor import FP4Tensor

CANDIDATES = ("all", "4/6")
OUTER = ("amax", "search")
FACTORS = tuple(1 + i / 16 for i in range(16))
"""By which a search multiplies outer scales: twice one has the same block scales, but at the ends of their range."""


@dataclass(frozen=True)
class Audit:
    """What a search did: scales chosen, candidates tried for them, and how many an exhaustive one chooses otherwise."""

    scales: int
    tried: int
    wrong: int

    @property
    def tried_per_scale(self) -> float:
        return self.tried / max(1, self.scales)


@torch.no_grad()
def search_scales(
    w: Tensor,
    metric: str = "sse",
    *,
    hessian: Tensor | Factor | None = None,
    block: int = 16,
    dim: int = -1,
    candidates: str | range = "all",
    outer_scale: Tensor | None = None,
    scaling: str = "per_row",
    sf_layout: str = "128x4",
    check_finite: bool = False,
    outer: str = "amax",
    feedback: bool = False,
) -> FP4Tensor:
    """``w`` [N, K] in NVFP4, its block scales those of the lowest error; bytes are the same on every device,
    those of a Hessian search for the same factor.

    The result is that of an exhaustive search of the candidates, most of which are proved away (docs/search.md). It is
    a plain FP4Tensor, for ``gemm`` like any other.

    Args:
        w: bf16, fp16, fp32 or e4m3, any strides.
        metric: ``sse``: the sum of squared errors of a block. ``hessian``: d^T H d of its errors d, which is the sum of
            squared errors of a layer's output if H is the sum of x x^T over the layer's inputs.
        hessian: float32 or float64 [ceil(K / block), block, block], symmetric positive semidefinite, one for each block
            of columns; a block of zeros stands for the identity. Checking it waits for the device; a
            :func:`~fp4gemm.search.factor.factor` of one has been checked. With ``feedback`` that of all columns,
            [K, K], positive definite but for inputs that are never there (rows of zeros), which damping takes care of.
        block: values that share a scale, 16 or 32; 32 is stored as two equal scales.
        dim: along which blocks lie: -1 or 1, or 0 for the FP4Tensor of the transpose, [K, N].
        candidates: ``all`` 126 positive e4m3 scales, the two of ``4/6``, or a range of e4m3 bytes in 1..126.
        outer_scale: float32 decode multiplier, [], [1] or [rows of the result], in place of the amax.
        scaling: ``per_row`` or ``per_tensor``.
        sf_layout: layout of the block scales: ``128x4``, ``8x4`` or ``linear``.
        check_finite: raise for NaN and Inf; waits for the device.
        outer: ``search``: try the outer scale times 1, 17/16, .. 31/16 and keep what errs least, for each row on its
            own where rows have outer scales. 17 searches.
        feedback: also round so that the errors of blocks make up for those of blocks before them (GPTQ's idea), which
            lowers d^T H d over all columns: no row has more of it than without, and one with NaN or Inf is as without.
            float64 sums of matrix products decide, so bytes are the same in each run, but not on every device.

    Raises:
        TypeError: a dtype is not one of the above.
        ValueError: a shape, a name, a device or a Hessian does not fit; the message says which.
        NotImplementedError: ``w`` is on a CUDA device for which there is no kernel.
    """
    request = _checked(w, metric, hessian, block, dim, candidates, outer_scale, scaling, sf_layout, outer, feedback)
    if check_finite:
        check_finite_values(w, request.outer_scale, None)
    watched = (request.outer_scale, request.hessian, request.upper)
    run = _run if direct(w, *watched) else torch.ops.fp4gemm.search_scales
    data, block_scale, outer_scale = run(*request)
    m, k = request.source.shape
    return FP4Tensor(data, block_scale, outer_scale, (m, k), sf_layout)


@torch.no_grad()
def audit(
    w: Tensor,
    metric: str = "sse",
    *,
    hessian: Tensor | Factor | None = None,
    block: int = 16,
    dim: int = -1,
    candidates: str | range = "all",
    outer_scale: Tensor | None = None,
    scaling: str = "per_row",
    sf_layout: str = "128x4",
) -> tuple[FP4Tensor, Audit]:
    """``search_scales``, and the same again exhaustively: what was tried, and what differs (nothing does)."""
    args, factored = _resolved(
        _checked(w, metric, hessian, block, dim, candidates, outer_scale, scaling, sf_layout, "amax", False)
    )
    if on_kernels(args.source):
        counters = torch.zeros(3, dtype=torch.int64, device=w.device)
        found, _ = on_its_device(w, lambda: calls.search(args, packed=_packed(factored), counters=counters))
        return found, Audit(*counters.tolist())
    every = reference_search.search(args, exhaustive=True)
    result = reference_search.search(args)
    scales = result.tensor.linear_block_scale().view(torch.uint8)
    wrong = scales != every.tensor.linear_block_scale().view(torch.uint8)
    step = args.block // 16
    searched = int((scales[:, ::step] != 0).sum())
    return result.tensor, Audit(searched, result.tried, int(wrong[:, ::step].sum()))


def _packed(found: Factor | None) -> Tensor | None:
    return None if found is None else found.packed


def _search(args: SearchArguments, found: Factor | None, errors: bool = False) -> tuple[FP4Tensor, Tensor | None]:
    if on_kernels(args.source):
        return on_its_device(args.source, lambda: calls.search(args, packed=_packed(found), errors=errors))
    result = reference_search.search(args)
    return result.tensor, result.errors


def _best_outer(args: SearchArguments, found: Factor | None) -> Tensor:
    """The decode multipliers, [] or [rows], with the lowest sum of errors; the smallest among equals."""
    base = args.outer
    best, least = base, torch.full_like(base, float("inf"), dtype=torch.float64)
    for multiple in FACTORS:
        outer = base * multiple
        _, errors = _search(replace(args, scale=outer, given=True), found, errors=True)
        assert errors is not None
        weighted = errors.double()
        if found is not None:  # each block of columns has a unit of its own
            weighted = weighted * torch.exp2(2.0 * found.exponent.double())
        total = (weighted.sum(1) if base.dim() else weighted.sum()) * outer.double().square()
        better = total < least
        best, least = torch.where(better, outer, best), torch.where(better, total, least)
    return best


class _Request(NamedTuple):
    """Arguments whose forms are checked, as a custom op passes them: of a Hessian itself, or the parts of a Factor."""

    source: Tensor
    per_tensor: bool
    outer_scale: Tensor | None
    sf_layout: str
    block: int
    first: int
    last: int
    four_six: bool
    hessian: Tensor | None
    upper: Tensor | None
    reach: Tensor | None
    exponent: Tensor | None
    packed: Tensor | None
    search_outer: bool
    feedback: bool


_SCHEMA = (
    "(Tensor source, bool per_tensor, Tensor? outer_scale, str sf_layout, int block, int first, int last, "
    "bool four_six, Tensor? hessian, Tensor? upper, Tensor? reach, Tensor? exponent, Tensor? packed, "
    "bool search_outer, bool feedback) -> (Tensor, Tensor, Tensor)"
)


def _checked(
    w: Tensor, metric: str, hessian: Tensor | Factor | None, block: int, dim: int, candidates: str | range,
    outer_scale: Tensor | None, scaling: str, sf_layout: str, outer: str, feedback: bool,
) -> _Request:  # fmt: skip
    """Raises what ``search_scales`` says; values are not read."""
    check_name("metric", metric, METRICS)
    check_name("scaling", scaling, ("per_row", "per_tensor"))
    check_name("outer", outer, OUTER)
    if block not in SEARCH_BLOCKS:
        raise ValueError(f"block: expected 16 or 32, got {block!r}")
    if dim not in (-1, 0, 1):
        raise ValueError(f"dim: expected -1, 0 or 1, got {dim!r}")
    if feedback and metric != "hessian":
        raise ValueError(f"feedback: expected metric='hessian', whose errors it feeds back, got {metric!r}")
    first, last, four_six = _candidates(candidates)
    common = check_quantize(
        w, scaling=scaling, sf_layout=sf_layout, convention="te_per_token", outer_scale=outer_scale, transposed=dim == 0
    )
    k = common.source.shape[1]
    _check_hessian(metric, hessian, k, block, w.device, feedback)
    return _Request(
        common.source, common.per_tensor, common.outer_scale, sf_layout, block, first, last, four_six,
        *_parts(hessian), outer == "search", feedback,
    )  # fmt: skip


_Parts = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def _parts(hessian: Tensor | Factor | None) -> _Parts:
    if isinstance(hessian, Factor):
        return None, hessian.upper, hessian.reach, hessian.exponent, hessian.packed
    return hessian, None, None, None, None


def _check_hessian(
    metric: str, hessian: Tensor | Factor | None, k: int, block: int, device: torch.device, feedback: bool
) -> None:
    if (hessian is None) != (metric == "sse"):
        expected = "None with metric='sse'" if metric == "sse" else "a Hessian with metric='hessian'"
        raise ValueError(f"hessian: expected {expected}, got {type(hessian).__name__}")
    if hessian is None:
        return
    units = -(-k // block)
    if feedback or not isinstance(hessian, Factor):
        check_form(hessian, (k, k) if feedback else (units, block, block), device)
    elif (hessian.units, hessian.block) != (units, block) or hessian.upper.device != device:
        raise ValueError(
            f"hessian: expected a factor of {units} blocks of {block} on {device}, got {hessian.units} of "
            f"{hessian.block} on {hessian.upper.device}"
        )


def _resolved(request: _Request) -> tuple[SearchArguments, Factor | None]:
    """Arguments with amaxes taken, and the factor of a Hessian, whose values are checked."""
    r = request
    found = None
    if r.hessian is not None:
        blocks = diagonal_blocks(r.hessian, r.block) if r.feedback else r.hessian
        check_symmetric(r.hessian.unsqueeze(0) if r.feedback else blocks)
        check_semidefinite(blocks)
        found = factor(blocks)
    elif r.upper is not None and r.reach is not None and r.exponent is not None and r.packed is not None:
        found = Factor(r.upper, r.reach, r.exponent, r.packed)
    given = r.outer_scale is not None
    scale = _amax(r.source, r.per_tensor) if r.outer_scale is None else r.outer_scale
    metric, upper, reach = ("sse", None, None) if found is None else ("hessian", found.upper, found.reach)
    args = SearchArguments(
        r.source, scale, given, r.sf_layout, metric, r.block, upper, reach, r.four_six, r.first, r.last
    )
    return args, found


def _run(*flat: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Data, block scales and outer scales."""
    request = _Request(*flat)
    args, found = _resolved(request)
    if request.search_outer and args.source.numel():
        args = replace(args, scale=_best_outer(args, found), given=True)
    result = _search(args, found)[0]
    if request.feedback and args.source.numel():
        assert request.hessian is not None
        result = improve(args, result, request.hessian, lambda part, one: _search(part, one)[0])
    return result.data, result.block_scale, result.outer_scale


def _fake_run(*flat: Any) -> tuple[Tensor, Tensor, Tensor]:
    r = _Request(*flat)
    m, k = r.source.shape
    return (
        r.source.new_empty((m, padded_k(k) // 2), dtype=torch.uint8),
        r.source.new_empty(scale_layout(r.sf_layout).shape(m, k), dtype=torch.float8_e4m3fn),
        r.source.new_empty(() if r.per_tensor else (m,), dtype=torch.float32),
    )


def _amax(x: Tensor, per_tensor: bool) -> Tensor:
    if on_kernels(x):
        return ops.amax(x, rows=not per_tensor, tensor=per_tensor)[0]
    return reference.amax(x, rows=not per_tensor, tensor=per_tensor)[0]


def _candidates(candidates: str | range) -> tuple[int, int, bool]:
    """First byte, last byte, and whether only those of 4/6 count."""
    if isinstance(candidates, range):
        if candidates.step != 1 or not 1 <= candidates.start < candidates.stop <= LAST + 1:
            raise ValueError(f"candidates: expected a range of e4m3 bytes within range(1, 127), got {candidates}")
        return candidates.start, candidates.stop - 1, False
    check_name("candidates", candidates, CANDIDATES)
    return 1, LAST, candidates == "4/6"


_op = torch.library.custom_op("fp4gemm::search_scales", _run, mutates_args=(), schema=_SCHEMA)
_op.register_fake(_fake_run)

"""Groups in torch: a loop over ``quantize``. It reads sizes on the host, so it waits for the device that has them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fp4gemm.formats import BLOCK, QuantizeOptions, scale_layout
from fp4gemm.group.arguments import GroupedArguments
from fp4gemm.group.shape import PARTIAL_ROWS
from fp4gemm.group.tensor import GroupedFP4Tensor
from fp4gemm.reference.arguments import QuantizeArguments
from fp4gemm.reference.producers import produce_gradient
from fp4gemm.reference.quantize import amax, quantize_checked
from fp4gemm.tensor import FP4Tensor

_MEMBER_SEED = 0x9E3779B97F4A7C15
_SEEDS = 1 << 63


class GroupedResults(NamedTuple):
    """Those that are wanted; ``dbias`` is float32 [columns of all members, up to their bound]."""

    rows: GroupedFP4Tensor | None
    columns: GroupedFP4Tensor | None
    dbias: Tensor | None


def member_seed(seed: Tensor | int, member: int) -> Tensor | int:
    """The seed with which ``quantize`` makes the bytes that member number ``member`` has in a group with ``seed``."""
    if member == 0:
        return seed
    step = member * _MEMBER_SEED % _SEEDS
    return (seed + step) & (_SEEDS - 1)  # an int64 sum wraps, which the lower 63 bits do not notice


def column_sums(x: Tensor) -> Tensor:
    """Sums of the columns of x [M, K], float32 [K], in the order that docs/numerics.md gives."""
    m, k = x.shape
    parts = -(-m // PARTIAL_ROWS)
    padded = F.pad(x.float(), (0, 0, 0, parts * PARTIAL_ROWS - m))
    blocks = padded.reshape(parts, PARTIAL_ROWS // BLOCK, BLOCK, k)
    sums = blocks[:, :, 0]
    for i in range(1, BLOCK):
        sums = sums + blocks[:, :, i]
    while sums.shape[1] > 1:
        sums = sums[:, 0::2] + sums[:, 1::2]
    total = torch.zeros(k, dtype=torch.float32, device=x.device)
    for part in sums.squeeze(1).unbind(0):
        total = total + part
    return total


@torch.no_grad()
def quantize_grouped(args: GroupedArguments) -> GroupedResults:
    """What the kernels make of checked arguments, byte for byte within members; zeros behind the last one."""
    members = _values(args)
    results = [_result(args, members, transposed) for transposed in (False, True)]
    if not args.dbias:
        return GroupedResults(results[0], results[1], None)
    dbias = args.group.x.new_zeros(args.group.shape.column_bound, dtype=torch.float32)
    for i, begin in enumerate(_offsets([x.shape[1] for x in members])[:-1]):
        dbias[begin : begin + members[i].shape[1]] = column_sums(members[i])
    return GroupedResults(results[0], results[1], dbias)


def _values(args: GroupedArguments) -> list[Tensor]:
    """What is quantized of each member."""
    group, sizes = args.group, args.group.sizes()
    members = [group.x[at : at + m * k].view(m, k) for m, k, at in sizes]
    if group.h is None or args.gradient is None:
        return members
    inputs = [group.h[at : at + m * k].view(m, k) for m, k, at in sizes]
    return [produce_gradient(g, h, args.gradient) for g, h in zip(members, inputs, strict=True)]


def _result(args: GroupedArguments, members: list[Tensor], transposed: bool) -> GroupedFP4Tensor | None:
    sf_layout = args.layouts[transposed]
    if sf_layout is None:
        return None
    hadamard = args.hadamard if transposed else None
    options = QuantizeOptions(hadamard, args.seed is not None)
    sources = [x.t() if transposed else x for x in members]
    lines = _offsets([x.shape[0] for x in sources])
    per_member = args.per_member(transposed)
    amaxes = args.amaxes[transposed]
    if args.shared and amaxes is None and args.outer_scales[transposed] is None:
        amaxes = torch.stack([_tensor_amax(x, hadamard) for x in sources]).amax()

    def of(given: Tensor | None, i: int) -> Tensor | None:
        if given is None or given.dim() == 0:
            return given
        return given[i] if per_member else given[lines[i] : lines[i + 1]]

    parts = [
        quantize_checked(
            QuantizeArguments(
                source, per_member, sf_layout, args.convention, (1, BLOCK), of(args.outer_scales[transposed], i),
                of(amaxes, i), options, None if args.seed is None else member_seed(args.seed, i),
            )
        )
        for i, source in enumerate(sources)
    ]  # fmt: skip
    return _assemble(args, parts, transposed, sf_layout, per_member)


def _tensor_amax(source: Tensor, hadamard: int | None) -> Tensor:
    """Of a member, or of its transpose after the transform."""
    return amax(source.t(), rows=False, columns=True, hadamard=hadamard)[0].max() if source.numel() else _zero(source)


def _zero(x: Tensor) -> Tensor:
    return torch.zeros((), dtype=torch.float32, device=x.device)


def _offsets(sizes: list[int]) -> list[int]:
    offsets = [0]
    for size in sizes:
        offsets.append(offsets[-1] + size)
    return offsets


def _assemble(
    args: GroupedArguments, parts: list[FP4Tensor], transposed: bool, sf_layout: str, per_member: bool
) -> GroupedFP4Tensor:
    shape, x = args.shape(transposed), args.group.x
    data = x.new_zeros(shape.data_bytes(), dtype=torch.uint8)
    scales = x.new_zeros(shape.scale_bytes(scale_layout(sf_layout)), dtype=torch.uint8)
    outer = x.new_zeros(shape.members if per_member else shape.row_bound, dtype=torch.float32)
    sizes = ([t.data.numel() for t in parts], [t.block_scale.numel() for t in parts], [t.rows for t in parts])
    offsets = [_offsets(each) for each in sizes]
    for i, t in enumerate(parts):
        data[offsets[0][i] : offsets[0][i + 1]] = t.data.reshape(-1)
        scales[offsets[1][i] : offsets[1][i + 1]] = t.block_scale.view(torch.uint8).reshape(-1)
        if per_member:
            outer[i] = t.outer_scale
        else:
            outer[offsets[2][i] : offsets[2][i + 1]] = t.outer_scale
    index = torch.tensor([[t.rows for t in parts] + [0], [t.k for t in parts] + [0], *offsets], device=x.device)
    scaling = "per_tensor" if per_member else "per_row"
    return GroupedFP4Tensor(data, scales.view(torch.float8_e4m3fn), outer, index, sf_layout, scaling)

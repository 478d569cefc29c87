"""The quantizers as torch's operators.

An operator passes plain tensors and names: ``flat`` takes checked arguments apart, ``_arguments`` puts them together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fp4gemm.formats import BLOCK, PLAIN, QuantizeOptions
from fp4gemm.quantize_dispatch import resolved, run, run_amax, run_both, run_into, run_rmsnorm
from fp4gemm.reference.arguments import QuantizeArguments
from fp4gemm.tensor import FP4Tensor
from fp4gemm.tile_calls import Parts, empty_codes


def _flat_seed(seed: Tensor | int | None) -> tuple[Tensor | None, int | None]:
    return (seed, None) if isinstance(seed, Tensor) else (None, seed)


def flat(args: QuantizeArguments) -> tuple[Any, ...]:
    """Checked arguments as a custom op passes them."""
    o = args.options
    return (
        args.source, args.per_tensor, args.sf_layout, args.convention, args.block[0], args.outer_scale, args.amax,
        o.hadamard, *_flat_seed(args.seed), o.adaptive, o.residual, o.residual_side, args.channel_order,
        o.producer,
    )  # fmt: skip


def _arguments(
    x: Tensor, per_tensor: bool, sf_layout: str, convention: str, block_rows: int, outer_scale: Tensor | None,
    amax: Tensor | None = None, hadamard: int | None = None, seed: Tensor | None = None,
    seed_value: int | None = None, adaptive: str | None = None, residual: int = 0, residual_side: str = "activation",
    channel_order: Tensor | None = None, producer: str | None = None,
) -> QuantizeArguments:  # fmt: skip
    """Inverse of ``flat``."""
    either = seed_value if seed is None else seed
    options = QuantizeOptions(hadamard, either is not None, adaptive, residual, residual_side, producer)
    return QuantizeArguments(
        x, per_tensor, sf_layout, convention, (block_rows, BLOCK), outer_scale, amax,
        PLAIN if options == PLAIN else options, either, channel_order,
    )  # fmt: skip


# What ``_arguments`` takes, of which a caller of the operator may leave out the end.
_SCHEMA = (
    "Tensor x, bool per_tensor, str sf_layout, str convention, SymInt block_rows, Tensor? outer_scale, "
    "Tensor? amax=None, SymInt? hadamard=None, Tensor? seed=None, SymInt? seed_value=None, str? adaptive=None, "
    'SymInt residual=0, str residual_side="activation", Tensor? channel_order=None, str? producer=None'
)


def _quantize(*passed: Any) -> Parts:
    return run(_arguments(*passed))


def _quantize_out(data: Tensor, block_scale: Tensor, outer: Tensor, noop: Tensor | None, *passed: Any) -> None:
    args = _arguments(*passed)
    run_into(FP4Tensor(data, block_scale, outer, args.shape, args.sf_layout), args, noop)


def _fake_quantize(*passed: Any) -> Parts:
    return _empty_parts(_arguments(*passed))


def _empty_parts(args: QuantizeArguments) -> Parts:
    x, (m, k) = args.source, args.shape
    outer = x.new_empty(() if args.per_tensor else (m,), dtype=torch.float32)
    return *empty_codes(x, m, k, resolved(args).sf_layout), outer


def _quantize_rmsnorm(weight: Tensor, eps: float, residual: Tensor | None, *passed: Any) -> tuple[Tensor, ...]:
    return run_rmsnorm(_arguments(*passed), weight, eps, residual)


def _fake_quantize_rmsnorm(weight: Tensor, eps: float, residual: Tensor | None, *passed: Any) -> tuple[Tensor, ...]:
    args = _arguments(*passed)
    return *_empty_parts(args), args.source.new_empty(0 if residual is None else args.shape)


def flat_both(rows: QuantizeArguments, columns: QuantizeArguments) -> tuple[Any, ...]:
    """The arguments of both results as a custom op passes them."""
    return (
        rows.source, rows.per_tensor, columns.per_tensor, rows.sf_layout, columns.sf_layout, rows.convention,
        rows.block[0], rows.outer_scale, columns.outer_scale, rows.amax, columns.amax, columns.options.hadamard,
        *_flat_seed(rows.seed), rows.options.adaptive,
    )  # fmt: skip


def _both_arguments(
    x: Tensor, per_tensor: bool, transposed_per_tensor: bool, sf_layout: str, transposed_sf_layout: str,
    convention: str, block_rows: int, outer_scale: Tensor | None, transposed_outer_scale: Tensor | None,
    amax: Tensor | None, transposed_amax: Tensor | None, hadamard: int | None, seed: Tensor | None,
    seed_value: int | None, adaptive: str | None,
) -> tuple[QuantizeArguments, QuantizeArguments]:  # fmt: skip
    """Inverse of ``flat_both``."""
    shared = seed, seed_value, adaptive
    rows = _arguments(x, per_tensor, sf_layout, convention, block_rows, outer_scale, amax, None, *shared)
    columns = _arguments(
        x.t(), transposed_per_tensor, transposed_sf_layout, convention, block_rows, transposed_outer_scale,
        transposed_amax, hadamard, *shared,
    )  # fmt: skip
    return rows, columns


_SCHEMA_BOTH = (
    "Tensor x, bool per_tensor, bool transposed_per_tensor, str sf_layout, str transposed_sf_layout, "
    "str convention, SymInt block_rows, Tensor? outer_scale, Tensor? transposed_outer_scale, "
    "Tensor? amax, Tensor? transposed_amax, SymInt? hadamard, Tensor? seed, SymInt? seed_value, str? adaptive"
)


def _quantize_both(*passed: Any) -> tuple[Tensor, ...]:
    return run_both(*_both_arguments(*passed))


def _fake_quantize_both(*passed: Any) -> tuple[Tensor, ...]:
    rows, columns = _both_arguments(*passed)
    return *_empty_parts(rows), *_empty_parts(columns)


def _separate_amax(*args: Any) -> list[Tensor]:
    """What an operator may return: tensors that share no memory."""
    return [t if t.untyped_storage().nbytes() == t.nbytes else t.clone() for t in run_amax(*args)]


def _fake_amax(
    x: Tensor, rows: bool, columns: bool, tensor: bool, hadamard: int | None, sums: bool = False
) -> list[Tensor]:
    by_column = x.shape[1:]
    asked = ((rows, x.shape[:1]), (columns, by_column), (tensor, ()), (sums, by_column))
    shapes = [shape for wanted, shape in asked if wanted]
    return [x.new_empty(shape, dtype=torch.float32) for shape in shapes]


_SCHEMA_AMAX = "(Tensor x, bool rows, bool columns, bool tensor, SymInt? hadamard, bool sums=False) -> Tensor[]"

for _name, _implementation, _fake, _schema in (
    ("quantize", _quantize, _fake_quantize, f"({_SCHEMA}) -> (Tensor, Tensor, Tensor)"),
    ("quantize_both", _quantize_both, _fake_quantize_both, f"({_SCHEMA_BOTH}) -> ({', '.join(['Tensor'] * 6)})"),
    (
        "quantize_rmsnorm",
        _quantize_rmsnorm,
        _fake_quantize_rmsnorm,
        f"(Tensor weight, float eps, Tensor? residual, {_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)",
    ),
    ("amax", _separate_amax, _fake_amax, _SCHEMA_AMAX),
):
    _op = torch.library.custom_op(f"fp4gemm::{_name}", _implementation, mutates_args=(), schema=_schema)
    _op.register_fake(_fake)
torch.library.custom_op(  # returns nothing: needs no fake
    "fp4gemm::quantize_out",
    _quantize_out,
    mutates_args=("data", "block_scale", "outer"),
    schema=f"(Tensor(a!) data, Tensor(b!) block_scale, Tensor(c!) outer, Tensor? noop, {_SCHEMA}) -> ()",
)

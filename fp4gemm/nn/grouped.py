"""Linear layers of experts: ``linear`` and its gradients for each, in as many launches as for one.

    y  [T, N] = x   [T, K] . w   [E, N, K]^T    a row of x times the weight of its expert
    dx [T, K] = dy  [T, N] . w^T [E, K, N]^T    the same with w transposed
    dw [E, N, K]                                for each expert dy_e^T . x_e^T, quantized along its own tokens

Every expert has the operands, byte for byte, that ``linear`` would have for its rows alone; only the device knows
which rows these are.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fp4gemm import ops
from fp4gemm.dispatch import direct
from fp4gemm.formats import BLOCK, padded_k
from fp4gemm.group.ops import quantize_grouped
from fp4gemm.group.tensor import GroupedFP4Tensor
from fp4gemm.grouped import MAX_EXPERTS, GroupedWeight
from fp4gemm.nn import weight_gradient
from fp4gemm.nn.context import check_recipe, resolve
from fp4gemm.nn.functional import added_to_main_grad, draw_seed, has_main_grad, plain, under_autocast, weight_forms
from fp4gemm.nn.layer import KeepsWeight
from fp4gemm.nn.recipes import Recipe
from fp4gemm.reference.arguments import check_float
from fp4gemm.tensor import FP4Tensor


class GroupedLinear(KeepsWeight):
    """E linear layers in_features -> out_features: each row of x goes through that of its expert.

    What :class:`fp4gemm.nn.Linear` is for one, with the same recipes but for per-tensor activations: gradients,
    ``main_grad``, weights that are kept in eval mode or inside ``micro_batches``. The sizes of experts are read by the
    device alone, so a captured step follows the offsets that stand there when it is replayed. Hopper, and the CPU.

    Args:
        num_experts: E, 1 to 1024.
        recipe: None: that of the innermost :class:`fp4gemm.autocast`, else ``per_token()``.

    Parameters: ``weight`` [E, out_features, in_features] and ``bias`` [E, out_features], uniform as those of
    ``torch.nn.Linear``. Raises TypeError or ValueError that names the argument.
    """

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        recipe: Recipe | None = None,
    ) -> None:
        _check_recipe(recipe)
        if not 1 <= num_experts <= MAX_EXPERTS:
            raise ValueError(f"num_experts: expected 1 to {MAX_EXPERTS}, got {num_experts}")
        super().__init__()
        self.num_experts, self.in_features, self.out_features = num_experts, in_features, out_features
        self.recipe = recipe
        shape = num_experts, out_features, in_features
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(shape[:2], device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Every expert as a ``torch.nn.Linear`` of its own."""
        bound = 1 / math.sqrt(self.in_features) if self.in_features else 0.0
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: Tensor, offsets: Tensor, *, producer: str | None = None) -> Tensor:
        """[T, out_features] of x [T, in_features], sorted by expert; rows of no expert are undefined.

        Args:
            offsets: int64 [E + 1], on the device of x: 0, and where the rows of each expert end; not decreasing, T at
                most. On CUDA nobody checks the values.
            producer: what makes the activations of x, as :func:`fp4gemm.quantize` has it: ``silu_mul`` of [T, 2
                in_features], gate and up, ``gelu_tanh`` or ``relu2``. Without gradients, and not where the recipe
                leaves activations as they are.
        """
        keep, serving = True, not self.training
        return run(x, self.weight, offsets, self.bias, self.recipe, producer, keep, serving)

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, recipe={self.recipe}"
        )


def run(
    x: Tensor, w: Tensor, offsets: Tensor, bias: Tensor | None, recipe: Recipe | None, producer: str | None = None,
    keep: bool = False, serving: bool = False,
) -> Tensor:  # fmt: skip
    """What a GroupedLinear does; ``keep`` and ``serving`` as of ``functional.run``."""
    recipe = resolve(recipe)
    _check_recipe(recipe)
    _check(x, w, offsets, bias, producer)
    if recipe is None:
        return _unquantized(x, w, offsets, bias, producer)
    x = under_autocast(x)
    if producer is not None and recipe.activations is None:
        raise ValueError(f"producer: expected None where the recipe leaves activations as they are, got {producer!r}")
    if torch.is_grad_enabled() and (x.requires_grad or w.requires_grad or (bias is not None and bias.requires_grad)):
        if producer is not None:
            raise NotImplementedError(f"producer: {producer!r} has no gradient; call it without, or under no_grad")
        y: Tensor = _GroupedLinear.apply(x, w, bias, offsets, recipe, keep)  # type: ignore[no-untyped-call]
        return y
    if direct(x, w, bias):
        return _infer(x, w, offsets, bias, recipe, producer, keep, serving)
    fields = (recipe.activations, recipe.weights, recipe.weight_2d)
    result: Tensor = torch.ops.fp4gemm.grouped_linear(x, w, offsets, bias, *fields, producer, keep, serving)
    return result


def _check_recipe(recipe: Recipe | None) -> None:
    check_recipe(recipe)
    if recipe is not None and recipe.activations == "per_tensor":
        raise ValueError(
            "recipe: activations='per_tensor' is not supported for experts, as grouped products have an outer scale "
            "for each token: expected 'per_row' or None"
        )


def _check(x: Tensor, w: Tensor, offsets: Tensor, bias: Tensor | None, producer: str | None) -> None:
    experts, n, k = w.shape
    for name, t in (("x", x), ("bias", bias)):
        if t is None and name == "bias":
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(t).__name__}")
        check_float(f"{name}.dtype", t.dtype)
    if not isinstance(offsets, Tensor):
        raise TypeError(f"offsets: expected a torch.Tensor, got {type(offsets).__name__}")
    if offsets.dtype != torch.int64:
        raise TypeError(f"offsets: expected dtype torch.int64, got {offsets.dtype}")
    width = 2 * k if producer == "silu_mul" else k
    if x.dim() != 2 or x.shape[1] != width:
        raise ValueError(f"x: expected [T, {width}] (weights are {list(w.shape)}), got shape {list(x.shape)}")
    for name, t, shape in (("offsets", offsets, (experts + 1,)), ("bias", bias, (experts, n))):
        if t is not None and tuple(t.shape) != shape:
            raise ValueError(f"{name}: expected shape {list(shape)} (weights are {list(w.shape)}), got {list(t.shape)}")
    for name, t in (("weight", w), ("offsets", offsets), ("bias", bias)):
        if t is not None and t.device != x.device:
            raise ValueError(f"{name}: expected device {x.device} (that of x), got {t.device}")
    readable = offsets.device.type == "cpu" and type(offsets) is Tensor and not torch.compiler.is_compiling()
    if readable and (first := int(offsets[0])):
        raise ValueError(f"offsets: expected 0 first, got {first}")


def _unquantized(x: Tensor, w: Tensor, offsets: Tensor, bias: Tensor | None, producer: str | None) -> Tensor:
    """As torch multiplies, whatever it needs for that."""
    if producer is not None:
        raise ValueError(f"producer: expected None where nothing is quantized, got {producer!r}")
    y = F.grouped_mm(x, w.to(x.dtype).transpose(1, 2), offs=offsets[1:].int())
    if bias is None:
        return y
    rows = torch.arange(x.shape[0], device=x.device)
    expert = torch.searchsorted(offsets[1:], rows, right=True).clamp(max=w.shape[0] - 1)
    return y + bias[expert].to(y.dtype)  # in this order, for a gradient that is summed as the bias is stored


def _multiply(
    x: Tensor, w4: GroupedWeight, offsets: Tensor, bias: Tensor | None, recipe: Recipe, producer: str | None = None
) -> Tensor:
    """The result where nothing needs x transposed."""
    if recipe.activations is None:
        return ops.gemm_grouped(plain(x), w4, offsets, bias, out_dtype=x.dtype)
    return ops.quantize_gemm_grouped(x, w4, offsets, bias, producer=producer)


def _infer(
    x: Tensor, w: Tensor, offsets: Tensor, bias: Tensor | None, recipe: Recipe, producer: str | None, keep: bool,
    serving: bool,
) -> Tensor:  # fmt: skip
    return _multiply(x, weight_forms(w, recipe, False, keep, serving)[0], offsets, bias, recipe, producer)


class _GroupedLinear(torch.autograd.Function):
    """x [T, K], w [E, N, K]. Traceable: it calls what torch.compile sees as operators."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, offsets: Tensor, recipe: Recipe, keep: bool
    ) -> Tensor:
        needs_x, needs_w = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        w4, w4t = weight_forms(w, recipe, needs_x, keep, False)
        columns: GroupedFP4Tensor | None = None
        if needs_w and recipe.activations is not None:
            rows, columns, _ = _forms(x, offsets, True, True, False, recipe.hadamard, None)
            y = ops.gemm_grouped(rows, w4, offsets, bias, out_dtype=x.dtype)  # type: ignore[arg-type]
        else:
            y = _multiply(x, w4, offsets, bias, recipe)
        saved_w = (w4t.data, w4t.outer_scale) if needs_x else (None, None)
        saved_x = x if needs_w and columns is None else None
        ctx.save_for_backward(offsets, saved_x, *weight_gradient.saved(columns), *saved_w)
        ctx.recipe, ctx.dtypes = recipe, (x.dtype, w.dtype, None if bias is None else bias.dtype)
        ctx.shape = tuple(w.shape)
        ctx.weight = w if needs_w and has_main_grad(w) else None
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        needs_x, needs_w, needs_bias = ctx.needs_input_grad[:3]
        recipe, (x_dtype, w_dtype, bias_dtype) = ctx.recipe, ctx.dtypes
        experts, n, k = ctx.shape
        offsets, x, *columns, wt_data, wt_outer = ctx.saved_tensors
        dy = dy.contiguous()
        dx = dw = dyt = db = None
        rows: Any = None
        if recipe.activations is not None:
            seed = draw_seed(dy) if recipe.stochastic and (needs_x or needs_w) else None
            rows, dyt, db = _forms(dy, offsets, needs_x, needs_w, needs_bias, recipe.hadamard, seed)
        else:
            rows = plain(dy)
            if needs_bias:
                db = _forms(dy, offsets, False, False, True, None, None)[2]
        if needs_x:
            wt = GroupedWeight(wt_data, wt_outer, (experts, k, n))
            dx = dy.new_zeros((dy.shape[0], k), dtype=x_dtype)  # rows of no expert stay 0
            ops.gemm_grouped(rows, wt, offsets, out=dx)
        if needs_w:
            dtype = w_dtype if ctx.weight is None else torch.float32
            if dyt is not None:
                dw = weight_gradient.quantized(dyt, weight_gradient.restored(columns), dy.shape[0], dtype)
            else:
                dw = weight_gradient.plain(rows, plain(x), offsets, dtype)
            if ctx.weight is not None:
                ctx.weight.main_grad.add_(dw)
                dw = added_to_main_grad(ctx.weight)
        return dx, dw, None if db is None else db.to(bias_dtype), None, None, None


def _forms(
    t: Tensor, offsets: Tensor, rows: bool, columns: bool, sums: bool, hadamard: int | None, seed: Tensor | None
) -> tuple[FP4Tensor | None, GroupedFP4Tensor | None, Tensor | None]:
    """``t`` [T, N] by rows, the transposes of its experts, and their sums of columns, float32 [E, N]: what is asked."""
    if not (rows or columns or sums):
        return None, None, None
    both, transposed = rows and columns, columns and not rows
    found: Any = quantize_grouped(  # type: ignore[call-overload]
        t.contiguous(), offsets=offsets, sf_layout="linear", both=both, transposed=transposed, dbias=sums,
        hadamard=hadamard if columns else None, seed=seed,
    )  # fmt: skip
    parts = list(found) if isinstance(found, tuple) else [found]
    total = parts.pop() if sums else None
    by_column = parts.pop() if columns else None
    return _whole(parts[0], t) if rows else None, by_column, total


def _whole(t: GroupedFP4Tensor, source: Tensor) -> FP4Tensor:
    """Rows of members without gaps, from row 0 on, as those of one matrix."""
    m, k = source.shape
    blocks = padded_k(k) // BLOCK
    return FP4Tensor(t.data.view(m, 8 * blocks), t.block_scale.view(m, blocks), t.outer_scale, (m, k), "linear")


@torch.library.custom_op("fp4gemm::grouped_linear", mutates_args=())
def _grouped_linear(
    x: Tensor, w: Tensor, offsets: Tensor, bias: Tensor | None, activations: str | None, weights: str, weight_2d: bool,
    producer: str | None, keep: bool, serving: bool,
) -> Tensor:  # fmt: skip
    """Without gradients, as torch.compile sees it; see ``fp4gemm::linear``."""
    return _infer(x, w, offsets, bias, Recipe(activations, weights, weight_2d), producer, keep, serving)


@_grouped_linear.register_fake
def _fake_grouped_linear(
    x: Tensor, w: Tensor, offsets: Tensor, bias: Tensor | None, activations: str | None, weights: str, weight_2d: bool,
    producer: str | None, keep: bool, serving: bool,
) -> Tensor:  # fmt: skip
    return x.new_empty((x.shape[0], w.shape[1]))

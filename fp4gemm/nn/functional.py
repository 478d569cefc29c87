"""``linear`` and its gradients: three GEMMs, each operand quantized along the K of its GEMM.

    y  [M, N] = x    [M, K] . w    [N, K]^T    TN: x by rows, w by rows
    dx [M, K] = dy   [M, N] . w^T  [K, N]^T    NN: dy by rows, w transposed
    dw [N, K] = dy^T [N, M] . x^T  [K, M]^T    NT: dy and x transposed

x, w and dy are each quantized in one pass, to one form or to both: only what a gradient needs is made. What waits for
the backward pass is quantized x^T and w^T, not x.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fp4gemm import ops
from fp4gemm.dispatch import direct
from fp4gemm.formats import LEFT, RIGHT
from fp4gemm.nn.context import check_recipe, resolve
from fp4gemm.nn.recipes import Recipe
from fp4gemm.nn.weights import kept_weight, quantize_weight
from fp4gemm.operands import quantize_operands
from fp4gemm.reference.arguments import check_float
from fp4gemm.tensor import FP4Tensor

_INFERENCE_LAYOUT = "linear"  # scales of activations that a GEMM of the same call reads


def linear(x: Tensor, w: Tensor, bias: Tensor | None = None, recipe: Recipe | None = None) -> Tensor:
    """x [..., K] . w [N, K]^T + bias [N], as ``recipe`` quantizes it, with gradients quantized likewise.

    Under ``torch.autocast`` x is rounded to its dtype, as ``torch.nn.functional.linear`` would; the weight and the
    bias are read as they are.

    Args:
        x: bf16, fp16 or fp32; the result has its dtype.
        w: bf16, fp16 or fp32. Where it requires a gradient and has ``main_grad``, fp32 [N, K], that gradient is
            added there, and not to ``w.grad``.
        recipe: default: that of the innermost :class:`fp4gemm.autocast`, else ``per_token()``.

    Raises:
        TypeError: an argument has another type or dtype than the above.
        ValueError: shapes or devices do not fit together; the message names the argument.
    """
    return run(x, w, bias, recipe)


def run(
    x: Tensor, w: Tensor, bias: Tensor | None, recipe: Recipe | None, keep: bool = False, serving: bool = False
) -> Tensor:
    """``linear``; ``keep``: what is made of w may be kept, ``serving``: from one call to the next without gradients."""
    check_recipe(recipe)
    recipe = resolve(recipe)
    if recipe is None:
        return F.linear(x, w, bias)
    _check(x, w, bias)
    x = under_autocast(x)
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if torch.is_grad_enabled() and (x.requires_grad or w.requires_grad or (bias is not None and bias.requires_grad)):
        y: Tensor = _Linear.apply(rows, w, bias, recipe, keep)  # type: ignore[no-untyped-call]
    elif direct(rows, w, bias):
        y = _infer(rows, w, bias, recipe, keep, serving)
    else:
        fields = (recipe.activations, recipe.weights, recipe.weight_2d)
        y = torch.ops.fp4gemm.linear(rows, w, bias, *fields, keep, serving)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], w.shape[0])


def under_autocast(x: Tensor) -> Tensor:
    """``x`` in the dtype that ``torch.autocast`` asks for."""
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):  # which does not know that device
        return x.to(torch.get_autocast_dtype(kind))
    return x


def _check(x: Tensor, w: Tensor, bias: Tensor | None) -> None:
    for name, t in (("x", x), ("w", w), ("bias", bias)):
        if t is None and name == "bias":
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(t).__name__}")
        check_float(f"{name}.dtype", t.dtype)
        if t.device != x.device:
            raise ValueError(f"{name}: expected device {x.device} (that of x), got {t.device}")
    if w.dim() != 2:
        raise ValueError(f"w: expected shape [N, K], got {list(w.shape)}")
    if x.dim() == 0 or x.shape[-1] != w.shape[1]:
        raise ValueError(f"x: expected [..., K] with K = {w.shape[1]} (that of w), got shape {list(x.shape)}")
    if bias is not None and tuple(bias.shape) != (w.shape[0],):
        raise ValueError(f"bias: expected shape [{w.shape[0]}] (N of w), got {list(bias.shape)}")


def plain(t: Tensor) -> Tensor:
    """An operand that is not quantized, in a dtype that GEMMs take."""
    return t if t.dtype != torch.float32 else t.bfloat16()


def multiply(x: Tensor, w4: FP4Tensor, bias: Tensor | None, recipe: Recipe) -> Tensor:
    """The result where nothing needs x transposed."""
    if recipe.activations is None:
        return ops.gemm(plain(x), w4, bias, out_dtype=x.dtype)
    if recipe.activations == "per_row":
        return ops.quantize_gemm(x, w4, bias)
    x4 = ops.quantize(x, scaling=recipe.activations, sf_layout=_INFERENCE_LAYOUT)
    return ops.gemm(x4, w4, bias, out_dtype=x.dtype)


def weight_forms(w: Tensor, recipe: Recipe, columns: bool, keep: bool, serving: bool) -> tuple[Any, Any]:
    """Quantized w, and its transpose, None unless ``columns``; FP4Tensors, or GroupedWeights of w [E, N, K]."""
    return kept_weight(w, recipe, columns, serving) if keep and direct(w) else quantize_weight(w, recipe, columns)


def _infer(x: Tensor, w: Tensor, bias: Tensor | None, recipe: Recipe, keep: bool, serving: bool) -> Tensor:
    return multiply(x, weight_forms(w, recipe, False, keep, serving)[0], bias, recipe)


class _Linear(torch.autograd.Function):
    """x [M, K], w [N, K]. Traceable: it calls what torch.compile sees as operators."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, recipe: Recipe, keep: bool) -> Tensor:
        needs_x, needs_w = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        w4, w4t = weight_forms(w, recipe, needs_x, keep, False)
        x4t: Any = None
        if needs_w and recipe.activations is not None:
            left, x4t = quantize_operands(
                x, True, True, scaling=recipe.activations, hadamard=recipe.hadamard, sides=(LEFT, RIGHT)
            )
            assert left is not None
            y = ops.product(left, w4, bias, x.dtype)
        else:
            y = multiply(x, w4, bias, recipe)
            x4t = x if needs_w else None
        saved_x, ctx.x_kind = _leaves(x4t)
        saved_w, ctx.w_kind = _leaves(w4t if needs_x else None)
        ctx.save_for_backward(*saved_x, *saved_w)
        ctx.recipe, ctx.dtypes = recipe, (x.dtype, w.dtype, None if bias is None else bias.dtype)
        ctx.weight = w if needs_w and has_main_grad(w) else None
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        needs_x, needs_w, needs_bias = ctx.needs_input_grad[:3]
        recipe, (x_dtype, w_dtype, bias_dtype) = ctx.recipe, ctx.dtypes
        saved = ctx.saved_tensors
        x4t, w4t = _operand(saved[:3], ctx.x_kind), _operand(saved[3:], ctx.w_kind)
        xt, wt = x4t if needs_w else None, w4t if needs_x else None
        dx, dw, db = gradients(dy, xt, wt, recipe, x_dtype, w_dtype, ctx.weight, needs_bias)
        return dx, dw, None if db is None else db.to(bias_dtype), None, None


def gradients(
    dy: Tensor, xt: Any, wt: FP4Tensor | None, recipe: Recipe, x_dtype: torch.dtype,
    w_dtype: torch.dtype | None = None, owner: Tensor | None = None, needs_bias: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """dx, dw and db (float32) of dy [M, N]; ``xt`` and ``wt``: what forward saved, None where that gradient is not
    needed."""
    (rows, columns), db = _gradient_forms(dy, wt is not None, xt is not None, needs_bias, recipe)
    dx = None if wt is None else ops.product(rows, wt, None, x_dtype)
    del rows  # as many bytes as dy, which dw does not need
    dw = None if xt is None else _weight_gradient(columns, xt, w_dtype or x_dtype, owner)
    return dx, dw, db


def draw_seed(dy: Tensor) -> Tensor:
    """From the generator of the device: torch.manual_seed repeats it, and a CUDA graph draws anew in every replay."""
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=dy.device)


def has_main_grad(w: Tensor) -> bool:
    # A compiled graph cannot set Megatron-LM's flag: there its hooks add the gradient, as for any other layer.
    compiling = torch.compiler.is_compiling() and hasattr(w, "grad_added_to_main_grad")
    return hasattr(w, "main_grad") and not compiling


def _gradient_forms(
    dy: Tensor, needs_x: bool, needs_w: bool, needs_bias: bool, recipe: Recipe
) -> tuple[tuple[Any, Any], Tensor | None]:
    """dy for dx and its transpose for dw; and its sums for the bias."""
    seed = draw_seed(dy) if recipe.stochastic and (needs_x or needs_w) else None
    scaling, hadamard = recipe.activations, recipe.hadamard
    amax: tuple[Tensor | None, Tensor | None] = None, None
    sums: Tensor | None = None
    if scaling == "per_row" and needs_w and needs_bias:  # the sums come from the read that takes amaxes
        *by_row, by_column, sums = ops.amax(dy, rows=needs_x, columns=True, hadamard=hadamard, sums=True)
        amax = by_row[0] if needs_x else None, by_column
    elif needs_bias:
        sums = dy.sum(0, dtype=torch.float32)
    if scaling is None:
        return (plain(dy), plain(dy).t()), sums
    forms = quantize_operands(dy, needs_x, needs_w, scaling=scaling, hadamard=hadamard, seed=seed, amax=amax)
    return forms, sums


def _weight_gradient(dyt: Any, xt: Any, dtype: torch.dtype, owner: Tensor | None) -> Tensor | None:
    """dw [N, K], or None, and added to what ``owner`` has as main_grad."""
    if owner is None:
        return _product(dyt, xt, dtype)
    main = owner.main_grad  # type: ignore[attr-defined]
    if tuple(main.shape) != tuple(owner.shape) or main.device != owner.device:
        expected = f"shape {list(owner.shape)} on {owner.device} (those of the weight)"
        raise ValueError(f"main_grad: expected {expected}, got {list(main.shape)} on {main.device}")
    if not isinstance(dyt, Tensor) and main.dtype == torch.float32 and 1 in main.stride():
        ops.product(dyt, xt, None, torch.float32, c=main, out=main)
    else:
        main.add_(_product(dyt, xt, torch.float32))
    return added_to_main_grad(owner)


def added_to_main_grad(owner: Tensor) -> Tensor | None:
    """What autograd gets in place of a gradient that ``owner.main_grad`` has now."""
    if not hasattr(owner, "grad_added_to_main_grad"):
        return None
    # Megatron-LM: its hooks run on a gradient, which this tells them to drop.
    owner.grad_added_to_main_grad = True
    make = torch.zeros_like if getattr(owner, "zero_out_wgrad", False) else torch.empty_like
    return make(owner, requires_grad=False)


def _product(dyt: Any, xt: Any, dtype: torch.dtype) -> Tensor:
    if not isinstance(dyt, Tensor):
        return ops.product(dyt, xt, None, dtype)
    with nullcontext() if dyt.is_meta else torch.autocast(dyt.device.type, enabled=False):
        return torch.mm(dyt, plain(xt)).to(dtype)


_Kind = tuple[tuple[int, int], str, str | None] | None


def _leaves(t: FP4Tensor | Tensor | None) -> tuple[tuple[Tensor | None, Tensor | None, Tensor | None], _Kind]:
    """Three tensors to save, and what else it takes to restore ``t``."""
    if isinstance(t, FP4Tensor):
        return (t.data, t.block_scale, t.outer_scale), (t.shape, t.sf_layout, t.prepacked)
    return (t, None, None), None


def _operand(saved: Any, kind: _Kind) -> Any:
    if kind is None:
        return saved[0]
    data, block_scale, outer_scale = saved
    return FP4Tensor(data, block_scale, outer_scale, *kind)


@torch.library.custom_op("fp4gemm::linear", mutates_args=())
def _linear(
    x: Tensor, w: Tensor, bias: Tensor | None, activations: str | None, weights: str, weight_2d: bool,
    keep: bool, serving: bool,
) -> Tensor:  # fmt: skip
    """Without gradients, as torch.compile sees it: it finds quantized weights when it runs, not when it is traced."""
    return _infer(x, w, bias, Recipe(activations, weights, weight_2d), keep, serving)


@_linear.register_fake
def _fake_linear(
    x: Tensor, w: Tensor, bias: Tensor | None, activations: str | None, weights: str, weight_2d: bool,
    keep: bool, serving: bool,
) -> Tensor:  # fmt: skip
    return x.new_empty((x.shape[0], w.shape[0]))

"""What a training step is made of, over its shapes: quantizing, amaxes, scale layouts, the three products, both passes.

Row ``op``:

- ``quantize``: x to both forms, amaxes included; ``amax``: the first half of it;
- ``swizzle``: quantize straight into a tiled scale layout; beside it (``pair``) linear scales, then rearranged;
- ``gemm``: quantized operands, rescaled per row and per column in the epilogue; beside it (``post_scale``) a GEMM
  without outer scales into float32 and a kernel that rescales and rounds it;
- ``forward``: a layer without gradients, its weight kept; ``backward``: dy quantized, dx and dw.

``layout``: TN is x . w^T, NN dy . w, NT dy^T . x; M, N and K are those of the layer: x [M, K], w [N, K], dy [M, N].
``cublas_bf16`` is torch's product of the same layout, and for passes all that torch does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

import fp4gemm
from fp4gemm.bench import timing
from fp4gemm.bench.common import Config, Job, random_inputs
from fp4gemm.bench.timing import Call
from fp4gemm.formats import LEFT, RIGHT, SF_LAYOUTS
from fp4gemm.nn import functional
from fp4gemm.nn.recipes import Recipe, per_token, w4a16
from fp4gemm.nn.weights import quantize_weight
from fp4gemm.operands import quantize_operands
from fp4gemm.report import Row
from fp4gemm.tensor import FP4Tensor

SIZES = (1024, 2048, 4096, 8192, 16384, 32768)  # M
WIDTHS = (2048, 4096, 8192)  # K, and N
DECODE = (16,)  # M of forward alone
LAYOUTS = ("TN", "NN", "NT")
RECIPES = {
    "per_token": per_token(),
    "per_token_rht_sr_2d": per_token(rht=True, sr=True, weight_2d=True),
    "w4a16": w4a16(),
}
_FORWARD, _BACKWARD = ("per_token", "w4a16"), ("per_token", "per_token_rht_sr_2d")
_QUICK = (4096,), (4096,)
_SCALE_LAYOUTS_AT = (8192, 8192)  # M, K at which GEMMs read every scale layout


def jobs(config: Config) -> Iterator[Job]:
    """Every mode at every shape; ``shapes`` and ``sizes`` of the configuration choose others."""
    sizes, widths = _QUICK if config.quick else (SIZES, WIDTHS)
    shapes = config.shapes or tuple((width, width) for width in widths)
    for N, K in shapes:
        for M in config.sizes or sizes:
            for op, run in _OPS.items():
                label = f"sweep {op} {M}x{N}x{K}"
                yield Job(label, functools.partial(run, M, N, K, config))
        for M in () if config.sizes else DECODE:
            yield Job(f"sweep forward {M}x{N}x{K}", functools.partial(_forward, M, N, K, config))


def _row(op: str, M: int, N: int, K: int, layout: str, options: Mapping[str, object]) -> Row:
    row = {"bench": "sweep", "op": op, "layout": layout, "M": M, "N": N, "K": K}
    return {**row, "dtype": "bf16", "options": dict(options)}


def _measured(row: Row, ours: Sequence[Call], others: Mapping[str, Sequence[Call]], config: Config) -> list[Row]:
    rows = []
    for mode in timing.MODES:
        us = timing.compare({"fp4gemm": ours, **others}, mode, config.repeats)
        rows.append({**row, "mode": mode, "us": us["fp4gemm"], "vs_us": {name: us[name] for name in others}})
    return rows


def _each(function: Callable[..., object], *inputs: Sequence[Any], **arguments: Any) -> list[Call]:
    return [functools.partial(function, *each, **arguments) for each in zip(*inputs, strict=True)]


def _inputs(M: int, K: int) -> list[torch.Tensor]:
    return random_inputs(timing.rotation(2 * M * K), M, K)


# --- quantizing -------------------------------------------------------------------------------------------------------


def _quantize(M: int, N: int, K: int, config: Config) -> list[Row]:
    xs = _inputs(M, K)
    rows = []
    for name in _BACKWARD:
        recipe = RECIPES[name]
        seed = torch.ones(1, dtype=torch.int64, device=timing.DEVICE) if recipe.stochastic else None
        arguments: dict[str, Any] = {"hadamard": recipe.hadamard, "seed": seed}
        row = _row("quantize", M, N, K, "none", {"recipe": name})
        rows += _measured(row, _each(fp4gemm.quantize_both, xs, **arguments), {}, config)
    return rows


def _amax(M: int, N: int, K: int, config: Config) -> list[Row]:
    calls = _each(fp4gemm.amax, _inputs(M, K), rows=True, columns=True)
    return _measured(_row("amax", M, N, K, "none", {}), calls, {}, config)


def _pair(x: torch.Tensor, sf_layout: str) -> FP4Tensor:
    return fp4gemm.quantize(x, sf_layout="linear").with_layout(sf_layout)


def _swizzle(M: int, N: int, K: int, config: Config) -> list[Row]:
    xs = _inputs(M, K)
    rows = []
    for sf_layout in SF_LAYOUTS:
        if SF_LAYOUTS[sf_layout].swizzled:
            row = _row("swizzle", M, N, K, "none", {"sf_layout": sf_layout})
            fused = _each(fp4gemm.quantize, xs, sf_layout=sf_layout)
            rows += _measured(row, fused, {"pair": _each(_pair, xs, sf_layout=sf_layout)}, config)
    return rows


# --- products ---------------------------------------------------------------------------------------------------------


def _rescale(d: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    return (d * columns * rows[:, None]).to(torch.bfloat16)


def _rescale_in_two(d: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    return torch.mul(d.mul_(columns), rows[:, None], out=torch.empty_like(d, dtype=torch.bfloat16))


@functools.cache
def _post_scale() -> tuple[Callable[..., torch.Tensor], int]:
    """What reads a float32 product and writes bf16, and its kernels: one, compiled by torch, where torch can."""
    d, scale = torch.ones(4, 6, device=timing.DEVICE), torch.ones(6, device=timing.DEVICE)
    compiled = torch.compile(_rescale, dynamic=True)
    try:
        compiled(d, scale[:4], scale)
    except Exception:  # no triton or no C compiler: whatever it is, two of torch's own kernels do it
        return _rescale_in_two, 2
    return compiled, 1


def _gemm_then_scale(a: FP4Tensor, b: FP4Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    return _post_scale()[0](fp4gemm.gemm(a, b, out_dtype=torch.float32), rows, columns)


def _unscaled(t: FP4Tensor) -> FP4Tensor:
    one = torch.ones((), device=t.device)
    return FP4Tensor(t.data, t.block_scale, one, t.shape, t.sf_layout, t.prepacked)


def product_shape(layout: str, M: int, N: int, K: int) -> tuple[int, int, int]:
    """Rows of the result, its columns, and what is summed over."""
    return {"TN": (M, N, K), "NN": (M, K, N), "NT": (N, K, M)}[layout]


def _torch_product(layout: str, M: int, N: int, K: int, count: int) -> list[Call]:
    """cuBLAS on the operands as a layer has them: transposed views where the layout says so."""
    x, w, dy = ((M, K), (N, K), (M, N))
    first, second = {"TN": (x, w), "NN": (dy, w), "NT": (dy, x)}[layout]
    left, right = random_inputs(count, *first), random_inputs(count, *second)
    return [
        functools.partial(torch.mm, a.t() if layout == "NT" else a, b.t() if layout == "TN" else b)
        for a, b in zip(left, right, strict=True)
    ]


def _gemm(M: int, N: int, K: int, config: Config) -> list[Row]:
    rows = []
    for layout in LAYOUTS:
        m, n, k = product_shape(layout, M, N, K)
        every = layout == "TN" and (M, K) == _SCALE_LAYOUTS_AT
        for sf_layout in SF_LAYOUTS if every else ("128x4",):
            rows += _gemm_rows(layout, (M, N, K), (m, n, k), sf_layout, config)
    return rows


def _gemm_rows(
    layout: str, sizes: tuple[int, int, int], product: tuple[int, int, int], sf_layout: str, config: Config
) -> list[Row]:
    m, n, k = product
    written = 2 * m * n  # so many bytes are allocated for each copy too
    count = timing.rotation((m * k + n * k) // 2 + written)
    left = [fp4gemm.quantize(random_inputs(1, m, k)[0], sf_layout=sf_layout) for _ in range(count)]
    right = [fp4gemm.quantize(random_inputs(1, n, k)[0]).prepack() for _ in range(count)]
    scales = [a.outer_scale for a in left], [b.outer_scale for b in right]
    plain = [_unscaled(a) for a in left], [_unscaled(b) for b in right]
    others = {
        "post_scale": _each(_gemm_then_scale, *plain, *scales),
        "cublas_bf16": _torch_product(layout, *sizes, timing.rotation(2 * (m * k + n * k) + written)),
    }
    row = {**_row("gemm", *sizes, layout, {"sf_layout": sf_layout}), "post_scale_kernels": _post_scale()[1]}
    return _measured(row, _each(fp4gemm.gemm, left, right), others, config)


# --- passes -----------------------------------------------------------------------------------------------------------


def _layers(N: int, K: int, count: int, recipe: Recipe) -> list[fp4gemm.nn.Linear]:
    make = functools.partial(fp4gemm.nn.Linear, K, N, False, timing.DEVICE, torch.bfloat16, recipe=recipe)
    return [make().eval() for _ in range(count)]


@torch.no_grad()
def _call(layer: torch.nn.Module, x: torch.Tensor) -> object:
    return layer(x)


def _forward(M: int, N: int, K: int, config: Config) -> list[Row]:
    rows = []
    for name in _FORWARD:
        layers = _layers(N, K, timing.rotation(N * K // 2), RECIPES[name])  # the quantized weight is what is read
        xs = random_inputs(len(layers), M, K)
        ours = _each(_call, layers, xs)
        others = {"cublas_bf16": _each(F.linear, xs, [layer.weight.detach() for layer in layers])}
        rows += _measured(_row("forward", M, N, K, "TN", {"recipe": name}), ours, others, config)
    return rows


def _backward_pass(dy: torch.Tensor, xt: FP4Tensor, wt: FP4Tensor, recipe: Recipe) -> object:
    return functional.gradients(dy, xt, wt, recipe, dy.dtype)


def _torch_backward(dy: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> object:
    return torch.mm(dy, w), torch.mm(dy.t(), x)


def _backward(M: int, N: int, K: int, config: Config) -> list[Row]:
    count = timing.rotation(2 * (M * N + M * K + N * K))
    dys, xs, ws = random_inputs(count, M, N), random_inputs(count, M, K), random_inputs(count, N, K)
    rows = []
    for name in _BACKWARD:
        recipe = RECIPES[name]
        assert recipe.activations is not None
        how: dict[str, Any] = {"scaling": recipe.activations, "hadamard": recipe.hadamard, "sides": (LEFT, RIGHT)}
        xts = [quantize_operands(x, False, True, **how)[1] for x in xs]
        wts = [quantize_weight(w, recipe, True)[1] for w in ws]
        ours = _each(functools.partial(_backward_pass, recipe=recipe), dys, xts, wts)
        others = {"cublas_bf16": _each(_torch_backward, dys, xs, ws)}
        rows += _measured(_row("backward", M, N, K, "NN+NT", {"recipe": name}), ours, others, config)
    return rows


_OPS: dict[str, Callable[[int, int, int, Config], list[Row]]] = {
    "quantize": _quantize,
    "amax": _amax,
    "swizzle": _swizzle,
    "gemm": _gemm,
    "forward": _forward,
    "backward": _backward,
}

"""Public NVFP4 quantizers that run on Hopper, beside which ours is measured where they are installed.

``pip install nvidia-modelopt torchao``. Model Optimizer's kernel for Hopper writes fake-quantized values, bf16 again;
torchao's function is plain torch and is compiled. Both scale by the amax of the tensor, which is given to them.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fp4gemm import reference
from fp4gemm.bench.timing import Call
from fp4gemm.tensor import FP4Tensor

MODELOPT, TORCHAO = "modelopt", "torchao"  # in a row's vs_us
DISTRIBUTIONS = ("nvidia-modelopt", "torchao")
_RANGE = 2688.0  # 6 * 448
_MOST_ERROR = 0.15  # of N(0, 1); NVFP4 leaves about 0.1


def calls(xs: Sequence[torch.Tensor]) -> dict[str, list[Call]]:
    """The peers' calls on bf16 inputs [M, K]. Raises RuntimeError where one does not quantize what it is given."""
    found = {}
    if importlib.util.find_spec("modelopt"):
        found[MODELOPT] = _modelopt(xs)
    if importlib.util.find_spec("torchao"):
        found[TORCHAO] = _torchao(xs)
    return found


def _modelopt(xs: Sequence[torch.Tensor]) -> list[Call]:
    kernel = importlib.import_module("modelopt.torch.kernels.quantization.gemm.fp4_kernel_hopper").fp4_fake_quant_block
    _check(MODELOPT, xs[0], kernel(xs[0], xs[0].abs().amax()))
    return [functools.partial(kernel, x, x.abs().amax()) for x in xs]


def _torchao(xs: Sequence[torch.Tensor]) -> list[Call]:
    module = importlib.import_module("torchao.prototype.mx_formats.nvfp4_tensor")
    quantize: Callable[..., Any] = torch.compile(module.nvfp4_quantize, fullgraph=True)
    outer = [x.abs().amax().float() / _RANGE for x in xs]
    scales, data = quantize(xs[0], 16, outer[0])
    M, K = xs[0].shape
    t = FP4Tensor(data.reshape(M, -1).view(torch.uint8), scales.reshape(M, -1), outer[0], (M, K), "linear")
    _check(TORCHAO, xs[0], reference.dequantize(t))
    return [functools.partial(quantize, x, 16, p) for x, p in zip(xs, outer, strict=True)]


def _check(name: str, x: torch.Tensor, values: torch.Tensor) -> None:
    error = float((values.float() - x.float()).norm() / x.float().norm())
    if not error < _MOST_ERROR:
        raise RuntimeError(f"{name}: relative error {error:.2f}: it is not called as its version expects")

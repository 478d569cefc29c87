"""What NVFP4 changes in an encoder: per Linear, per channel of the residual stream, and per sentence pair."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import fp4gemm
from fp4gemm.demo.encoder import linears
from fp4gemm.nn import FP4Linear

KINDS = {
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "attention out",
    "intermediate.dense": "MLP up",
    "output.dense": "MLP down",
}


@dataclass(frozen=True)
class LinearError:
    """Signal-to-noise of one Linear in dB, on the activations it has in the fp32 model.

    `output` is the layer as it runs; `weight_only` and `activation_only` quantize one operand and keep the other.
    """

    layer: int
    kind: str
    weight: float
    output: float
    weight_only: float
    activation_only: float


def snr_db(reference: Tensor, approximation: Tensor) -> float:
    """10·log10(Σ reference² / Σ (approximation − reference)²); inf when they are equal."""
    reference, approximation = reference.double(), approximation.double()
    noise = (approximation - reference).square().sum()
    return float(10 * torch.log10(reference.square().sum() / noise))


@torch.inference_mode()
def capture_inputs(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Run `model` and return what every Linear of its layers received: [tokens, K], padding tokens left out."""
    keep = batch["attention_mask"].bool()
    seen: dict[str, Tensor] = {}

    def remember(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, arguments: seen.__setitem__(name, arguments[0][keep])

    hooks = [module.register_forward_pre_hook(remember(name)) for name, module in linears(model).items()]
    try:
        model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


@torch.inference_mode()
def linear_errors(
    model: nn.Module, converted: nn.Module, inputs: dict[str, Tensor], dtype: torch.dtype
) -> list[LinearError]:
    """Compare every Linear of `model` (fp32) with its NVFP4 counterpart, both fed with the fp32 model's `inputs`."""
    return [
        _linear_error(name, linear, converted.get_submodule(name), inputs[name], dtype)
        for name, linear in linears(model).items()
    ]


def _linear_error(name: str, linear: nn.Linear, fp4: nn.Module, x: Tensor, dtype: torch.dtype) -> LinearError:
    if not isinstance(fp4, FP4Linear):
        raise TypeError(f"{name}: got {type(fp4).__name__}, expected the model that to_fp4 returned")
    layer, kind = split_name(name)
    exact = linear(x)
    w4, x4 = fp4gemm.dequantize(fp4.weight), fp4gemm.dequantize(fp4gemm.quantize(x))
    return LinearError(
        layer,
        kind,
        weight=snr_db(linear.weight, w4),
        output=snr_db(exact, fp4(x.to(dtype))),
        weight_only=snr_db(exact, nn.functional.linear(x, w4, linear.bias)),
        activation_only=snr_db(exact, nn.functional.linear(x4, linear.weight, linear.bias)),
    )


def split_name(name: str) -> tuple[int, str]:
    """Layer number and short kind of a module name such as `encoder.layer.3.output.dense`."""
    match = re.search(r"layer\.(\d+)\.(.+)$", name)
    if match is None:
        raise ValueError(f"name: got {name!r}, expected a module of an encoder layer (…layer.<number>.<linear>)")
    return int(match[1]), KINDS.get(match[2], match[2])


@torch.inference_mode()
def residual_stream(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Hidden states after the embeddings and after each layer, fp32: [layers + 1, tokens, width], padding left out."""
    keep = batch["attention_mask"].bool()
    return torch.stack([state[keep].float() for state in model(**batch, output_hidden_states=True).hidden_states])


def channel_errors(before: Tensor, after: Tensor) -> Tensor:
    """Root mean square over tokens of the error of each channel, relative to the whole state's: [layers + 1, width]."""
    scale = before.square().mean(dim=(1, 2)).sqrt().unsqueeze(-1)
    return (after - before).square().mean(dim=1).sqrt() / scale


def seconds(function: Callable[[], object], device: torch.device, repeats: int = 5, budget: float = 3.0) -> float:
    """Median wall time of a call after one that warms up, the GPU's work included; no new repeat after `budget`."""
    _timed(function, device)
    samples: list[float] = []
    while len(samples) < repeats and sum(samples) < budget:
        samples.append(_timed(function, device))
    return statistics.median(samples)


def _timed(function: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start

"""humming-kernels, the fastest public NVFP4 weight kernel on Hopper, as a candidate of the GEMM bench.

``pip install humming-kernels``; it compiles its kernels with NVRTC at first use and keeps them in
``HUMMING_CACHE_DIR``. Its own heuristic chooses the schedule of each M: what ``HummingLayer`` does without a tuning
config. Only that of the measured M is compiled, where the layer would compile 33 for every shape.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
from collections.abc import Sequence
from typing import Any

import torch

from fp4gemm.bench.timing import Call
from fp4gemm.formats import BLOCK
from fp4gemm.tensor import FP4Tensor

_LOCKS = 2048  # int32, what HummingLayer allocates for stream-K
_TILE = (256, 128)  # N and K of its tiles: multiples of these need no padding


def available() -> bool:
    """Whether humming-kernels can be imported."""
    return importlib.util.find_spec("humming") is not None


def takes(N: int, K: int) -> bool:
    """Whether a weight [N, K] has whole tiles, so that neither side computes padding."""
    return N % _TILE[0] == 0 and K % _TILE[1] == 0


class Weight:
    """A weight [N, K] in humming's layout, with the values of ``w``: one outer scale, as NVFP4 checkpoints have.

    Raises ValueError where ``w`` has an outer scale per row, which humming would round to bf16.
    """

    def __init__(self, w: FP4Tensor) -> None:
        self._shape = w.shape
        self._config, self._tensors = _prepared({name: t[0] for name, t in _stacked([w]).items()}, w.shape, None)
        self._locks = torch.zeros(_LOCKS, dtype=torch.int32, device=w.device)

    def call(self, x: torch.Tensor) -> Call:
        """``x`` [M, K] bf16 · wᵀ into an output of its own, in the schedule that humming chooses for M."""
        return functools.partial(
            _module("forward").humming_forward,
            self._config,
            inputs=x,
            **self._tensors,
            outputs=x.new_empty(x.shape[0], self._shape[0]),
            locks=self._locks,
            tuning_config=self._schedule(x.shape[0]),
        )

    def _schedule(self, M: int) -> str:
        return json.dumps(_module("tune").get_heuristics_config(self._config, shape_m=M))

    def compile(self, sizes: Sequence[int]) -> None:
        """Compiles what products of these M take, all at once on every core: seconds each, one after the other."""
        chosen = {self._schedule(M): M for M in sizes}
        schedules = [[0, M, json.loads(text)] for text, M in chosen.items()]
        _module("kernel.humming").HummingKernel.prepare_kernels(self._config.to_str(), None, json.dumps(schedules))


class GroupedWeight:
    """The weights [N, K] of experts, as :class:`Weight` has one."""

    def __init__(self, weights: Sequence[FP4Tensor]) -> None:
        self._shape = weights[0].shape
        self._config, self._tensors = _prepared(_stacked(weights), self._shape, len(weights))
        self._locks = torch.zeros(_LOCKS, dtype=torch.int32, device=weights[0].device)

    def call(self, x: torch.Tensor, offsets: torch.Tensor) -> Call:
        """``x`` [T, K] bf16, sorted by expert, each row by the weight of its own; ``offsets`` int64 [E + 1]."""
        grouped = {"gemm_type": "grouped_contiguous"}
        tuned = _module("tune").get_heuristics_config(self._config, shape_m=x.shape[0], **grouped)
        return functools.partial(
            _module("forward").humming_forward,
            self._config,
            inputs=x,
            **self._tensors,
            outputs=x.new_empty(x.shape[0], self._shape[0]),
            expert_layout=offsets,
            locks=self._locks,
            compute_config=json.dumps(grouped),
            tuning_config=json.dumps(tuned),
        )


def _stacked(weights: Sequence[FP4Tensor]) -> dict[str, torch.Tensor]:
    """What a checkpoint has for these weights, those of all experts in one tensor."""
    if any(w.outer_scale.dim() for w in weights):
        raise ValueError("w: expected one outer scale (scaling='per_tensor'), got one per row")
    return {
        "weight": torch.stack([w.data.view(torch.int32) for w in weights]),
        "weight_scale": torch.stack([w.linear_block_scale().contiguous() for w in weights]),
        "weight_scale_2": torch.stack([w.outer_scale.reshape(1) for w in weights]),
    }


def _prepared(
    tensors: dict[str, torch.Tensor], shape: tuple[int, int], experts: int | None
) -> tuple[Any, dict[str, torch.Tensor]]:
    """humming's configuration of these weights, and its tensors."""
    schema, transform = _module("schema"), _module("transform")
    weight_schema = schema.HummingWeightSchema(
        b_dtype="float4e2m1",
        bs_dtype="float8e4m3",
        weight_scale_group_size=BLOCK,
        weight_scale_type="group",
        weight_scale_2_type="tensor",
    )
    if experts is not None:
        tensors = {**tensors, "weight_scale_2": tensors["weight_scale_2"].reshape(experts)}
    prepared: tuple[Any, dict[str, torch.Tensor]] = transform.prepare_and_transform_humming_tensors(
        tensors, *shape, weight_schema, num_experts=experts, torch_dtype=torch.bfloat16,
        device=tensors["weight"].device,
    )  # fmt: skip
    return prepared


def _module(name: str) -> Any:
    return importlib.import_module(f"humming.{name}")

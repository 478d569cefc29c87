"""GroupedWeight: the weights of experts, prepacked one after the other, as ``gemm_grouped`` reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fp4gemm.formats import packed_shape
from fp4gemm.tensor import FP4Tensor

MAX_EXPERTS = 1024
FORM = "sm90"


@dataclass(frozen=True, eq=False, repr=False)
class GroupedWeight:
    """E weights [N, K] in NVFP4, in the prepacked form that Hopper's GEMMs read; :func:`stack_weights` makes it.

    A plain frozen container and a pytree, as FP4Tensor is.

    Attributes:
        data: uint8 [E, ceil(N/64), ceil(K/64), 2304], for each expert what ``FP4Tensor.prepack`` makes.
        outer_scale: float32 decode multipliers, [E] (one for each expert) or [E, N] (one for each row).
        shape: logical (E, N, K), E from 1 to 1024.

    Raises:
        TypeError: a field is not a tensor, or has another dtype.
        ValueError: a field has another shape, device or stride than the above.
    """

    data: Tensor
    outer_scale: Tensor
    shape: tuple[int, int, int]

    def __reduce__(self) -> tuple[type[GroupedWeight], tuple[Any, ...]]:
        return GroupedWeight, (self.data, self.outer_scale.detach(), tuple(self.shape))

    def __post_init__(self) -> None:
        if len(self.shape) != 3 or min(self.shape) < 0 or not 1 <= self.shape[0] <= MAX_EXPERTS:
            raise ValueError(f"shape: expected (E, N, K), E from 1 to {MAX_EXPERTS}, got {tuple(self.shape)}")
        experts, n, k = self.shape
        per_row = isinstance(self.outer_scale, Tensor) and self.outer_scale.dim() == 2
        fields = (
            ("data", self.data, torch.uint8, (experts, *packed_shape(n, k))),
            ("outer_scale", self.outer_scale, torch.float32, (experts, n) if per_row else (experts,)),
        )
        for name, field, dtype, shape in fields:
            if not isinstance(field, Tensor):
                raise TypeError(f"{name}: expected a torch.Tensor, got {type(field).__name__}")
            if field.dtype != dtype:
                raise TypeError(f"{name}: expected dtype {dtype}, got {field.dtype}")
            if tuple(field.shape) != shape:
                raise ValueError(f"{name}: expected shape {shape}, got {tuple(field.shape)}")
            if not field.is_contiguous():
                raise ValueError(f"{name}: expected a contiguous tensor, got strides {field.stride()}")
        if self.outer_scale.device != self.data.device:
            raise ValueError(
                f"outer_scale: expected device {self.data.device} (that of data), got {self.outer_scale.device}"
            )

    @property
    def experts(self) -> int:
        """E."""
        return self.shape[0]

    @property
    def rows(self) -> int:
        """N."""
        return self.shape[1]

    @property
    def k(self) -> int:
        """Logical K, before padding to whole blocks."""
        return self.shape[2]

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def nbytes(self) -> int:
        """Bytes of codes, block scales (padding included) and outer scales."""
        return self.data.numel() + 4 * self.outer_scale.numel()

    def expert(self, index: int) -> FP4Tensor:
        """The weight [N, K] of one expert, prepacked: views of these tensors."""
        empty = self.data.new_empty(0).view(torch.float8_e4m3fn)
        return FP4Tensor(self.data[index], empty, self.outer_scale[index], self.shape[1:], prepacked=FORM)

    def to(self, device: torch.device | str | int, *, non_blocking: bool = False) -> GroupedWeight:
        """These weights on ``device``; tensors that are already there are shared, not copied."""
        data, outer_scale = (t.to(device, non_blocking=non_blocking) for t in (self.data, self.outer_scale))
        return GroupedWeight(data, outer_scale, self.shape)

    def __repr__(self) -> str:
        scaling = "per_row" if self.outer_scale.dim() == 2 else "per_tensor"
        return f"GroupedWeight(shape={self.shape}, scaling={scaling}, device={self.device}, {self.nbytes} B)"


def stack_weights(weights: Sequence[FP4Tensor]) -> GroupedWeight:
    """The weights of experts, FP4Tensors [N, K] of one shape, scaling and device, as one :class:`GroupedWeight`.

    They are prepacked on the way, where they are not. Raises TypeError or ValueError that names the weight which does
    not fit.
    """
    if not 1 <= len(weights) <= MAX_EXPERTS:
        raise ValueError(f"weights: expected 1 to {MAX_EXPERTS} FP4Tensors, got {len(weights)}")
    first = weights[0]
    for i, w in enumerate(weights):
        if not isinstance(w, FP4Tensor):
            raise TypeError(f"weights[{i}]: expected an FP4Tensor, got {type(w).__name__}")
        for name in ("shape", "scaling", "device"):
            if getattr(w, name) != getattr(first, name):
                got, expected = getattr(w, name), getattr(first, name)
                raise ValueError(f"weights[{i}]: expected {name} {expected} (that of weights[0]), got {got}")
    data = torch.stack([w.prepack(FORM).data for w in weights])
    return GroupedWeight(data, torch.stack([w.outer_scale for w in weights]), (len(weights), *first.shape))


_LEAVES = ("data", "outer_scale")


def _flatten(w: GroupedWeight) -> tuple[list[Tensor], tuple[int, int, int]]:
    return [w.data, w.outer_scale], w.shape


def _flatten_with_keys(w: GroupedWeight) -> tuple[list[tuple[pytree.KeyEntry, Any]], tuple[int, int, int]]:
    leaves, shape = _flatten(w)
    return [(pytree.GetAttrKey(name), leaf) for name, leaf in zip(_LEAVES, leaves, strict=True)], shape


def _unflatten(leaves: Any, shape: tuple[int, int, int]) -> GroupedWeight:
    w = object.__new__(GroupedWeight)  # without validation: tree_map may put anything in the leaves
    for name, value in zip((*_LEAVES, "shape"), (*leaves, shape), strict=True):
        object.__setattr__(w, name, value)
    return w


pytree.register_pytree_node(
    GroupedWeight,
    _flatten,
    _unflatten,
    serialized_type_name="fp4gemm.GroupedWeight",
    flatten_with_keys_fn=_flatten_with_keys,
)
torch.serialization.add_safe_globals([GroupedWeight])

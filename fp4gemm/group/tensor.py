"""GroupedFP4Tensor: NVFP4 tensors one after another, where only the device needs to know how large each is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fp4gemm.formats import padded_k, scale_layout
from fp4gemm.tensor import FP4Tensor


@dataclass(frozen=True, eq=False, repr=False)
class GroupedFP4Tensor:
    """E matrices [m_i, k_i] in NVFP4, the members of a group: what :func:`fp4gemm.quantize_grouped` returns.

    Its tensors have the sizes of bounds that the host knows; what stands behind the last member is undefined. A member
    is at ``offsets`` in each of them, in bytes, bytes and lines; within it, everything is as in an FP4Tensor, the
    padding of the scale layout included.

    Attributes:
        data: uint8 [bytes], codes: m_i rows of ceil16(k_i) / 2 bytes for each member.
        block_scale: float8_e4m3fn [bytes]: for each member what ``sf_layout`` makes of its m_i x ceil(k_i / 16) scales.
        outer_scale: float32 decode multipliers, [E], or [lines] where ``scaling`` is per_row.
        index: int64 [5, E + 1] on the device: m_i, k_i, and where data, block scales and lines of a member begin; the
            last column is where they end. m_i and k_i are -1 for a member that did not fit (docs/grouped.md).
        sf_layout: a name in :data:`fp4gemm.formats.SF_LAYOUTS`.
        scaling: ``per_row``, or ``per_tensor`` for one outer scale of each member.
    """

    data: Tensor
    block_scale: Tensor
    outer_scale: Tensor
    index: Tensor
    sf_layout: str
    scaling: str

    @property
    def count(self) -> int:
        """E."""
        return self.index.shape[1] - 1

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def lines(self) -> Tensor:
        """m_i, int64 [E], on the device."""
        return self.index[0, :-1]

    @property
    def widths(self) -> Tensor:
        """k_i, int64 [E], on the device."""
        return self.index[1, :-1]

    @property
    def data_offsets(self) -> Tensor:
        """Bytes of ``data`` before each member, int64 [E + 1]."""
        return self.index[2]

    @property
    def scale_offsets(self) -> Tensor:
        """Bytes of ``block_scale`` before each member, int64 [E + 1]."""
        return self.index[3]

    @property
    def line_offsets(self) -> Tensor:
        """Rows before each member, int64 [E + 1]: where its outer scales begin if they are those of rows."""
        return self.index[4]

    def member(self, i: int) -> FP4Tensor:
        """Member ``i`` as an FP4Tensor that shares memory with the group; waits for the device.

        Raises IndexError for another i than 0 .. E - 1, ValueError for a member that did not fit.
        """
        if not 0 <= i < self.count:
            raise IndexError(f"i: expected 0 .. {self.count - 1}, got {i}")
        return self._member(i, self.index[:, i].tolist())

    def members(self) -> list[FP4Tensor]:
        """All of them; the device is waited for once."""
        return [self._member(i, entry) for i, entry in enumerate(self.index.t().tolist()[:-1])]

    def _member(self, i: int, entry: Iterable[int]) -> FP4Tensor:
        m, k, data, scales, line = entry
        if m < 0:
            raise ValueError(f"member {i}: its sizes or its place did not fit x and the bounds; see check_dims")
        layout = scale_layout(self.sf_layout)
        row = padded_k(k) // 2
        outer = self.outer_scale[line : line + m] if self.scaling == "per_row" else self.outer_scale[i]
        return FP4Tensor(
            self.data[data : data + m * row].view(m, row),
            self.block_scale[scales : scales + layout.numel(m, k)].view(layout.shape(m, k)),
            outer,
            (m, k),
            self.sf_layout,
        )

    def __reduce__(self) -> tuple[Callable[..., GroupedFP4Tensor], tuple[Any, ...]]:
        scales = self.block_scale.detach().view(torch.uint8)  # plain pickle cannot read float8 back
        return _rebuild, (self.data, scales, self.outer_scale.detach(), self.index, self.sf_layout, self.scaling)

    def __repr__(self) -> str:
        return (
            f"GroupedFP4Tensor(members={self.count}, scaling={self.scaling}, sf_layout={self.sf_layout!r}, "
            f"device={self.device})"
        )


def _rebuild(
    data: Tensor, scale_bytes: Tensor, outer_scale: Tensor, index: Tensor, sf_layout: str, scaling: str
) -> GroupedFP4Tensor:
    """What copy and pickle call."""
    return GroupedFP4Tensor(data, scale_bytes.view(torch.float8_e4m3fn), outer_scale, index, sf_layout, scaling)


torch.serialization.add_safe_globals([_rebuild])


_LEAVES = ("data", "block_scale", "outer_scale", "index")


def _flatten(t: GroupedFP4Tensor) -> tuple[list[Tensor], tuple[str, str]]:
    return [t.data, t.block_scale, t.outer_scale, t.index], (t.sf_layout, t.scaling)


def _flatten_with_keys(t: GroupedFP4Tensor) -> tuple[list[tuple[pytree.KeyEntry, Any]], tuple[str, str]]:
    leaves, context = _flatten(t)
    return [(pytree.GetAttrKey(name), leaf) for name, leaf in zip(_LEAVES, leaves, strict=True)], context


def _unflatten(leaves: Any, context: tuple[str, str]) -> GroupedFP4Tensor:
    data, block_scale, outer_scale, index = leaves
    return GroupedFP4Tensor(data, block_scale, outer_scale, index, *context)


pytree.register_pytree_node(
    GroupedFP4Tensor,
    _flatten,
    _unflatten,
    serialized_type_name="fp4gemm.GroupedFP4Tensor",
    flatten_with_keys_fn=_flatten_with_keys,
)

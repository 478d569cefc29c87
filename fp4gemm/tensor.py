"""FP4Tensor: the container that quantize returns and gemm reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fp4gemm.formats import PREPACKED_FORMS, ScaleLayout, packed_shape, padded_k, scale_layout

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


@dataclass(frozen=True, eq=False, repr=False)
class FP4Tensor:
    """An [M, K] matrix in NVFP4: ``value = e2m1 code * block_scale * outer_scale``.

    It is a plain frozen container, not a Tensor subclass: a pytree whose leaves are its three tensors, so it passes
    through ``torch.compile``, ``tree_map``, ``copy.deepcopy`` and ``torch.save`` / ``torch.load(weights_only=True)``.

    Attributes:
        data: uint8 [M, ceil16(K) / 2]; element 2j is the low nibble of byte j; codes past K are 0.
        block_scale: float8_e4m3fn, one per 16 values along K; [M, ceil(K/16)] for ``linear``, else flat (see
            :class:`fp4gemm.formats.ScaleLayout`), with padding bytes 0.
        outer_scale: float32, [] (per tensor) or [M] (per row): a decode multiplier.
        shape: logical (M, K).
        sf_layout: a name in :data:`fp4gemm.formats.SF_LAYOUTS`.
        prepacked: None, or ``sm90`` for the form that Hopper's GEMMs read without conversion: ``data`` is then uint8
            [ceil(M/64), ceil(K/64), 2304] with codes and scales, ``block_scale`` is empty ([0]), and ``sf_layout`` is
            the layout that :meth:`unpack` gives back.

    Raises:
        TypeError: a field is not a tensor, or has another dtype.
        ValueError: a field has another shape, device or stride than the above, or ``sf_layout`` or ``prepacked`` is
            unknown.
    """

    data: Tensor
    block_scale: Tensor
    outer_scale: Tensor
    shape: tuple[int, int]
    sf_layout: str = "128x4"
    prepacked: str | None = None

    def __post_init__(self) -> None:
        if len(self.shape) != 2 or min(self.shape) < 0:
            raise ValueError(f"shape: expected (M, K) with M, K >= 0, got {tuple(self.shape)}")
        m, k = self.shape
        scales = scale_layout(self.sf_layout).shape(m, k)
        data: tuple[int, ...] = (m, padded_k(k) // 2)
        if self.prepacked is not None:
            _check_form(self.prepacked)
            data, scales = packed_shape(m, k), (0,)
        outer = () if isinstance(self.outer_scale, Tensor) and self.outer_scale.dim() == 0 else (m,)
        _check_field("data", self.data, torch.uint8, data)
        _check_field("block_scale", self.block_scale, torch.float8_e4m3fn, scales)
        _check_field("outer_scale", self.outer_scale, torch.float32, outer)
        for name, field in (("block_scale", self.block_scale), ("outer_scale", self.outer_scale)):
            if field.device != self.data.device:
                raise ValueError(f"{name}: expected device {self.data.device} (that of data), got {field.device}")

    @property
    def rows(self) -> int:
        """M."""
        return self.shape[0]

    @property
    def k(self) -> int:
        """Logical K, before padding to whole blocks."""
        return self.shape[1]

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def layout(self) -> ScaleLayout:
        """The scale-factor layout that ``sf_layout`` names."""
        return scale_layout(self.sf_layout)

    @property
    def scaling(self) -> str:
        """``per_row`` or ``per_tensor``: how far one outer scale reaches."""
        return "per_row" if self.outer_scale.dim() else "per_tensor"

    @property
    def nbytes(self) -> int:
        """Bytes of data, block scales (padding included) and outer scales."""
        return sum(leaf.numel() * leaf.element_size() for leaf in (self.data, self.block_scale, self.outer_scale))

    def to(self, device: torch.device | str | int, *, non_blocking: bool = False) -> FP4Tensor:
        """This tensor on ``device``; tensors that are already there are shared, not copied."""
        return self._map(lambda leaf: leaf.to(device, non_blocking=non_blocking))

    def prepack(self, form: str = "sm90") -> FP4Tensor:
        """The same values in the form that Hopper's GEMMs read without conversion; itself, if it is in that form.

        For weights, once. :meth:`unpack` gives every byte back, but for what has no effect on values: codes under a
        block scale of 0 keep only their sign, and a negative scale (fp4gemm writes none) becomes positive, its sign
        going to the codes. Raises ValueError for an unknown form.
        """
        from fp4gemm import ops  # late, as in dequantize

        _check_form(form)
        return self if self.prepacked == form else ops.prepack(self)

    def unpack(self) -> FP4Tensor:
        """The plain form of a prepacked tensor, block scales in ``sf_layout``; itself, if it is not prepacked."""
        from fp4gemm import ops  # late, as in dequantize

        return self if self.prepacked is None else ops.unpack(self)

    def with_layout(self, sf_layout: str) -> FP4Tensor:
        """The same values with the block scales stored in another layout. Raises ValueError for an unknown name.

        The result is never prepacked: in that form there is no layout to choose.
        """
        target = scale_layout(sf_layout)
        if self.prepacked is not None:
            return self.unpack().with_layout(sf_layout)
        if sf_layout == self.sf_layout:
            return self
        scales = target.from_linear(self.linear_block_scale())
        return FP4Tensor(self.data, scales, self.outer_scale, self.shape, sf_layout)

    def linear_block_scale(self) -> Tensor:
        """Block scales as a row-major float8_e4m3fn matrix [M, ceil(K/16)]."""
        return self.layout.to_linear(self.unpack().block_scale, *self.shape)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Values as a dense [M, K] tensor: fp32 product, then one rounding to ``dtype``."""
        from fp4gemm import ops  # late: ops uses this module, and a container alone needs no kernels

        return ops.dequantize(self, dtype)

    def to_tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """Plain contiguous tensors for a ``state_dict`` or a safetensors file; :meth:`from_tensors` reads them back.

        Keys are ``prefix`` + data, block_scale, outer_scale, shape (int64 [2]), sf_layout (uint8, ASCII) and, where
        the tensor is prepacked, prepacked (the same). All but the first three stay on the CPU.
        """
        tensors = {
            prefix + "data": self.data,
            prefix + "block_scale": self.block_scale,
            prefix + "outer_scale": self.outer_scale,
            prefix + "shape": torch.tensor(self.shape, dtype=torch.int64),
            prefix + "sf_layout": _from_text(self.sf_layout),
        }
        if self.prepacked is not None:
            tensors[prefix + "prepacked"] = _from_text(self.prepacked)
        return tensors

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], prefix: str = "") -> FP4Tensor:
        """Inverse of :meth:`to_tensors`; other keys are ignored. Raises KeyError that names what is missing."""
        names = ("data", "block_scale", "outer_scale", "shape", "sf_layout")
        missing = [prefix + name for name in names if prefix + name not in tensors]
        if missing:
            raise KeyError(f"tensors: missing {', '.join(missing)}")
        data, block_scale, outer_scale, shape, name = (tensors[prefix + name] for name in names)
        m, k = shape.tolist()
        form = tensors.get(prefix + "prepacked")
        prepacked = None if form is None else _to_text(form)
        return cls(data, block_scale, outer_scale, (m, k), _to_text(name), prepacked)

    def _map(self, function: Callable[[Tensor], Tensor]) -> FP4Tensor:
        data, block_scale, outer_scale = map(function, (self.data, self.block_scale, self.outer_scale))
        return FP4Tensor(data, block_scale, outer_scale, self.shape, self.sf_layout, self.prepacked)

    def __reduce__(self) -> tuple[Callable[..., FP4Tensor], tuple[Any, ...]]:
        # As bytes, because plain pickle (not torch.save) cannot read a float8 tensor back.
        scale_bytes = self.block_scale.view(torch.uint8)
        form = () if self.prepacked is None else (self.prepacked,)
        return _rebuild, (self.data, scale_bytes, self.outer_scale, tuple(self.shape), self.sf_layout, *form)

    def __repr__(self) -> str:
        form = "" if self.prepacked is None else f"prepacked={self.prepacked!r}, "
        return (
            f"FP4Tensor(shape={tuple(self.shape)}, scaling={self.scaling}, sf_layout={self.sf_layout!r}, {form}"
            f"device={self.device}, {_megabytes(self.nbytes)})"
        )


def _rebuild(
    data: Tensor,
    scale_bytes: Tensor,
    outer_scale: Tensor,
    shape: tuple[int, int],
    sf_layout: str,
    prepacked: str | None = None,
) -> FP4Tensor:
    """What copy and pickle call: through the constructor, so what a file holds is validated."""
    return FP4Tensor(data, scale_bytes.view(torch.float8_e4m3fn), outer_scale, shape, sf_layout, prepacked)


def _from_text(name: str) -> Tensor:
    return torch.tensor(list(name.encode("ascii")), dtype=torch.uint8)


def _to_text(name: Tensor) -> str:
    return bytes(name.tolist()).decode("ascii")


def _check_form(form: str) -> None:
    if form not in PREPACKED_FORMS:
        raise ValueError(f"prepacked: expected one of {', '.join(PREPACKED_FORMS)}, got {form!r}")


def _check_field(name: str, value: object, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.dtype != dtype:
        raise TypeError(f"{name}: expected dtype {dtype}, got {value.dtype}")
    if tuple(value.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(value.shape)}")
    if not value.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {value.stride()}")


def _megabytes(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"


_LEAVES = ("data", "block_scale", "outer_scale")
_Context = tuple[tuple[int, int], str, str | None]


def _flatten(tensor: FP4Tensor) -> tuple[list[Tensor], _Context]:
    return [tensor.data, tensor.block_scale, tensor.outer_scale], (
        tensor.shape,
        tensor.sf_layout,
        tensor.prepacked,
    )


def _flatten_with_keys(tensor: FP4Tensor) -> tuple[list[tuple[pytree.KeyEntry, Any]], _Context]:
    leaves, context = _flatten(tensor)
    return [(pytree.GetAttrKey(name), leaf) for name, leaf in zip(_LEAVES, leaves, strict=True)], context


def _unflatten(leaves: Any, context: _Context) -> FP4Tensor:
    # tree_map may put anything in the leaves (shapes, None, another device): build without validation.
    tensor = object.__new__(FP4Tensor)
    for name, value in zip((*_LEAVES, "shape", "sf_layout", "prepacked"), (*leaves, *context), strict=True):
        object.__setattr__(tensor, name, value)
    return tensor


pytree.register_pytree_node(
    FP4Tensor,
    _flatten,
    _unflatten,
    serialized_type_name="fp4gemm.FP4Tensor",
    flatten_with_keys_fn=_flatten_with_keys,
)
torch.serialization.add_safe_globals([_rebuild])

"""FP4Tensor: the container that quantize returns and gemm reads; FP4Batch: several of one shape, which bmm reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fp4gemm.formats import PREPACKED_FORMS, ScaleLayout, packed_shape, padded_k, scale_layout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping


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
        _check_parts(self, ())

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

    def detach(self) -> FP4Tensor:
        """This tensor without the graph that it has if it was made of a parameter outside of ``torch.no_grad``."""
        return self._map(Tensor.detach)

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
        return _rebuild, _reduced(self)

    def __repr__(self) -> str:
        form = "" if self.prepacked is None else f"prepacked={self.prepacked!r}, "
        return (
            f"FP4Tensor(shape={tuple(self.shape)}, scaling={self.scaling}, sf_layout={self.sf_layout!r}, {form}"
            f"device={self.device}, {_megabytes(self.nbytes)})"
        )


@dataclass(frozen=True, eq=False, repr=False)
class FP4Batch:
    """L >= 1 matrices [M, K] in NVFP4 for ``bmm``: the tensors of L FP4Tensors of one shape, layout and form, stacked.

    ``batch[i]`` is a member, whose tensors are views, ``list(batch)`` are all of them, and :meth:`stack` is the inverse
    of that. As an FP4Tensor, it is a frozen container and a pytree.

    Attributes:
        data: uint8 [L, M, ceil16(K) / 2].
        block_scale: float8_e4m3fn [L, M, ceil(K/16)] for ``linear``, else [L, bytes of a member].
        outer_scale: float32, [L] (per tensor) or [L, M] (per row).
        shape: logical (L, M, K).
        sf_layout, prepacked: those of every member; see :class:`FP4Tensor`.

    Raises what :class:`FP4Tensor` raises.
    """

    data: Tensor
    block_scale: Tensor
    outer_scale: Tensor
    shape: tuple[int, int, int]
    sf_layout: str = "128x4"
    prepacked: str | None = None

    def __post_init__(self) -> None:
        if len(self.shape) != 3 or min(self.shape) < 0 or self.shape[0] < 1:
            raise ValueError(f"shape: expected (L, M, K) with L >= 1 and M, K >= 0, got {tuple(self.shape)}")
        _check_parts(self, self.shape[:1])

    @classmethod
    def stack(cls, members: Iterable[FP4Tensor]) -> FP4Batch:
        """The batch of one or more FP4Tensors that are alike, copied. Raises TypeError or ValueError for others."""
        members = list(members)
        if not members:
            raise ValueError("members: expected at least one FP4Tensor, got none")
        for i, member in enumerate(members):
            if not isinstance(member, FP4Tensor):
                raise TypeError(f"members[{i}]: expected an FP4Tensor, got {type(member).__name__}")
            for name in ("shape", "scaling", "sf_layout", "prepacked", "device"):
                want, got = getattr(members[0], name), getattr(member, name)
                if got != want:
                    raise ValueError(f"members[{i}]: expected {name} {want!r} (that of members[0]), got {got!r}")
        first = members[0]
        data, block_scale, outer_scale = (
            torch.stack([getattr(member, name) for member in members]) for name in _LEAVES
        )
        shape = len(members), *first.shape
        return cls(data, block_scale, outer_scale, shape, first.sf_layout, first.prepacked)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, i: int) -> FP4Tensor:
        parts = self.data[i], self.block_scale[i], self.outer_scale[i]
        return FP4Tensor(*parts, self.shape[1:], self.sf_layout, self.prepacked)

    def __iter__(self) -> Iterator[FP4Tensor]:
        return (self[i] for i in range(len(self)))

    @property
    def rows(self) -> int:
        """M."""
        return self.shape[1]

    @property
    def k(self) -> int:
        """Logical K."""
        return self.shape[2]

    @property
    def device(self) -> torch.device:
        return self.data.device

    def to(self, device: torch.device | str | int, *, non_blocking: bool = False) -> FP4Batch:
        """This batch on ``device``; tensors that are already there are shared, not copied."""
        data, block_scale, outer_scale = (getattr(self, name).to(device, non_blocking=non_blocking) for name in _LEAVES)
        return FP4Batch(data, block_scale, outer_scale, self.shape, self.sf_layout, self.prepacked)

    def prepack(self, form: str = "sm90") -> FP4Batch:
        """Every member as :meth:`FP4Tensor.prepack` makes it."""
        return self if self.prepacked == form else self._each(lambda member: member.prepack(form))

    def unpack(self) -> FP4Batch:
        """Every member as :meth:`FP4Tensor.unpack` makes it."""
        return self if self.prepacked is None else self._each(FP4Tensor.unpack)

    def with_layout(self, sf_layout: str) -> FP4Batch:
        """Every member as :meth:`FP4Tensor.with_layout` makes it."""
        if self.prepacked is None and sf_layout == self.sf_layout:
            return self
        return self._each(lambda member: member.with_layout(sf_layout))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Values as a dense [L, M, K] tensor: those of every member."""
        return torch.stack([member.dequantize(dtype) for member in self])

    def _each(self, function: Callable[[FP4Tensor], FP4Tensor]) -> FP4Batch:
        return FP4Batch.stack([function(member) for member in self])

    def __reduce__(self) -> tuple[Callable[..., FP4Batch], tuple[Any, ...]]:
        return _rebuild_batch, _reduced(self)

    def __repr__(self) -> str:
        form = "" if self.prepacked is None else f"prepacked={self.prepacked!r}, "
        return f"FP4Batch(shape={tuple(self.shape)}, sf_layout={self.sf_layout!r}, {form}device={self.device})"


def _check_parts(t: FP4Tensor | FP4Batch, batch: tuple[int, ...]) -> None:
    """Checks the tensors of a container: those of an [M, K] matrix behind the dimensions ``batch``."""
    m, k = t.shape[-2:]
    scales = scale_layout(t.sf_layout).shape(m, k)
    data: tuple[int, ...] = (m, padded_k(k) // 2)
    if t.prepacked is not None:
        _check_form(t.prepacked)
        data, scales = packed_shape(m, k), (0,)
    outer = () if isinstance(t.outer_scale, Tensor) and t.outer_scale.dim() == len(batch) else (m,)
    _check_field("data", t.data, torch.uint8, batch + data)
    _check_field("block_scale", t.block_scale, torch.float8_e4m3fn, batch + scales)
    _check_field("outer_scale", t.outer_scale, torch.float32, batch + outer)
    for name, field in (("block_scale", t.block_scale), ("outer_scale", t.outer_scale)):
        if field.device != t.data.device:
            raise ValueError(f"{name}: expected device {t.data.device} (that of data), got {field.device}")


def _reduced(t: FP4Tensor | FP4Batch) -> tuple[Any, ...]:
    """What copy and pickle keep; scales as bytes, because plain pickle (not torch.save) cannot read float8 back."""
    form = () if t.prepacked is None else (t.prepacked,)
    return t.data, t.block_scale.detach().view(torch.uint8), t.outer_scale.detach(), tuple(t.shape), t.sf_layout, *form


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


def _rebuild_batch(
    data: Tensor,
    scale_bytes: Tensor,
    outer_scale: Tensor,
    shape: tuple[int, int, int],
    sf_layout: str,
    prepacked: str | None = None,
) -> FP4Batch:
    """The same for a batch."""
    return FP4Batch(data, scale_bytes.view(torch.float8_e4m3fn), outer_scale, shape, sf_layout, prepacked)


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
_FIELDS = (*_LEAVES, "shape", "sf_layout", "prepacked")
_Container = TypeVar("_Container", FP4Tensor, FP4Batch)
_Context = tuple[tuple[int, ...], str, str | None]


def unchecked(
    container: type[_Container], leaves: Iterable[Any], shape: tuple[int, ...], sf_layout: str,
    prepacked: str | None = None,
) -> _Container:  # fmt: skip
    """A container of these as they are; for results just made, as the checks would take a fifth of a call."""
    t = object.__new__(container)
    for name, value in zip(_FIELDS, (*leaves, shape, sf_layout, prepacked), strict=True):
        object.__setattr__(t, name, value)
    return t


def _register(container: type[_Container]) -> None:
    """Makes a container a pytree whose leaves are its three tensors."""

    def flatten(t: _Container) -> tuple[list[Tensor], _Context]:
        return [t.data, t.block_scale, t.outer_scale], (t.shape, t.sf_layout, t.prepacked)

    def flatten_with_keys(t: _Container) -> tuple[list[tuple[pytree.KeyEntry, Any]], _Context]:
        leaves, context = flatten(t)
        return [(pytree.GetAttrKey(name), leaf) for name, leaf in zip(_LEAVES, leaves, strict=True)], context

    def unflatten(leaves: Any, context: _Context) -> _Container:
        return unchecked(container, leaves, *context)  # tree_map may put anything in the leaves

    pytree.register_pytree_node(
        container,
        flatten,
        unflatten,
        serialized_type_name=f"fp4gemm.{container.__name__}",
        flatten_with_keys_fn=flatten_with_keys,
    )


_register(FP4Tensor)
_register(FP4Batch)
torch.serialization.add_safe_globals([_rebuild, _rebuild_batch])

"""Recipes: what of a linear layer is NVFP4, as data."""

from __future__ import annotations

from dataclasses import dataclass, fields

from fp4gemm.formats import BLOCK, RECIPE_SIGNS
from fp4gemm.reference.options import check_mask, check_name

FORMATS = ("nvfp4",)
_SCALINGS = ("per_row", "per_tensor")


@dataclass(frozen=True)
class Recipe:
    """How a linear layer quantizes x [M, K], its weight w [N, K] and the gradient dy [M, N] of its result.

    The three products are y = x . w^T, dx = dy . w and dw = dy^T . x; each reads operands quantized along its own K. A
    recipe is plain frozen data: it compares, hashes and pickles by value, and nothing in the environment changes it.

    Attributes:
        activations: outer scales of x and dy, and of their transposes: ``per_row``, ``per_tensor``, or None, which
            leaves both as they are (bf16 or fp16; float32 is rounded to bf16).
        weights: outer scales of w and of its transpose.
        weight_2d: 16 x 16 blocks for w, so that w and its transpose have the same values (``weights="per_tensor"``).
        hadamard: mask of 16 signs of the random Hadamard transform on both operands of dw, where it cancels, or None.
        stochastic: round dy, both its forms, stochastically. Seeds come from torch's generator of the device.
        format: of the elements; ``nvfp4`` is the only one so far.

    Raises:
        TypeError: ``hadamard`` is not an int or None.
        ValueError: a name is unknown or fields contradict each other; the message names the field.
    """

    activations: str | None = "per_row"
    weights: str = "per_row"
    weight_2d: bool = False
    hadamard: int | None = None
    stochastic: bool = False
    format: str = "nvfp4"

    def __post_init__(self) -> None:
        check_name("format", self.format, FORMATS)
        check_name("weights", self.weights, _SCALINGS)
        if self.activations is not None:
            check_name("activations", self.activations, _SCALINGS)
        if self.weight_2d and self.weights != "per_tensor":
            raise ValueError(f"weight_2d: needs weights='per_tensor', one outer scale for both, got {self.weights!r}")
        if self.hadamard is not None:
            check_mask(self.hadamard)
        for name, used in (("hadamard", self.hadamard is not None), ("stochastic", self.stochastic)):
            if used and self.activations is None:
                raise ValueError(f"{name}: expected none where activations=None, as no operand of it is quantized")

    @property
    def weight_block(self) -> tuple[int, int]:
        """What ``quantize(block=)`` takes for the weight."""
        return (BLOCK, BLOCK) if self.weight_2d else (1, BLOCK)

    def as_dict(self) -> dict[str, str | int | bool | None]:
        """Every field by name, as JSON has it; ``Recipe(**d)`` is the way back."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def per_token(*, rht: bool = False, sr: bool = False, weight_2d: bool = False) -> Recipe:
    """An outer scale for each row of every operand; with ``weight_2d`` one for the weight, in 16 x 16 blocks.

    ``rht``: the random Hadamard transform on the operands of the weight gradient. ``sr``: stochastic rounding of
    gradients. All three together are what training calls for.
    """
    return Recipe(
        weights="per_tensor" if weight_2d else "per_row",
        weight_2d=weight_2d,
        hadamard=RECIPE_SIGNS if rht else None,
        stochastic=sr,
    )


def per_tensor(*, rht: bool = False, sr: bool = False, weight_2d: bool = False) -> Recipe:
    """One outer scale for each operand; the options of :func:`per_token`."""
    return Recipe("per_tensor", "per_tensor", weight_2d, RECIPE_SIGNS if rht else None, sr)


def w4a16() -> Recipe:
    """Only the weight is NVFP4; the weight gradient is a plain product."""
    return Recipe(activations=None)

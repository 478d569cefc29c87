"""The epilogue visitor tree (EVT) of a GEMM: one tree, printed twice.

``cpp_type()`` gives the CUTLASS type, ``cpp_arguments()`` the braces that initialise its argument struct from the
fields of ``GemmArguments``. A node prints both, so type and arguments cannot drift apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

CUTLASS_ELEMENT = {"bf16": "cutlass::bfloat16_t", "fp16": "cutlass::half_t", "fp32": "float"}


class Node(Protocol):
    def type(self, out: str) -> str: ...
    def arguments(self) -> str: ...


@dataclass(frozen=True)
class Accumulator:
    def type(self, out: str) -> str:
        return "Sm90AccFetch"

    def arguments(self) -> str:
        return "{}"


@dataclass(frozen=True)
class Vector:
    """A vector along M or N; ``per_element`` is a C++ condition that is false where it is one value for all."""

    axis: str
    pointer: str
    element: str
    per_element: str = "true"

    def type(self, out: str) -> str:
        node, stride = {"m": ("Sm90ColBroadcast", "AlongM"), "n": ("Sm90RowBroadcast", "AlongN")}[self.axis]
        return f"{node}<0, TileShape, {self.element}, float, fp4gemm::{stride}>"

    def arguments(self) -> str:
        stride = {"m": f"{{{self.per_element}, {{}}, 0}}", "n": f"{{{{}}, {self.per_element}, 0}}"}[self.axis]
        return f"{{static_cast<{self.element} const*>({self.pointer}), {self.element}(0), {stride}}}"


@dataclass(frozen=True)
class Scalar:
    """One value for all elements, a C++ expression of type ``element`` that Params holds."""

    value: str
    element: str = "float"

    def type(self, out: str) -> str:
        return f"Sm90ScalarBroadcast<{self.element}>"

    def arguments(self) -> str:
        return f"{{{{{self.value}}}}}"


@dataclass(frozen=True)
class Source:
    """The source matrix C."""

    def type(self, out: str) -> str:
        return "Sm90SrcFetch<ElementC>"

    def arguments(self) -> str:
        return "{}"


@dataclass(frozen=True)
class Compute:
    """A binary fp32 operation; ``out`` is the element it leaves in, rounded to nearest even."""

    operation: str
    left: Node
    right: Node

    def type(self, out: str) -> str:
        operation = f"Sm90Compute<cutlass::{self.operation}, {out}, float, cutlass::FloatRoundStyle::round_to_nearest>"
        return f"Sm90EVT<{operation}, {self.left.type('float')}, {self.right.type('float')}>"

    def arguments(self) -> str:
        return f"{{{self.left.arguments()}, {self.right.arguments()}, {{}}}}"


@dataclass(frozen=True)
class Epilogue:
    tree: Node

    def cpp_type(self) -> str:
        return f"using EpilogueTree = {self.tree.type('ElementD')};"

    def cpp_arguments(self) -> str:
        return self.tree.arguments()


def rescale(bias: str | None) -> Epilogue:
    """``D = cast(outer_a[i] * (outer_b[j] * acc) [+ bias[j]])``, docs/numerics.md; ``bias`` is its dtype name or None.

    The one place where outer scales become epilogue factors.
    """
    outer_b = Vector("n", "args.outer_b", "float", "args.outer_b_per_row != 0")
    outer_a = Vector("m", "args.outer_a", "float", "args.outer_a_per_row != 0")
    tree: Node = Compute("multiplies", outer_a, Compute("multiplies", outer_b, Accumulator()))
    if bias is not None:
        tree = Compute("plus", tree, Vector("n", "args.bias", CUTLASS_ELEMENT[bias]))
    return Epilogue(tree)


def packed_rescale(bias: str | None, source: bool) -> Epilogue:
    """``D = cast(outer_a[i] * (outer_b[j] * (128 * acc)) [+ bias[j]] [+ beta * C])`` of a prepacked weight.

    Weight rows j run along the MMA's M there, tokens i along its N. beta is a double in Params, because the host
    patches words of 8 bytes; the tree rounds it to fp32.
    """
    outer_b = Vector("m", "args.outer_b", "float", "args.outer_b_per_row != 0")
    outer_a = Vector("n", "args.outer_a", "float", "args.outer_a_per_row != 0")
    product = Compute("multiplies", Scalar("fp4gemm::kPackedUnit"), Accumulator())
    tree: Node = Compute("multiplies", outer_a, Compute("multiplies", outer_b, product))
    if bias is not None:
        tree = Compute("plus", tree, Vector("m", "args.bias", CUTLASS_ELEMENT[bias]))
    if source:
        beta = Scalar("__longlong_as_double(reinterpret_cast<int64_t>(args.sfb))", "double")
        tree = Compute("plus", tree, Compute("multiplies", beta, Source()))
    return Epilogue(tree)

"""The epilogue visitor tree (EVT) of a GEMM: one tree, printed twice.

``cpp_type()`` gives the CUTLASS type, ``cpp_arguments()`` the braces that initialise its argument struct from the
fields of ``GemmArguments``. A node prints both, so type and arguments cannot drift apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from fp4gemm.spec import GemmSpec

CUTLASS_ELEMENT = {
    "bf16": "cutlass::bfloat16_t",
    "fp16": "cutlass::half_t",
    "fp32": "float",
    "fp4": "cutlass::float_e2m1_t",
}


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
    """A vector along M or N, a field of GemmArguments; ``per_element`` is a C++ condition that is false where it is one
    value for all elements."""

    axis: str
    field: str
    element: str
    per_element: str = "true"

    def type(self, out: str) -> str:
        node, stride = {"m": ("Sm90ColBroadcast", "AlongM"), "n": ("Sm90RowBroadcast", "AlongN")}[self.axis]
        return f"{node}<0, CtaTile, {self.element}, float, fp4gemm::{stride}>"

    def arguments(self) -> str:
        along = {"m": f"{self.per_element}, {{}}", "n": f"{{}}, {self.per_element}"}[self.axis]
        pointer = f"static_cast<{self.element} const*>(args.{self.field})"
        return f"{{{pointer}, {self.element}(0), {{{along}, args.batch_{self.field}}}}}"


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
    """A binary fp32 operation; ``out`` is the element it leaves in, rounded to nearest even.

    Not CUTLASS's homogeneous_multiply_add: what it asks of a broadcast is read before the kernel has waited.
    """

    operation: str
    left: Node
    right: Node

    def type(self, out: str) -> str:
        operation = f"Sm90Compute<cutlass::{self.operation}, {out}, float, cutlass::FloatRoundStyle::round_to_nearest>"
        return f"Sm90EVT<{operation}, {self.left.type('float')}, {self.right.type('float')}>"

    def arguments(self) -> str:
        return f"{{{self.left.arguments()}, {self.right.arguments()}, {{}}}}"


@dataclass(frozen=True)
class Activation:
    """A function of activation.hpp, in fp32; ``out`` is the element it leaves in, rounded to nearest even."""

    name: str
    operand: Node

    def type(self, out: str) -> str:
        function = f"fp4gemm::{self.name.capitalize()}"
        operation = f"Sm90Compute<{function}, {out}, float, cutlass::FloatRoundStyle::round_to_nearest>"
        return f"Sm90EVT<{operation}, {self.operand.type('float')}>"

    def arguments(self) -> str:
        return f"{{{self.operand.arguments()}, {{}}}}"


@dataclass(frozen=True)
class Quantize:
    """NVFP4 under given outer scales: codes become D, the node itself stores block scales (quantize_epilogue.hpp)."""

    arch: str
    sf_layout: str
    operand: Node

    def type(self, out: str) -> str:
        rows = {"sm_100a": "QuantizeRowsOfThreads", "sm_120a": "QuantizeRowsOfQuads"}[self.arch]
        scales = {"linear": "LinearScales", "128x4": "Scales128x4"}[self.sf_layout]
        return f"Sm90EVT<fp4gemm::{rows}<fp4gemm::{scales}>, {self.operand.type('float')}>"

    def arguments(self) -> str:
        fields = "args.sfd, args.outer_d, args.batch_sfd, args.batch_outer_d, args.outer_d_per_row"
        return f"{{{self.operand.arguments()}, {{{fields}}}}}"


@dataclass(frozen=True)
class Epilogue:
    tree: Node

    def cpp_type(self) -> str:
        return f"using EpilogueTree = {self.tree.type('ElementD')};"

    def cpp_arguments(self) -> str:
        return self.tree.arguments()


_BETA = Scalar("args.beta", "double")  # a word that the host patches; the tree rounds it to fp32


def _rescaled(accumulator: Node, axis_a: str, bias: str | None, source: bool) -> Node:
    """``outer_a[i] * (outer_b[j] * acc) [+ bias[j]] [+ beta * C]``, where i runs along the MMA's ``axis_a``.

    The one place where outer scales become epilogue factors.
    """
    axis_b = {"m": "n", "n": "m"}[axis_a]
    outer_b = Vector(axis_b, "outer_b", "float", "args.outer_b_per_row != 0")
    outer_a = Vector(axis_a, "outer_a", "float", "args.outer_a_per_row != 0")
    tree: Node = Compute("multiplies", outer_a, Compute("multiplies", outer_b, accumulator))
    if bias is not None:
        tree = Compute("plus", tree, Vector(axis_b, "bias", CUTLASS_ELEMENT[bias]))
    return Compute("plus", tree, Compute("multiplies", _BETA, Source())) if source else tree


def rescale(spec: GemmSpec) -> Epilogue:
    """``D = cast(activation(outer_a[i] * (outer_b[j] * acc) [+ bias[j]] [+ beta * C]))``, docs/numerics.md."""
    tree = _rescaled(Accumulator(), "n" if spec.column_major else "m", spec.bias, spec.source is not None)
    if spec.activation is not None:
        tree = Activation(spec.activation, tree)
    return Epilogue(tree if spec.sf_layout is None else Quantize(spec.arch, spec.sf_layout, tree))


def packed_rescale(bias: str | None, source: bool) -> Epilogue:
    """``D = cast(outer_a[i] * (outer_b[j] * (128 * acc)) [+ bias[j]] [+ beta * C])`` of a prepacked weight.

    Weight rows j run along the MMA's M there, tokens i along its N.
    """
    product = Compute("multiplies", Scalar("fp4gemm::kPackedUnit"), Accumulator())
    return Epilogue(_rescaled(product, "n", bias, source))

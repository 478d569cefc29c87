"""spec -> C++ source. Undefined names are errors; templates hold names and numbers, no algorithm."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from fp4gemm import epilogue
from fp4gemm.formats import PREPACKED, RECIPE_SIGNS, VALUES
from fp4gemm.spec import ANY_SIGNS, GemmSpec, KernelSpec, PackedCollectiveSpec, check

_ELEMENTS = {"bf16": "Bf16", "fp16": "Fp16", "fp32": "Fp32"}
_FILTERS: dict[str, dict[Any, str]] = {
    "element": {**_ELEMENTS, "e4m3": "E4m3"},
    "element_or_none": {**_ELEMENTS, None: "None"},
    "operand": {"bf16": "OperandBf16", "fp16": "OperandFp16"},
    "cutlass_element": epilogue.CUTLASS_ELEMENT,
    "convention": {"te_per_token": "TePerToken", "te": "Te", "torchao": "Torchao", "modelopt": "ModelOpt"},
    "scales": {
        "linear": "LinearScales",
        "128x4": "Scales128x4",
        "8x4": "Scales8x4",
        VALUES: "ValuesForm",
        PREPACKED: "PackedForm",
    },
    "scaling": {"per_row": "kPerRow", "per_tensor": "kPerTensor", "amaxes": "kAmaxes", "given": "kGiven"},
    "adaptive": {None: "kNone", "mse": "kMse", "mae": "kMae"},
    "residual": {None: "kNone", "activation": "kActivation", "weight": "kWeight"},
    "producer": {
        "silu_mul": "kSiluMul",
        "gelu_tanh": "kGeluTanh",
        "relu2": "kRelu2",
        "rmsnorm": "kRmsNorm",
        "add_rmsnorm": "kAddRmsNorm",
    },
    "signs": {None: "kNoHadamard", ANY_SIGNS: "kAnySigns", RECIPE_SIGNS: f"0x{RECIPE_SIGNS:04X}"},
    "gradient": {
        "relu": "kDRelu",
        "relu2": "kDRelu2",
        "silu": "kDSilu",
        "gelu_tanh": "kDGeluTanh",
        "quick_gelu": "kDQuickGelu",
    },
    "metric": {"sse": "kSse", "hessian": "kHessian"},
    "cpp": {True: "true", False: "false"},
    "schedule": {"cooperative": "Cooperative", "pingpong": "Pingpong"},
    "scheduler": {
        "static": "cutlass::gemm::StaticPersistentScheduler",
        "clc": "cutlass::gemm::DynamicPersistentScheduler",
    },
}


@cache
def template_dir() -> Path:
    """The templates: inside an installed package, beside it in a checkout."""
    package = Path(__file__).parent
    for folder in (package / "templates", package.parent / "templates"):
        if (folder / "include" / "fp4gemm").is_dir():
            return folder
    raise FileNotFoundError(f"fp4gemm's templates are neither in {package} nor beside it: reinstall fp4gemm")


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(template_dir()),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # C++, not HTML
    )
    environment.filters.update({name: table.__getitem__ for name, table in _FILTERS.items()})
    return environment


def render(spec: KernelSpec) -> str:
    """The source of one translation unit. Raises ValueError for a spec that ``check`` refuses."""
    if problem := check(spec):
        raise ValueError(f"{type(spec).__name__}: {problem}")
    context: dict[str, object] = {"spec": spec}
    if isinstance(spec, GemmSpec):
        context["epilogue"] = epilogue.rescale(spec)
    elif isinstance(spec, PackedCollectiveSpec):
        context["epilogue"] = epilogue.packed_rescale(spec.bias, spec.source is not None)
    return _environment().get_template(spec.template).render(context)

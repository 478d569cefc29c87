"""Bytes of the quantizer's options against the reference on the CPU: 500 random problems of each set of options."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import gpu_cases as cases
import pytest
import torch

import fp4gemm
from fp4gemm import FP4Tensor, reference, select
from fp4gemm.formats import PRODUCERS, SF_LAYOUTS

Options = dict[str, Any]
PROBLEMS, CHUNK = 500, 50
KERNELS = 40  # combinations of dtypes, layouts, conventions and options among them: each is a second or two to build
BOTH_CONVENTIONS = ("te_per_token", "te")
MASKS = (0, 0xACE1, 0xD7E8, 0xFFFF)


def seed_of(rng: random.Random) -> int:
    return rng.choice((0, 1, rng.getrandbits(32), rng.getrandbits(63)))


def transposed(rng: random.Random) -> Options:
    return {"transposed": True}


def hadamard(rng: random.Random) -> Options:
    return {"transposed": True, "hadamard": rng.choice(MASKS)}


def stochastic(rng: random.Random) -> Options:
    return {"seed": seed_of(rng)}


def everything_transposed(rng: random.Random) -> Options:
    return {**hadamard(rng), **stochastic(rng), "sf_layout": "128x4"}


def adaptive(rng: random.Random) -> Options:
    return {"adaptive": rng.choice(("mse", "mae")), "transposed": rng.random() < 0.3}


def squares(rng: random.Random) -> Options:
    extra = rng.choice(({}, stochastic(rng), {"transposed": True}, {"adaptive": "mse"}))
    return {"block": (16, 16), "scaling": "per_tensor", **extra}


def residual(rng: random.Random) -> Options:
    side = rng.choice(("activation", "activation", "weight"))
    return {"residual": rng.choice((16, 32, 64, 256)), "residual_side": side, "order": rng.random() < 0.3}


def residual_stochastic(rng: random.Random) -> Options:
    return {**residual(rng), **stochastic(rng), "scaling": "per_row"}


def e4m3(rng: random.Random) -> Options:
    extra = rng.choice(({}, {"transposed": True}, stochastic(rng), hadamard(rng)))
    return {"dtype": torch.float8_e4m3fn, **extra}


def produced(rng: random.Random) -> Options:
    extra = rng.choice(({}, {}, stochastic(rng), {"residual": 32}, {"adaptive": "mse"}))
    return {"producer": rng.choice(PRODUCERS), **extra}


SETS: tuple[Callable[[random.Random], Options], ...] = (
    transposed, hadamard, stochastic, everything_transposed, adaptive, squares, residual, residual_stochastic, e4m3,
    produced,
)  # fmt: skip


def draw(make: Callable[[random.Random], Options], seed: int) -> tuple[str, torch.Tensor, Options]:
    """x on the CPU and all arguments of `quantize`; the outer scale is given, or an amax is taken."""
    rng = random.Random(f"{make.__name__} {seed % KERNELS}")
    options = make(rng)
    scaling = options.pop("scaling", None) or rng.choice(("per_row", "per_row", "per_tensor"))
    kernel = cases.QuantizeCase.draw(seed % KERNELS)
    case = replace(
        cases.QuantizeCase.draw(seed), scaling=scaling, given="no", dtype=kernel.dtype, sf_layout=kernel.sf_layout,
        convention=kernel.convention,
    )  # fmt: skip
    if case.rows * case.k > 40_000:  # most problems are small, so that there can be many
        case = replace(case, rows=min(case.rows, 20), k=case.k if seed % 25 == 0 else case.k % 2000 + 1)
    if options.get("residual"):
        case = replace(case, k=max(options["residual"], case.k // 16 * 16))
    needs = options.get("adaptive") or options.get("residual")
    convention = rng.choice((None, *BOTH_CONVENTIONS)) if needs else case.convention
    if options.pop("order", False):
        options["channel_order"] = torch.randperm(case.k, generator=torch.Generator().manual_seed(seed))
    x = case.x()
    if options.get("producer") == "silu_mul":
        x = torch.cat([x, replace(case, seed=seed + 1).x()], dim=1)
    if dtype := options.pop("dtype", None):
        x = x.float().clamp(-448, 448).to(dtype)
    if rng.random() < 0.3:
        single = scaling == "per_tensor" or options.get("block")
        case = replace(case, given="scalar" if single else "rows", rows=x.shape[1 if options.get("transposed") else 0])
        options["outer_scale"] = case.outer_scale()
    arguments = {"scaling": scaling, "sf_layout": case.sf_layout, "convention": convention, **options}
    return f"{make.__name__} {seed}: {case} {options}", x, arguments


def moved(arguments: Options, device: torch.device) -> Options:
    return {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in arguments.items()}


@pytest.mark.parametrize("first", range(0, PROBLEMS, CHUNK))
@pytest.mark.parametrize("make", SETS, ids=lambda make: make.__name__)
def test_bytes_equal_the_reference(make: Callable[[random.Random], Options], first: int, device: torch.device) -> None:
    for seed in range(first, first + CHUNK):
        what, x, arguments = draw(make, seed)
        want = reference.quantize(x, **arguments)
        cases.poison_for(want, device)
        cases.assert_same(fp4gemm.quantize(x.to(device), **moved(arguments, device)), want, what)


FEW_OPTIONS: tuple[Options, ...] = (
    {},
    {"scaling": "per_tensor"},
    {"seed": 5},
    {"seed": 6, "outer_scale": torch.tensor(1 / 512)},
    {"adaptive": "mse"},
    {"residual": 32, "seed": 7},
    *({"producer": producer} for producer in PRODUCERS),
)


@pytest.mark.parametrize("options", FEW_OPTIONS, ids=str)
@pytest.mark.parametrize("m", [1, 130, select.FEW_ROWS, select.FEW_ROWS + 1])
def test_few_long_rows(m: int, options: Options, device: torch.device) -> None:
    """Which have a CTA each, and more of them than that, which have not: the same bytes."""
    for k, sf_layout in itertools.product((2048, 4112, 16384), SF_LAYOUTS):
        generator = torch.Generator().manual_seed(m + k)
        width = 2 * k if options.get("producer") == "silu_mul" else k
        x = torch.randn(m, width, generator=generator).to(torch.float32 if k == 2048 else torch.bfloat16)
        want = reference.quantize(x, sf_layout=sf_layout, **options)
        cases.poison_for(want, device)
        got = fp4gemm.quantize(x.to(device), sf_layout=sf_layout, **moved(options, device))
        cases.assert_same(got, want, f"{m} x {k} {sf_layout} {options}")


@pytest.mark.parametrize("options", [{}, {"seed": 5}, {"adaptive": "mse"}, {"residual": 32}], ids=str)
@pytest.mark.parametrize("shape", [(1000, 8192), (5000, 8192), (3000, 4096), (70000, 512)], ids=str)
def test_many_rows(shape: tuple[int, int], options: Options, device: torch.device) -> None:
    """In grids whose rows of a CTA wait for one another, and in such that are too small for that."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(shape[0])).bfloat16().to(device)
    for sf_layout in ("128x4", "8x4"):
        want = reference.quantize(x, sf_layout=sf_layout, **options)
        cases.poison_for(want, device)
        cases.assert_same(fp4gemm.quantize(x, sf_layout=sf_layout, **options), want, f"{shape} {sf_layout} {options}")


@pytest.mark.parametrize("options", [*FEW_OPTIONS, {"residual": 16}], ids=str)
@pytest.mark.parametrize("k", [2560, 5120, 7168, 9728, 14336, 16384, 18944, 28672])
def test_long_rows(k: int, options: Options, device: torch.device) -> None:
    """However threads, blocks and rows are divided: a tile of rows, and part of the next one."""
    m, generator = select.FEW_ROWS + 7, torch.Generator().manual_seed(k)
    width = 2 * k if options.get("producer") == "silu_mul" else k
    for dtype in (torch.bfloat16, torch.float32)[: 2 if k < 9728 else 1]:
        x, arguments = torch.randn(m, width, generator=generator).to(dtype).to(device), moved(options, device)
        for sf_layout in SF_LAYOUTS:
            want = reference.quantize(x, sf_layout=sf_layout, **arguments)
            cases.poison_for(want, device)
            got = fp4gemm.quantize(x, sf_layout=sf_layout, **arguments)
            cases.assert_same(got, want, f"{m} x {k} {dtype} {sf_layout} {options}")


@pytest.mark.parametrize("first", range(0, PROBLEMS, CHUNK))
def test_both_results_from_one_call(first: int, device: torch.device) -> None:
    for seed in range(first, first + CHUNK):
        rng = random.Random(seed % KERNELS)
        what, x, arguments = draw(rng.choice((transposed, hadamard, stochastic, everything_transposed, squares)), seed)
        for name in ("outer_scale", "transposed"):
            arguments.pop(name, None)
        if arguments.get("adaptive"):
            arguments.pop("adaptive")
        other = rng.choice((None, "linear", "128x4", "8x4"))
        want = reference.quantize_both(x, transposed_sf_layout=other, **arguments)
        for t in want:
            cases.poison_for(t, device)
        got = fp4gemm.quantize_both(x.to(device), transposed_sf_layout=other, **moved(arguments, device))
        for name, g, w in zip(("row", "transposed"), got, want, strict=True):
            cases.assert_same(g, w, f"{name}: {what}")


@pytest.mark.parametrize("first", range(0, 100, CHUNK))
def test_amaxes_and_the_two_calls_that_take_them(first: int, device: torch.device) -> None:
    for seed in range(first, first + CHUNK):
        what, x, arguments = draw(hadamard if seed % 2 else transposed, seed)
        arguments.pop("outer_scale", None)
        mask = arguments.get("hadamard")
        want = reference.amax(x, rows=True, columns=True, tensor=True, hadamard=mask)
        got = fp4gemm.amax(x.to(device), rows=True, columns=True, tensor=True, hadamard=mask, sums=seed % 3 == 0)
        if seed % 3 == 0:
            *got, sums = got
            exact, size = x.double().sum(0), x.double().abs().sum(0)
            near = (sums.cpu().double() - exact).abs() <= size * x.shape[0] * 2.0**-24
            assert bool((near | ~(size < 3e38)).all()), f"sums: {what}"
        for name, g, w in zip(("rows", "columns", "tensor"), got, want, strict=True):
            cases.assert_same_bits(g, w, f"amax of {name}: {what}")
        arguments |= {"scaling": "per_row"}
        split = fp4gemm.quantize(x.to(device), amax=got[1], **moved(arguments, device))
        cases.assert_same(split, reference.quantize(x, **arguments), f"in two calls: {what}")


@pytest.mark.parametrize("first", range(0, PROBLEMS, CHUNK))
def test_rmsnorm_then_quantize(first: int, device: torch.device) -> None:
    for seed in range(first, first + CHUNK):
        rng = random.Random(seed % KERNELS)
        residual, stochastic_seed = rng.random() < 0.5, rng.choice((None, None, 5))
        what, x, arguments = draw(transposed, seed)
        eps = random.Random(seed).choice((0.0, 1e-6, 1e-5))
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(x.shape[1], generator=generator).to(x.dtype)
        added = torch.randn(x.shape, generator=generator).to(x.dtype) if residual else None
        scaling = {name: arguments[name] for name in ("scaling", "sf_layout", "convention")}
        scaling |= {"eps": eps, "seed": stochastic_seed}
        want, h = reference.quantize_rmsnorm(x, weight, residual=added, **scaling)
        cases.poison_for(want, device)
        on_device = None if added is None else added.to(device)
        got, sums = fp4gemm.quantize_rmsnorm(x.to(device), weight.to(device), residual=on_device, **scaling)
        cases.assert_same(got, want, what)
        assert torch.equal(sums.cpu().nan_to_num(7.0), h.nan_to_num(7.0)), what


@pytest.mark.parametrize("options", [{}, {"seed": 5}, {"adaptive": "mse"}], ids=str)
@pytest.mark.parametrize("k", [2560, 3584, 4096, 5120, 7168, 8192, 12288, 16384])
@pytest.mark.parametrize("m", [300, 1500])
def test_rmsnorm_of_many_rows(m: int, k: int, options: Options, device: torch.device) -> None:
    shape, generator = (m, k), torch.Generator().manual_seed(m)
    x, residual, weight = (torch.randn(s, generator=generator).bfloat16() for s in (shape, shape, shape[1:]))
    x, residual, weight = x.to(device), residual.to(device), weight.to(device)
    for sf_layout, added in itertools.product(("128x4", "linear"), (None, residual)):
        what = f"{shape} {sf_layout} {options} {added is not None}"
        want, h = reference.quantize_rmsnorm(x, weight, residual=added, sf_layout=sf_layout, **options)
        cases.poison_for(want, device)
        got, sums = fp4gemm.quantize_rmsnorm(x, weight, residual=added, sf_layout=sf_layout, **options)
        cases.assert_same(got, want, what)
        assert torch.equal(sums, h), what


@pytest.mark.parametrize("producer", PRODUCERS)
@pytest.mark.parametrize("m", [1, 7, 100, 130])
def test_a_producer_in_front_of_a_gemm(producer: str, m: int, cuda: torch.device) -> None:
    generator = torch.Generator().manual_seed(m)
    k = 1056
    x = torch.randn(m, 2 * k if producer == "silu_mul" else k, generator=generator).bfloat16().to(cuda)
    w = fp4gemm.quantize(torch.randn(272, k, generator=generator).bfloat16().to(cuda)).prepack()
    want = fp4gemm.gemm(fp4gemm.quantize(x, producer=producer), w)
    assert torch.equal(fp4gemm.quantize_gemm(x, w, producer=producer), want)
    assert torch.equal(fp4gemm.quantize_gemm(reference.produce(x, producer), w), want)


@pytest.mark.parametrize("m, n, k", [(39, 6144, 4096), (1357, 4096, 12288)])
def test_companions_take_the_error_from_outlier_channels(m: int, n: int, k: int, cuda: torch.device) -> None:
    """ARCQuant's promise: the error of the product falls with KE, as that of the reference's values does."""
    generator = torch.Generator(cuda).manual_seed(k)
    x = torch.randn(m, k, device=cuda, generator=generator)
    loud = torch.rand(k, device=cuda, generator=generator) < 1 / 16
    x[:, loud] *= 1 + 15 * torch.rand(int(loud.sum()), device=cuda, generator=generator)
    x = x.bfloat16()
    w = (torch.randn(n, k, device=cuda, generator=generator) / k**0.5).bfloat16()
    order = x.float().abs().amax(0).argsort()
    exact, errors = x.double() @ w.double().t(), []
    for residual in range(0, 4097, 512):
        options = {"residual": residual, "channel_order": order} if residual else {}
        weight = fp4gemm.quantize(w, residual_side="weight", **options)
        got = fp4gemm.quantize_gemm(x, weight.prepack(), out_dtype=torch.float32, **options)
        activation = reference.quantize(x, **options)
        other = reference.quantize(w, residual_side="weight", **options)
        predicted = reference.dequantize(activation).double() @ reference.dequantize(other).double().t()
        error, expected = ((y.double() - exact).norm() / exact.norm() for y in (got, predicted))
        assert abs(error - expected) < 1e-4 * expected, (residual, error, expected)
        errors.append(float(error))
    print(f"{m} x {n} x {k}, KE = 0, 512, ... 4096:", ", ".join(f"{error:.4f}" for error in errors))
    # Beyond the loud channels there is less to gain, and a companion cannot do harm on the whole.
    assert all(later < 1.002 * earlier for earlier, later in itertools.pairwise(errors)), errors
    assert errors[0] > 1.25 * errors[-1], errors


def test_a_seed_on_the_device_is_read_when_the_kernel_runs(cuda: torch.device) -> None:
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    on_device, seed = x.to(cuda), torch.zeros((), dtype=torch.int64, device=cuda)
    fp4gemm.quantize(on_device, seed=seed)
    fp4gemm.quantize_both(on_device, seed=seed, hadamard=7)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        one, two = fp4gemm.quantize(on_device, seed=seed), fp4gemm.quantize_both(on_device, seed=seed, hadamard=7)
    for value in (5, 2**62 + 11):
        seed.fill_(value)
        graph.replay()
        torch.cuda.synchronize()
        cases.assert_same(one, reference.quantize(x, seed=value), f"seed {value}")
        for got, want in zip(two, reference.quantize_both(x, seed=value, hadamard=7), strict=True):
            cases.assert_same(got, want, f"both, seed {value}")


@pytest.mark.parametrize("options", [{}, {"transposed": True}, {"seed": 3}, {"residual": 16}], ids=str)
def test_a_flag_on_the_device_skips_the_work(options: Options, cuda: torch.device) -> None:
    old, new = (torch.randn(48, 160, generator=torch.Generator().manual_seed(i)).bfloat16() for i in (0, 1))
    out = fp4gemm.quantize(old.to(cuda), **options)
    x, flag = new.to(cuda), torch.ones(1, dtype=torch.int32, device=cuda)
    assert fp4gemm.quantize(x, noop=flag, out=out, **options) is out
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fp4gemm.quantize(x, noop=flag, out=out, **options)
    graph.replay()
    cases.assert_same(out, reference.quantize(old, **options), "skipped")
    flag.zero_()
    graph.replay()
    cases.assert_same(out, reference.quantize(new, **options), "not skipped")


def test_offsets_beyond_32_bits(cuda: torch.device) -> None:
    """The end of a tensor of more than 2**31 values; its rows are those of a small one."""
    rows, k = 2**18 + 3, 8192
    x = torch.randn(3, k, generator=torch.Generator().manual_seed(0)).bfloat16()
    whole = torch.zeros(rows, k, dtype=torch.bfloat16, device=cuda)
    whole[-3:] = x.to(cuda)
    got = fp4gemm.quantize(whole, sf_layout="linear")
    want = reference.quantize(x, sf_layout="linear")
    cases.assert_same_bits(got.data[-3:], want.data, "data")
    cases.assert_same_bits(got.block_scale[-3:], want.block_scale, "block_scale")
    del got
    turned = fp4gemm.quantize(whole, transposed=True, sf_layout="linear")
    tail = torch.cat([torch.zeros(13, k, dtype=torch.bfloat16), x])  # the last block of 16 rows, three of them there
    amax = tail.abs().amax(dim=0).float()
    assert turned.shape == (k, rows)
    cases.assert_same_bits(turned.outer_scale, amax * (1 / 2688), "outer_scale")
    last = reference.quantize(
        torch.cat([x, torch.zeros(13, k, dtype=torch.bfloat16)]), transposed=True, sf_layout="linear"
    )
    cases.assert_same_bits(turned.data[:, -8:], last.data, "transposed data")
    both: tuple[FP4Tensor, FP4Tensor] = fp4gemm.quantize_both(whole, sf_layout="linear")
    cases.assert_same_bits(both[0].data[-3:], want.data, "row data of both")
    cases.assert_same_bits(both[1].data[:, -8:], last.data, "transposed data of both")

"""Grouped GEMMs: every kernel of the rule at the edges of experts, and what the public calls do around them."""

from __future__ import annotations

import random
from functools import lru_cache
from itertools import pairwise

import gpu_cases as cases
import pytest
import torch

import fp4gemm
from fp4gemm import FP4Tensor, GroupedWeight, launch, reference, select
from fp4gemm.division import divide

DTYPES = {name: dtype for dtype, name in select.DTYPE_NAMES.items()}
PLAIN = cases.GROUPED_VARIANTS[0]
NS, KS = (1, 8, 65, 200, 1000), (16, 17, 72, 328, 1032)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, dtype: torch.dtype, device: torch.device, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(seed)).to(device, dtype)


def offsets_of(counts: tuple[int, ...], device: torch.device, first: int = 0) -> torch.Tensor:
    return (torch.tensor((0, *counts)).cumsum(0) + first).to(device)


def rows_of(offsets: torch.Tensor) -> list[slice]:
    ends = offsets.tolist()
    return [slice(a, b) for a, b in pairwise(ends)]


@lru_cache(maxsize=64)
def weights(experts: int, n: int, k: int, exact: bool, device: torch.device) -> tuple[list[FP4Tensor], GroupedWeight]:
    """Of each expert, and stacked; `exact`: of sums that are exact in every order."""
    if exact:
        plain = [cases.exact_operand(n, k, "linear", "per_row", n + k + e).to(device) for e in range(experts)]
    else:
        plain = [reference.quantize(normal(n, k, dtype=torch.float32, device=device, seed=e)) for e in range(experts)]
    return plain, fp4gemm.stack_weights(plain)


def draw_counts(rng: random.Random, experts: int, tile: int) -> tuple[int, ...]:
    few = (0, 0, 1, 2, 7) if experts > 8 else (0, 1, tile - 1, tile, tile + 1, 2 * tile + 3)
    return tuple(rng.choice(few) for _ in range(experts))


# --- every kernel, forced ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config, variant", cases.grouped_kernels(), ids=str)
def test_every_kernel(config: tuple[int, ...], variant: cases.Variant, cuda: torch.device) -> None:
    """Against the one right answer, bit for bit; rows in front of the first expert and behind the last stay NaN."""
    spec, rng = cases.grouped_spec(config, variant), random.Random(str(config))
    a_dtype, out_dtype, bias_name, source = variant
    device = torch.device("cuda", torch.cuda.current_device())
    for n in NS:
        for k in KS:
            counts = draw_counts(rng, rng.choice((1, 3, 8, 40)), config[0])
            before, after, experts = rng.choice((0, 3)), rng.choice((0, 5)), len(counts)
            m = before + sum(counts) + after
            if m == 0:
                continue
            plain, w = weights(experts, n, k, True, device)
            offsets = offsets_of(counts, device, before)
            x = cases.exact_activations(m, k, DTYPES[a_dtype], m + k).to(device)
            x[:before], x[before + sum(counts) :] = float("nan"), float("nan")
            bias = None if bias_name is None else normal(experts, n, dtype=DTYPES[bias_name], device=device, seed=n)
            width = -(-n // 8) * 8
            whole = torch.full((m, width), float("nan"), dtype=DTYPES[out_dtype], device=device)
            d = whole[:, :n]
            if source:  # in place
                d.copy_(normal(m, n, dtype=DTYPES[out_dtype], device=device, seed=k))
            c = d.clone() if source else None
            want = d.clone()
            cases.force_grouped(spec, x, w, offsets, bias, d if source else None, 0.37, d)
            for e, rows in enumerate(rows_of(offsets)):
                bias_e, c_e = None if bias is None else bias[e], None if c is None else c[rows]
                want[rows] = reference.gemm(x[rows], plain[e], bias_e, d.dtype, c=c_e, beta=0.37)
            cases.assert_same_bits(d + 0.0, want + 0.0, f"{config} {variant} {counts} {n} x {k}")
            assert bool(whole[:, n:].isnan().all()), "wrote past its end"


@pytest.mark.parametrize("config", select.grouped_configs(), ids=str)
def test_each_expert_gets_the_bits_of_the_dense_kernel(config: tuple[int, ...], cuda: torch.device) -> None:
    """Random operands, whose sums round: the same tile sums in the same order, wherever an expert begins."""
    device = torch.device("cuda", torch.cuda.current_device())
    n, k, counts = 1000, 1096, (5, 0, 300, 1, 33)
    plain, w = weights(len(counts), n, k, False, device)
    x = normal(sum(counts), k, dtype=torch.bfloat16, device=device, seed=1)
    offsets = offsets_of(counts, device)
    d = x.new_full((sum(counts), n), float("nan"))
    cases.force_grouped(cases.grouped_spec(config, PLAIN), x, w, offsets, None, None, 0.0, d)
    dense = select.packed_of("wgmma", config, *PLAIN)
    for e, rows in enumerate(rows_of(offsets)):
        if counts[e] == 0:
            continue
        want = x.new_empty((counts[e], n))
        cases.force(dense, x[rows], w.expert(e), None, None, 0.0, want)
        cases.assert_same_bits(d[rows], want, f"{config}, expert {e}")
        cases.assert_within_bound(d[rows], x[rows], plain[e], None, torch.bfloat16, f"{config}, expert {e}")


@pytest.mark.parametrize("config", [*select.grouped_configs(), (128, 4, 2, 1, 1, 1, 8)], ids=str)
def test_many_rounds_give_the_same_bits_every_time(config: tuple[int, ...], cuda: torch.device) -> None:
    """Tiles of all experts several times over: a lost arrival, or a slot read too early, would show in one of them."""
    device = torch.device("cuda", torch.cuda.current_device())
    counts = tuple(random.Random(1).choices((0, 1, 40, 3 * config[0] + 5), k=24))
    _, w = weights(len(counts), 2056, 1032, True, device)
    x = cases.exact_activations(sum(counts), 1032, torch.bfloat16, 1).to(device)
    offsets, spec = offsets_of(counts, device), cases.grouped_spec(config, PLAIN)
    want = reference.gemm_grouped(x, w, offsets)
    for _ in range(20):
        d = torch.full_like(want, float("nan"))
        cases.force_grouped(spec, x, w, offsets, None, None, 0.0, d)
        cases.assert_same_bits(d + 0.0, want + 0.0, f"{config}")


# Of other sizes and of two CTAs that share tokens.
MORE_CUTS = (
    (8, 2, 1, 4, 1, 1, 28), (8, 3, 1, 4, 1, 1, 20), (16, 7, 4, 1, 1, 1, 11), (32, 2, 1, 4, 2, 1, 12),
    (64, 3, 2, 1, 1, 1, 8),
)  # fmt: skip


@pytest.mark.parametrize("config", [*select.grouped_configs(), *MORE_CUTS], ids=str)
def test_row_tiles_of_every_size(config: tuple[int, ...], cuda: torch.device) -> None:
    """From a part of a round of SMs to several, where the device cuts rows so that the last one is full too."""
    device = torch.device("cuda", torch.cuda.current_device())
    rng, spec = random.Random(5), cases.grouped_spec(config, PLAIN)
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    for rounds in (0.3, 0.9, 1.1, 1.6, 2.2, 2.7, 4.4):
        experts = rng.randint(1, 30)
        n = 64 * max(1, round(rounds * sms * config[1] / experts)) - rng.choice((0, 8, 40))
        counts = tuple(rng.choice((1, config[0] // 2, config[0] + 1)) for _ in range(experts))
        _, w = weights(experts, n, 128, True, device)
        x = cases.exact_activations(sum(counts), 128, torch.bfloat16, 1).to(device)
        offsets = offsets_of(counts, device)
        want = reference.gemm_grouped(x, w, offsets)
        d = torch.full_like(want, float("nan"))
        cases.force_grouped(spec, x, w, offsets, None, None, 0.0, d)
        cases.assert_same_bits(d + 0.0, want + 0.0, f"{config}, {n} rows, {counts}")


# --- the public calls -------------------------------------------------------------------------------------------------


def test_a_batch_of_weights_is_packed_on_the_way(device: torch.device) -> None:
    plain, w = weights(3, 72, 80, True, device)
    batch, offsets = fp4gemm.FP4Batch.stack(plain), offsets_of((5, 0, 140), device)
    x = cases.exact_activations(145, 80, torch.bfloat16, 3).to(device)
    for function in (fp4gemm.gemm_grouped, fp4gemm.quantize_gemm_grouped):
        want = function(x, w, offsets)
        cases.assert_same_bits(function(x, batch, offsets), want, f"{function.__name__}, packed on the way")
        cases.assert_same_bits(function(x, batch.prepack(), offsets), want, f"{function.__name__}, packed before")


@pytest.mark.parametrize("tokens", [None, 1, 16, 32, 64, 128, 1000])
@pytest.mark.parametrize("experts", [1, 2, 128, 1024])
def test_random_groups(experts: int, tokens: int | None, device: torch.device) -> None:
    """Exact operands: whatever kernel the hint chooses, results are the same bits."""
    rng = random.Random(experts)
    n, k = (72, 80) if experts > 8 else (520, 272)
    plain, w = weights(experts, n, k, True, device)
    for _ in range(4):
        counts = draw_counts(rng, experts, 16)
        if sum(counts) == 0:
            continue
        offsets = offsets_of(counts, device)
        x = cases.exact_activations(sum(counts), k, torch.bfloat16, 3).to(device)
        bias = normal(experts, n, dtype=torch.bfloat16, device=device, seed=3)
        got = fp4gemm.gemm_grouped(x, w, offsets, bias, tokens=tokens)
        want = reference.gemm_grouped(x, w, offsets, bias)
        cases.assert_same_bits(got + 0.0, want + 0.0, f"{counts}")
        e = next(e for e, count in enumerate(counts) if count)
        rows = rows_of(offsets)[e]
        cases.assert_same_bits(want[rows], reference.gemm(x[rows], plain[e], bias[e]), f"expert {e} alone")


def test_random_operands_within_the_bound(device: torch.device) -> None:
    counts = (70, 1, 0, 200, 16)
    plain, w = weights(len(counts), 264, 1040, False, device)
    offsets = offsets_of(counts, device)
    x = normal(sum(counts), 1040, dtype=torch.float16, device=device, seed=2)
    x4 = reference.quantize(x)
    for a in (x, x4):
        got = fp4gemm.gemm_grouped(a, w, offsets, out_dtype=torch.float32)
        for e, rows in enumerate(rows_of(offsets)):
            part = a[rows] if isinstance(a, torch.Tensor) else reference.quantize(x[rows])
            cases.assert_within_bound(got[rows], part, plain[e], None, torch.float32, f"expert {e}")


def test_neighbours_of_nan_are_clean(device: torch.device) -> None:
    """A tile holds tokens of the next expert too, here NaN, and the weight of another expert is NaN."""
    counts = (5, 9, 3, 40)
    _, w = weights(len(counts), 136, 144, True, device)
    offsets = offsets_of(counts, device)
    x = cases.exact_activations(sum(counts), 144, torch.bfloat16, 4).to(device)
    want = fp4gemm.gemm_grouped(x, w, offsets)
    for poisoned in range(len(counts)):
        rows = rows_of(offsets)[poisoned]
        dirty, scales = x.clone(), w.outer_scale.clone()
        dirty[rows], scales[poisoned] = float("nan"), float("nan")
        got = fp4gemm.gemm_grouped(dirty, GroupedWeight(w.data, scales, w.shape), offsets)
        assert bool(got[rows].isnan().all())
        got[rows] = want[rows]
        cases.assert_same_bits(got, want, f"beside expert {poisoned}")


def test_rows_of_no_expert_are_not_written(device: torch.device) -> None:
    counts = (4, 0, 17)
    _, w = weights(len(counts), 65, 80, True, device)
    offsets = offsets_of(counts, device, first=6)
    x = torch.full((40, 80), float("nan"), dtype=torch.bfloat16, device=device)
    x[6:27] = cases.exact_activations(21, 80, torch.bfloat16, 5).to(device)
    whole = torch.full((44, 96), float("nan"), dtype=torch.bfloat16, device=device)
    out = whole[2:42, 8:73]
    assert fp4gemm.gemm_grouped(x, w, offsets, out=out) is out
    cases.assert_same_bits(out[6:27] + 0.0, reference.gemm_grouped(x, w, offsets)[6:27] + 0.0, "inside")
    out[6:27] = float("nan")
    assert bool(whole.isnan().all())


def test_accumulates_in_place(device: torch.device) -> None:
    counts = (3, 20)
    _, w = weights(2, 72, 80, True, device)
    offsets = offsets_of(counts, device)
    x = cases.exact_activations(23, 80, torch.bfloat16, 6).to(device)
    out = normal(23, 72, dtype=torch.float32, device=device, seed=7)
    want = reference.gemm_grouped(x, w, offsets, out_dtype=torch.float32, c=out.clone(), beta=0.5)
    fp4gemm.gemm_grouped(x, w, offsets, c=out, beta=0.5, out=out)
    cases.assert_same_bits(out, want, "beta * out added")


def test_strided_and_unaligned_tokens(device: torch.device) -> None:
    counts = (3, 0, 18)
    _, w = weights(3, 72, 80, True, device)
    offsets = offsets_of(counts, device)
    wide = cases.exact_activations(21, 200, torch.bfloat16, 8).to(device)
    for x in (wide[:, :80], wide[:, 3:83], wide.t().contiguous().t()[:, :80]):
        want = reference.gemm_grouped(x.contiguous(), w, offsets)
        cases.assert_same_bits(fp4gemm.gemm_grouped(x, w, offsets) + 0.0, want + 0.0, f"strides {x.stride()}")


def test_one_scale_for_each_expert(device: torch.device) -> None:
    values = [normal(72, 80, dtype=torch.float32, device=device, seed=e) * (e + 1) for e in range(3)]
    plain = [reference.quantize(v, scaling="per_tensor") for v in values]
    w = fp4gemm.stack_weights(plain)
    assert tuple(w.outer_scale.shape) == (3,)
    x = normal(20, 80, dtype=torch.bfloat16, device=device, seed=9)
    offsets = offsets_of((4, 6, 10), device)
    got = fp4gemm.gemm_grouped(x, w, offsets)
    for e, rows in enumerate(rows_of(offsets)):
        cases.assert_within_bound(got[rows], x[rows], plain[e], None, torch.bfloat16, f"expert {e}")


def test_weights_beyond_two_gigabytes(cuda: torch.device) -> None:
    n, k, experts = 14336, 4096, 72
    one = cases.exact_operand(n, k, "linear", "per_row", 1).to(cuda).prepack()
    w = fp4gemm.stack_weights([one] * experts)
    assert w.data.numel() > 2**31
    offsets = offsets_of((0,) * (experts - 2) + (3, 2), cuda)
    x = cases.exact_activations(5, k, torch.bfloat16, 1).to(cuda)
    cases.assert_same_bits(fp4gemm.gemm_grouped(x, w, offsets) + 0.0, fp4gemm.gemm(x, one) + 0.0, "the last two")


# --- quantized on the way ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("producer", [None, "silu_mul", "gelu_tanh"])
@pytest.mark.parametrize("given", ["no", "scalar", "rows"])
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_quantize_gemm_grouped_is_gemm_grouped_of_quantize(
    dtype: torch.dtype, given: str, producer: str | None, device: torch.device
) -> None:
    counts, n, k = (30, 0, 1, 70), 200, 160
    _, w = weights(len(counts), n, k, False, device)
    offsets, m = offsets_of(counts, device), sum(counts)
    x = normal(m, 2 * k if producer == "silu_mul" else k, dtype=dtype, device=device, seed=10)
    outer = {"no": None, "scalar": torch.tensor(1 / 512), "rows": torch.linspace(1e-3, 1e-2, m)}[given]
    outer = None if outer is None else outer.to(device)
    bias = normal(len(counts), n, dtype=dtype, device=device, seed=11)
    for b in (None, bias):
        got = fp4gemm.quantize_gemm_grouped(x, w, offsets, b, outer_scale=outer, producer=producer)
        x4 = fp4gemm.quantize(x, outer_scale=outer, producer=producer)
        want = fp4gemm.gemm_grouped(x4, w, offsets, b, out_dtype=dtype)
        cases.assert_same_bits(got, want, f"{dtype} {given} {producer} bias {b is not None}")


def test_dependent_launches_in_a_chain(cuda: torch.device) -> None:
    """Offsets that the kernel just in front has written, two layers, and again: nothing may be read too early."""
    n, k, experts = 512, 512, 8
    _, w = weights(experts, n, k, True, cuda)
    x = cases.exact_activations(96, k, torch.bfloat16, 12).to(cuda)
    sizes = torch.randint(0, 12, (30, experts), generator=seeded(13))
    wants = []
    for row in sizes:
        offsets = offsets_of(tuple(row.tolist()), cuda)
        first = fp4gemm.quantize_gemm_grouped(x, w, offsets)
        wants.append((offsets, first, fp4gemm.quantize_gemm_grouped(first, w, offsets)))
    offsets = torch.zeros(experts + 1, dtype=torch.int64, device=cuda)
    with launch.programmatic():
        got = []
        for row in sizes.to(cuda):
            torch.cumsum(row, 0, out=offsets[1:])
            first = fp4gemm.quantize_gemm_grouped(x, w, offsets)
            got.append((first, fp4gemm.quantize_gemm_grouped(first, w, offsets)))
    for (ends, *want), results in zip(wants, got, strict=True):
        for a, b in zip(results, want, strict=True):
            end = int(ends[-1])
            cases.assert_same_bits(a[:end], b[:end], f"{ends.tolist()}")


# --- graphs, compile, errors ------------------------------------------------------------------------------------------


def test_a_graph_follows_offsets_and_tokens(cuda: torch.device) -> None:
    """Captured once, replayed after other sizes, empty experts and other tokens were written where it reads."""
    n, k, experts, m = 264, 528, 6, 200
    _, w = weights(experts, n, k, True, cuda)
    x = torch.zeros(m, k, dtype=torch.bfloat16, device=cuda)
    offsets = torch.zeros(experts + 1, dtype=torch.int64, device=cuda)
    outs = [torch.empty(m, n, dtype=torch.bfloat16, device=cuda) for _ in range(2)]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        fp4gemm.gemm_grouped(x, w, offsets)  # builds and loads the kernels
        fp4gemm.quantize_gemm_grouped(x, w, offsets)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        fp4gemm.gemm_grouped(x, w, offsets, out=outs[0])
        outs[1].copy_(fp4gemm.quantize_gemm_grouped(x, w, offsets))
    rng = random.Random(14)
    for turn in range(12):
        cuts = sorted(rng.choices(range(m + 1), k=experts - 1))
        ends = torch.tensor((0, *cuts, rng.choice((cuts[-1], m))))
        x.copy_(cases.exact_activations(m, k, torch.bfloat16, 100 + turn))
        offsets.copy_(ends)
        for out in outs:
            out.fill_(float("nan"))
        graph.replay()
        end = int(ends[-1])
        want = reference.gemm_grouped(x, w, offsets)
        cases.assert_same_bits(outs[0][:end] + 0.0, want[:end] + 0.0, f"{ends.tolist()}")
        assert bool(outs[0][end:].isnan().all())
        quantized = reference.gemm_grouped(reference.quantize(x), w, offsets, out_dtype=torch.float32)
        error = (outs[1][:end].float() - quantized[:end]).abs()
        assert bool((error <= 2**-8 * quantized[:end].abs() + 1e-3).all()), f"{ends.tolist()}: quantized"


def test_compiled(device: torch.device) -> None:
    counts = (3, 0, 18)
    _, w = weights(3, 72, 80, True, device)
    offsets = offsets_of(counts, device)
    x = cases.exact_activations(21, 80, torch.bfloat16, 15).to(device)

    def both(x: torch.Tensor, w: GroupedWeight, offsets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return fp4gemm.gemm_grouped(x, w, offsets), fp4gemm.quantize_gemm_grouped(x, w, offsets)

    for got, want in zip(
        torch.compile(both, fullgraph=True, backend="aot_eager")(x, w, offsets), both(x, w, offsets), strict=True
    ):
        cases.assert_same_bits(got, want, "compiled")


def test_nothing_to_do(device: torch.device) -> None:
    _, w = weights(2, 72, 80, True, device)
    offsets = torch.zeros(3, dtype=torch.int64, device=device)
    x = torch.zeros(0, 80, dtype=torch.bfloat16, device=device)
    assert fp4gemm.gemm_grouped(x, w, offsets).shape == (0, 72)
    assert fp4gemm.quantize_gemm_grouped(x, w, offsets).shape == (0, 72)
    out = torch.full((5, 72), float("nan"), dtype=torch.bfloat16, device=device)
    fp4gemm.gemm_grouped(torch.zeros(5, 80, dtype=torch.bfloat16, device=device), w, offsets, out=out)
    assert bool(out.isnan().all())


def test_offsets_out_of_range_stay_inside(cuda: torch.device) -> None:
    """On a device nobody checks them; they are clamped, so memory around D is safe."""
    _, w = weights(3, 64, 64, True, cuda)
    x = cases.exact_activations(20, 64, torch.bfloat16, 16).to(cuda)
    whole = torch.full((60, 64), float("nan"), dtype=torch.bfloat16, device=cuda)
    offsets = torch.tensor([-(2**40) - 7, 8, 5, 2**40 + 7], device=cuda)
    fp4gemm.gemm_grouped(x, w, offsets, out=whole[20:40])
    assert bool(whole[20:40].isfinite().all())
    assert bool(whole[:20].isnan().all())
    assert bool(whole[40:].isnan().all())


def test_the_rule_serves_every_problem(cuda: torch.device) -> None:
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    for experts in (1, 8, 1024):
        for tokens in (1, 8, 9, 17, 100, 5000):
            for out, bias, source in (("bf16", None, False), ("fp32", "fp32", True)):
                spec = select.grouped_spec(sms, experts, tokens, 1000, 4096, "bf16", out, bias, source)
                assert divide(spec, experts * tokens, 1000, 4096, sms, experts) is not None

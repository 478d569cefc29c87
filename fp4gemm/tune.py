"""Measures which kernel is fastest for a product: what ``fp4gemm tune`` and tools/tune.py run."""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from fp4gemm import builder, cache, division, launch, ops, rates, select, table
from fp4gemm.bench import timing
from fp4gemm.division import divide, longest_sequence
from fp4gemm.engine import Activations, GroupedWeights, Output, Weight, launch_grouped, launch_spec
from fp4gemm.spec import PackedCollectiveSpec, PackedSpec, PackedWgmmaSpec, check

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096, 8192)
SHAPES = (
    (4096, 4096),
    (8192, 8192),
    (28672, 8192),
    (4096, 14336),
    (8192, 28672),
    (6144, 4096),
    (2048, 2048),
    (1024, 4096),
)

# Configurations worth a measurement, as the specs have them.
MMA = (
    (1, 28, 2, 1, 2, 0, 0), (1, 16, 3, 1, 2, 0, 0), (1, 16, 2, 1, 2, 2, 0), (1, 12, 3, 1, 2, 0, 0),
    (1, 8, 4, 1, 2, 0, 0), (2, 14, 2, 1, 2, 2, 1), (2, 12, 3, 1, 2, 4, 0), (2, 16, 2, 1, 2, 4, 0),
    (2, 14, 2, 1, 2, 0, 0),
)  # fmt: skip
WGMMA = (
    (16, 1, 1, 4, 1, 2, 16), (16, 1, 1, 4, 1, 2, 24), (16, 2, 1, 4, 1, 2, 16), (16, 2, 2, 2, 1, 2, 16),
    (16, 4, 4, 1, 1, 2, 12), (16, 7, 4, 1, 1, 2, 8), (16, 1, 1, 4, 1, 1, 40),
    (32, 1, 1, 4, 1, 2, 16), (32, 1, 1, 4, 1, 2, 24), (32, 2, 1, 4, 1, 2, 16), (32, 2, 2, 2, 1, 2, 16),
    (32, 4, 4, 1, 1, 2, 10), (32, 7, 4, 1, 1, 2, 9),
    (48, 1, 1, 2, 1, 2, 14), (48, 1, 1, 4, 1, 2, 16), (48, 2, 2, 2, 1, 2, 12), (48, 4, 4, 1, 1, 2, 8),
    (48, 7, 4, 1, 1, 2, 6),
    (64, 1, 1, 2, 1, 2, 14), (64, 1, 1, 3, 1, 2, 12), (64, 2, 2, 2, 1, 2, 12), (64, 4, 4, 1, 1, 2, 8),
    (64, 7, 4, 1, 1, 2, 6),
    (96, 1, 1, 2, 1, 2, 10), (96, 2, 2, 1, 1, 2, 8), (96, 4, 2, 1, 1, 2, 7), (96, 3, 3, 1, 1, 2, 9),
    (128, 1, 1, 1, 1, 2, 8), (128, 1, 1, 2, 1, 2, 8), (128, 2, 2, 1, 1, 2, 8), (128, 4, 2, 1, 1, 2, 6),
    (128, 2, 2, 1, 1, 1, 8), (128, 4, 2, 1, 1, 1, 8), (128, 3, 3, 1, 1, 2, 7), (128, 4, 2, 1, 2, 1, 8),
    (128, 4, 4, 1, 2, 1, 8),
    (192, 1, 1, 1, 1, 2, 6), (192, 1, 1, 1, 1, 1, 6), (192, 2, 2, 1, 1, 2, 5), (192, 2, 2, 1, 1, 1, 6),
    (256, 1, 1, 1, 1, 2, 5), (256, 2, 2, 1, 1, 2, 4), (256, 2, 2, 1, 1, 1, 5), (256, 1, 2, 1, 1, 1, 6),
    (256, 1, 2, 1, 2, 1, 6),
)  # fmt: skip
COLLECTIVE = ((128, 256, 1), (128, 256, 2), (64, 256, 1), (64, 256, 2))
STREAM_K = ((128, 256, 2),)
CONFIGS = {"mma": MMA, "wgmma": WGMMA, "collective": COLLECTIVE, "stream_k": STREAM_K}
# Grouped: without a split, and stages as deep as shared memory lets them be, because tiles follow each other.
GROUPED = (
    (8, 1, 1, 4, 1, 1, 40), (8, 2, 1, 4, 1, 1, 28), (8, 3, 1, 4, 1, 1, 20), (8, 4, 2, 2, 1, 1, 20),
    (8, 7, 4, 1, 1, 1, 12),
    (16, 1, 1, 4, 1, 2, 16), (16, 2, 1, 4, 1, 1, 24), (16, 3, 1, 4, 1, 1, 16), (16, 4, 2, 2, 1, 1, 16),
    (16, 7, 4, 1, 1, 1, 11),
    (32, 1, 1, 4, 1, 2, 16), (32, 2, 1, 4, 1, 1, 16), (32, 4, 2, 2, 1, 1, 12), (32, 7, 4, 1, 1, 1, 10),
    (48, 1, 1, 4, 1, 2, 16), (48, 2, 1, 4, 1, 1, 12), (48, 4, 2, 2, 1, 1, 8), (48, 7, 4, 1, 1, 1, 8),
    (64, 1, 1, 2, 1, 2, 14), (64, 2, 2, 2, 1, 1, 12), (64, 4, 4, 1, 1, 1, 11), (64, 6, 3, 1, 1, 1, 8),
    (64, 7, 4, 1, 1, 1, 6),
    (96, 1, 1, 2, 1, 2, 10), (96, 4, 2, 1, 2, 1, 8), (96, 6, 3, 1, 1, 1, 7),
    (128, 1, 1, 1, 1, 2, 8), (128, 4, 2, 1, 1, 1, 8), (128, 2, 2, 1, 2, 1, 10),
    (192, 2, 2, 1, 2, 1, 6), (256, 2, 2, 1, 2, 1, 5), (256, 1, 2, 1, 2, 1, 6),
)  # fmt: skip
_REPEATS = 7
_SETTLE_S = 0.15  # of a product whose kernels take turns
_NEAR = 1.08  # of the fastest: those that are timed again, each at its own clock


def candidates(m: int, n: int, k: int, sms: int) -> list[PackedSpec]:
    """Specs (bf16 in and out) that can serve the product, with token tiles neither mostly padding nor very many."""
    return [spec for _, _, spec in _candidates(m, n, k, sms)]


def _candidates(m: int, n: int, k: int, sms: int) -> Iterator[tuple[str, tuple[int, ...], PackedSpec]]:
    for kernel, configs in CONFIGS.items():
        for config in configs:
            spec = select.packed_of(kernel, config, "bf16", "bf16", None, False)
            if isinstance(spec, PackedCollectiveSpec):
                possible = n % 8 == 0  # rows of D are whole 16 bytes
            else:
                possible = divide(spec, m, n, k, sms) is not None
            if check(spec) is None and possible and select.is_about(spec, m):
                yield kernel, config, spec


def grouped_candidates(experts: int, tokens: int, n: int, k: int, sms: int) -> list[PackedWgmmaSpec]:
    """The same of grouped kernels, with so many tokens for each expert."""
    specs = []
    for config in GROUPED:
        spec = select.packed_of("wgmma", config, "bf16", "bf16", None, False)
        assert isinstance(spec, PackedWgmmaSpec)
        spec = replace(spec, grouped=True)
        possible = check(spec) is None and divide(spec, experts * tokens, n, k, sms, experts) is not None
        if possible and min(64, tokens // 4) <= spec.tokens <= max(16, 3 * tokens):
            specs.append(spec)
    return specs


Measured = dict[table.Choice, float]  # microseconds of the kernels that are near the fastest for one product


_Measure = Callable[[int, Sequence[Weight], Mapping[table.Choice, PackedSpec]], Measured]


def tune(
    shapes: Sequence[tuple[int, int]], sizes: Sequence[int], measure: _Measure | None = None
) -> Iterator[Measured]:
    """Measures the candidates of every (n, k) and m, by ``both_ways`` or ``in_turn``."""
    device = torch.cuda.current_device()
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    build({spec for n, k in shapes for m in sizes for spec in candidates(m, n, k, sms)})
    for n, k in shapes:
        weights = rotated(n, k)
        for m in sizes:
            known = {table.Choice(m, n, k, kernel, config): spec for kernel, config, spec in _candidates(m, n, k, sms)}
            yield (measure or both_ways)(m, weights, known)


def rotated(n: int, k: int) -> list[Weight]:
    """Copies of a weight, in more memory than the L2 holds."""
    weight = ops.quantize(torch.randn(n, k, device=timing.DEVICE, dtype=torch.bfloat16)).prepack()
    return [Weight(weight.data.clone(), weight.outer_scale, n, k) for _ in range(timing.rotation(weight.nbytes))]


def tune_grouped(
    experts: int, n: int, k: int, sizes: Sequence[int], counts: Callable[[int], Sequence[int]] | None = None
) -> Iterator[tuple[int, dict[tuple[int, ...], float]]]:
    """For so many tokens of an expert each, or those that ``counts`` makes of that mean: microseconds of each grouped
    candidate's configuration, launched behind the node in front and sampled in turn."""
    device = torch.cuda.current_device()
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    build({spec for tokens in sizes for spec in grouped_candidates(experts, tokens, n, k, sms)})
    one = ops.quantize(torch.randn(n, k, device=timing.DEVICE, dtype=torch.bfloat16)).prepack()
    copies = timing.rotation(experts * one.nbytes)
    data = [torch.stack([one.data] * experts) for _ in range(copies)]
    outer = torch.stack([one.outer_scale] * experts)
    for tokens in sizes:
        parts = [tokens] * experts if counts is None else counts(tokens)
        offsets = torch.tensor([0, *itertools.accumulate(parts)], dtype=torch.int64, device=timing.DEVICE)
        m = sum(parts)
        x = [torch.randn(m, k, device=timing.DEVICE, dtype=torch.bfloat16) for _ in data]
        d = [torch.empty(m, n, device=timing.DEVICE, dtype=torch.bfloat16) for _ in data]

        def calls(spec: PackedWgmmaSpec) -> list[timing.Call]:
            weights = [GroupedWeights(w, outer, offsets, experts, n, k, tokens) for w in data]  # noqa: B023 - used at once
            return [
                functools.partial(launch_grouped, spec, Activations(a, None), w, None, Output(out, None, 0.0))
                for a, w, out in zip(x, weights, d, strict=True)  # noqa: B023
            ]

        specs = grouped_candidates(experts, tokens, n, k, sms)
        us = timing.interleave({spec: timing.GraphSampler(calls(spec)) for spec in specs}, _REPEATS)
        yield tokens, {spec.config: us[spec] for spec in specs}


def build(wanted: Iterable[PackedSpec]) -> None:
    """Raises RuntimeError where a kernel cannot be built."""
    missing = [spec for spec in sorted(wanted, key=lambda s: s.name) if cache.lookup(spec) is None]
    for built in builder.build_all(missing):
        if built.error is not None:
            raise RuntimeError(f"{built.spec.name}: {built.error}")


def fewest(
    measured: Sequence[Measured], before: Sequence[table.Choice] = (), slack: float = 0.005, noise: float = 0.015
) -> list[table.Choice]:
    """A kernel for each product, no more than ``slack`` slower than its fastest, from a small set of kernels.

    Closer than that, times decide nothing, and every kernel more is one more to build. The choice that ``before`` has
    stays where it is no more than ``noise`` slower: a GPU at its power limit moves that much between two minutes.
    """
    known = {(c.m, c.n, c.k): c for c in before}
    stay: list[table.Choice] = []
    rest: list[Measured] = []
    for us in measured:
        product = next(iter(us))
        old = known.get((product.m, product.n, product.k))
        if old is not None and us.get(old, math.inf) <= (1 + noise) * min(us.values()):
            stay.append(old)
        else:
            rest.append(us)
    kernels = {(c.kernel, c.config) for c in stay}
    left = [{(c.kernel, c.config) for c, t in us.items() if t <= (1 + slack) * min(us.values())} for us in rest]
    left = [near for near in left if not near & kernels]
    while left:
        ((kernel, _),) = Counter(itertools.chain.from_iterable(map(sorted, left))).most_common(1)
        kernels.add(kernel)
        left = [near for near in left if kernel not in near]
    return stay + [min((c for c in us if (c.kernel, c.config) in kernels), key=us.__getitem__) for us in rest]


def described(us: Measured) -> str:
    """The product and the three kernels that were fastest."""
    best = sorted(us.items(), key=lambda item: item[1])[:3]
    first = best[0][0]
    times = "; ".join(f"{choice.kernel} {'x'.join(map(str, choice.config))} {t:.2f} us" for choice, t in best)
    return f"{first.m}x{first.n}x{first.k}: {times}"


def calls_of(m: int, weights: Sequence[Weight]) -> Callable[[PackedSpec], list[timing.Call]]:
    """What a kernel has to launch: for each weight an x and a D of its own, the same for all kernels."""
    n, k = weights[0].n, weights[0].k
    x = [torch.randn(m, k, device=timing.DEVICE, dtype=torch.bfloat16) for _ in weights]
    d = [torch.empty(m, n, device=timing.DEVICE, dtype=torch.bfloat16) for _ in weights]

    def calls(spec: PackedSpec) -> list[timing.Call]:
        return [
            functools.partial(launch_spec, spec, Activations(a, None), w, None, Output(out, None, 0.0))
            for a, w, out in zip(x, weights, d, strict=True)
        ]

    return calls


def both_ways(m: int, weights: Sequence[Weight], specs: Mapping[table.Choice, PackedSpec]) -> Measured:
    """As a node of a CUDA graph, once as it is and once inside ``programmatic()``, in turn with the others and at its
    own clock: the geometric mean, of candidates that are not far behind in turn."""
    calls = calls_of(m, weights)
    samplers: dict[tuple[table.Choice, bool], timing.Sampler] = {}
    for weights_first in (False, True):
        with launch.programmatic(weights_first):
            samplers |= {(choice, weights_first): timing.GraphSampler(calls(spec)) for choice, spec in specs.items()}
    shared = _means(timing.interleave(samplers, _REPEATS))
    near = {choice for choice, us in shared.items() if us <= _NEAR * min(shared.values())}
    own = _means(timing.in_turns({key: sampler for key, sampler in samplers.items() if key[0] in near}, _REPEATS))
    return {choice: math.sqrt(shared[choice] * us) for choice, us in own.items()}


def in_turn(m: int, weights: Sequence[Weight], specs: Mapping[table.Choice, PackedSpec]) -> Measured:
    """All candidates, in plain graphs and in turn alone."""
    calls = calls_of(m, weights)
    samplers = {choice: timing.GraphSampler(calls(spec)) for choice, spec in specs.items()}
    return timing.interleave(samplers, _REPEATS, _SETTLE_S)


def _means(us: Mapping[tuple[table.Choice, bool], float]) -> Measured:
    return {choice: math.sqrt(us[choice, False] * us[choice, True]) for choice, weights_first in us if weights_first}


def merge(rows: Sequence[table.Choice], new: Sequence[table.Choice]) -> list[table.Choice]:
    """``rows`` with those of ``new`` in the place of the same products."""
    replaced = {(r.m, r.n, r.k) for r in new}
    return [*new, *(r for r in rows if (r.m, r.n, r.k) not in replaced)]


def fit_rates(measured: Sequence[Measured], sms: int) -> list[rates.Rate]:
    """The rates of kernels, from all times of each product: of those that are the first choice by these for one of the
    products.

    Least squares of relative errors, none of the terms below 0; kernels far behind the fastest of a product, which
    nobody will choose for it, count little there.
    """
    rows: dict[table.Kernel, list[tuple[division.Sequence, float, float]]] = {}
    for us in measured:
        fastest = min(us.values())
        for choice, time in us.items():
            spec = select.packed_of(choice.kernel, choice.config, "bf16", "bf16", None, False)
            longest = longest_sequence(spec, choice.m, choice.n, choice.k, sms)
            assert longest is not None, "it was measured"
            weight = math.exp(-_FALL * (time / fastest - 1)) + _LEAST_WEIGHT
            rows.setdefault((choice.kernel, choice.config), []).append((longest, time, weight))
    fitted = [rates.Rate(*kernel, *_terms(of_kernel)) for kernel, of_kernel in sorted(rows.items())]
    products = {(choice.m, choice.n, choice.k) for us in measured for choice in us}
    first = {kernel for product in products for kernel in select.by_time(fitted, *product, sms)[:1]}
    return [rate for rate in fitted if (rate.kernel, rate.config) in first]


_FALL, _LEAST_WEIGHT = 4.0, 0.02


def _terms(rows: Sequence[tuple[division.Sequence, float, float]]) -> list[float]:
    """Launch, tile, block and sharing: of all subsets of these without a term below 0 the one with the least error."""
    factors = torch.tensor([[1.0, *longest] for longest, _, _ in rows], dtype=torch.float64)
    weights = torch.tensor([weight for *_, weight in rows], dtype=torch.float64).sqrt()
    a = factors * (weights / torch.tensor([time for _, time, _ in rows], dtype=torch.float64))[:, None]
    best, terms = math.inf, [0.0] * 4
    used = [i for i in range(4) if bool(factors[:, i].any())]
    for count in range(1, len(used) + 1):
        for chosen in map(list, itertools.combinations(used, count)):
            found = torch.linalg.lstsq(a[:, chosen], weights[:, None], driver="gelsd").solution[:, 0]
            error = float((a[:, chosen] @ found - weights).square().sum())
            if error < best and bool((found >= 0).all()):
                best, terms = error, [0.0] * 4
                for i, term in zip(chosen, found.tolist(), strict=True):
                    terms[i] = round(term, 4)
    return terms

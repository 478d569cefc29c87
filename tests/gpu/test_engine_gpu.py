"""GEMMs on prepacked weights: every kernel of the table at its edges, and what only the public calls do around them."""

from __future__ import annotations

import random
from functools import lru_cache
from itertools import pairwise

import gpu_cases as cases
import pytest
import torch

import fp4gemm
from fp4gemm import FP4Tensor, launch, reference, select
from fp4gemm.division import divide
from fp4gemm.formats import SF_LAYOUTS, packed_shape
from fp4gemm.spec import PackedCollectiveSpec, PackedSpec

TORCH_DTYPES = {name: dtype for dtype, name in select.DTYPE_NAMES.items()}
ACTIVATIONS = (torch.bfloat16, torch.float16)
NS = (8, 63, 64, 65, 1000, 4097)
KS = (16, 17, 64, 272, 4104)
LAYOUTS = tuple(SF_LAYOUTS)


def random_values(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(device, dtype)


@lru_cache(maxsize=256)
def weight(n: int, k: int, exact: bool, device: torch.device) -> tuple[FP4Tensor, FP4Tensor]:
    """The same weight plain and prepacked; `exact`: of sums that are exact in every order."""
    if exact:
        plain = cases.exact_operand(n, k, "linear", "per_row", n + k).to(device)
    else:
        plain = reference.quantize(random_values(n, k, dtype=torch.float32, device=device))
    return plain, plain.prepack()


@lru_cache(maxsize=256)
def activations(m: int, k: int, dtype: torch.dtype, exact: bool, device: torch.device) -> torch.Tensor:
    if exact:
        return cases.exact_activations(m, k, dtype, m + k).to(device)
    return random_values(m, k, dtype=dtype, device=device)


def nan(*shape: int, dtype: torch.dtype, device: torch.device, column_major: bool = False) -> torch.Tensor:
    """Where D goes: what a kernel does not write stays NaN."""
    m, n = shape
    d = torch.full((n, m) if column_major else (m, n), float("nan"), dtype=dtype, device=device)
    return d.t() if column_major else d


def assert_equal(got: torch.Tensor, want: torch.Tensor, what: str) -> None:
    """A sum of zero may be +0 or -0, depending on the order: compare values there, bits after adding +0."""
    cases.assert_same_bits(got + 0.0, want + 0.0, what)


# --- every kernel, forced ---------------------------------------------------------------------------------------------


def tokens_of(config: cases.Config) -> list[int]:
    """Around the token tile; for kernels with several of them, that many too."""
    kernel, (first, *rest) = config
    tile = {"mma": 8 * first, "wgmma": first}.get(kernel) or rest[0]
    return sorted({1, tile - 1, tile, *((tile // 2 + 1,) if kernel == "mma" else (tile + 1, 2 * tile + 3))})


def can_serve(spec: PackedSpec, m: int, n: int, k: int) -> bool:
    if isinstance(spec, PackedCollectiveSpec):
        return n % 8 == 0
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    return divide(spec, m, n, k, sms) is not None


def check_forced(
    config: cases.Config, variant: cases.Variant, shape: tuple[int, int, int], device: torch.device, exact: bool
) -> bool:
    """One product against its one right answer, or within the bound; False where the kernel cannot serve it."""
    a_dtype, out_name, bias_name, source = variant
    spec = select.packed_of(*config, *variant)
    m, n, k = shape
    if not can_serve(spec, *shape):
        return False
    dtype, out_dtype = TORCH_DTYPES[a_dtype], TORCH_DTYPES[out_name]
    plain, packed = weight(n, k, exact, device)
    x = activations(m, k, dtype, exact, device)
    a: torch.Tensor | FP4Tensor = x
    outer_a = None
    if variant == cases.FORCED_VARIANTS[2]:  # the one that stands for NVFP4 activations
        a = reference.quantize(x, outer_scale=torch.full((m,), 0.5, device=device))
        x = reference.dequantize(a, torch.bfloat16, outer=False)
        a = FP4Tensor(a.data, a.block_scale, random_values(m, dtype=torch.float32, device=device), a.shape)
        outer_a = a.outer_scale
    bias = None if bias_name is None else random_values(n, dtype=TORCH_DTYPES[bias_name], device=device)
    # Both ways of writing, but that the collective stores rows of whole 16 bytes.
    column_major = source and not isinstance(spec, PackedCollectiveSpec)
    width = n if column_major else -(-n // 8) * 8
    whole = nan(m, width, dtype=out_dtype, device=device, column_major=column_major)
    d = whole[:, :n]
    if source:  # in place
        d.copy_(random_values(n, m, dtype=out_dtype, device=device).t())
    c = d.clone() if source else None
    cases.force(spec, x, packed, bias, d if source else None, 0.37, d, outer_a)
    what = f"{config} {variant} {shape}"
    if exact:
        assert_equal(d, reference.gemm(a, plain, bias, out_dtype, c=c, beta=0.37), what)
    else:
        cases.assert_within_bound(d, a, plain, bias, out_dtype, what, c, 0.37)
    assert bool(whole[:, n:].isnan().all()), f"{what}: wrote past its end"
    return True


@pytest.mark.parametrize("config, variant", cases.kernels(cases.FORCED_VARIANTS), ids=str)
def test_every_kernel(config: cases.Config, variant: cases.Variant, cuda: torch.device) -> None:
    served = 0
    for m in tokens_of(config):
        for n in NS:
            for k in KS:
                served += check_forced(config, variant, (m, n, k), cuda_device(cuda), exact=True)
    assert served >= len(NS) * len(KS)
    for m in tokens_of(config):
        for n, k in ((65, 272), (1000, 17), (4097, 4104)):
            check_forced(config, variant, (m, n, k), cuda_device(cuda), exact=False)


@pytest.mark.parametrize("config", [*cases.chosen_configs(), *cases.EXTRA_CONFIGS], ids=str)
def test_several_rounds_of_a_persistent_grid(config: cases.Config, cuda: torch.device) -> None:
    """More tiles than CTAs, several times over; and K of which some CTA or warp has nothing."""
    m = tokens_of(config)[-1]
    shapes = [(m, 20000, 136), (m, 33000, 8), (m, 9000, 1032), (m, 33000, 1032)]
    if config[0] != "mma":
        # More token tiles than pass over the rows together: an odd number of them, and 16.
        shapes += [(17 * m // 2, 3000, 72), (16 * (m // 2 - 1), 3072, 72)]
    served = [check_forced(config, cases.FORCED_VARIANTS[0], s, cuda_device(cuda), exact=True) for s in shapes]
    assert any(served)


@pytest.mark.parametrize("source", [False, True])
@pytest.mark.parametrize("cluster", [1, 2])
def test_tiles_whose_k_is_shared(cluster: int, source: bool, cuda: torch.device) -> None:
    """Fewer tiles than clusters, a few more, nearly another round; K of a block, and one that is hardly worth a cut.
    Memory is poisoned, launches on two streams run at once, and a graph is replayed: the same flags, and numbers."""
    device = cuda_device(cuda)
    spec = select.packed_of("stream_k", (128, 256, cluster), "bf16", "bf16", None, source)
    shapes = ((1, 8, 16), (300, 1000, 448), (256, 4096, 8192), (257, 136, 4104), (512, 20000, 2048), (700, 9000, 4096))
    for m, n, k in (*shapes, (1024, 16384, 1032), (3000, 3000, 64)):
        plain, packed = weight(n, k, True, device)
        inputs = [cases.exact_activations(m, k, torch.bfloat16, seed).to(device) for seed in (1, 2)]
        c = cases.exact_activations(m, n, torch.bfloat16, 3).to(device) if source else None
        wants = [reference.gemm(x, plain, c=c, beta=0.5) for x in inputs]
        results = [nan(m, n, dtype=torch.bfloat16, device=device) for _ in inputs]
        streams = [torch.cuda.Stream() for _ in inputs]
        torch.cuda.synchronize()
        with cases.filled_with_nan():
            for _ in range(3):
                for stream, x, d in zip(streams, inputs, results, strict=True):
                    with torch.cuda.stream(stream):
                        cases.force(spec, x, packed, None, c, 0.5, d)
        torch.cuda.synchronize()
        for d, want in zip(results, wants, strict=True):
            assert_equal(d, want, f"{m}x{n}x{k}, two streams")
        for x, want in zip(inputs, wants, strict=True):  # memory that the launch before has left
            cases.force(spec, x, packed, None, c, 0.5, results[0])
            assert_equal(results[0], want, f"{m}x{n}x{k}, again")
        graph, d = torch.cuda.CUDAGraph(), nan(m, n, dtype=torch.bfloat16, device=device)
        with torch.cuda.graph(graph):
            for x in inputs:
                cases.force(spec, x, packed, None, c, 0.5, d)
        for _ in range(3):
            d.fill_(float("nan"))
            graph.replay()
            assert_equal(d, wants[-1], f"{m}x{n}x{k}, graph")


def cuda_device(cuda: torch.device) -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if cuda.index is None else cuda


@pytest.mark.parametrize("out_dtype", TORCH_DTYPES.values())
@pytest.mark.parametrize("n", [4088, 4092, 4095])
@pytest.mark.parametrize("m", [1, 100, 1024])
def test_the_rest_of_wider_rows_is_left_alone(m: int, n: int, out_dtype: torch.dtype, device: torch.device) -> None:
    """Whole 16 bytes, a part of them, and an odd end; large products would be stored by TMA."""
    plain, packed = weight(n, 64, True, device)
    x, whole = activations(m, 64, torch.bfloat16, True, device), nan(m, 4096, dtype=out_dtype, device=device)
    fp4gemm.gemm(x, packed, out=whole[:, :n])
    assert_equal(whole[:, :n], reference.gemm(x, plain, out_dtype=out_dtype), f"{m} x {n}")
    assert bool(whole[:, n:].isnan().all())


# --- the identity, and every code -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ACTIVATIONS)
@pytest.mark.parametrize("m", [1, 7, 16, 33, 130, 257])
def test_identity_gives_activations(m: int, dtype: torch.dtype, device: torch.device) -> None:
    for k in (1, 16, 65, 272, 1000):
        eye = cases.identity(k).to(device).prepack()
        x = random_values(m, k, dtype=dtype, device=device)
        x[:, ::5] *= 2.0**-12  # subnormal, some of them, in fp16
        for out_dtype in (dtype, torch.float32):
            assert_equal(fp4gemm.gemm(x, eye, out_dtype=out_dtype), x.to(out_dtype), f"{m} x {k} to {out_dtype}")


@pytest.mark.parametrize("out_dtype", cases.DTYPES)
@pytest.mark.parametrize("shape", [(1, 16), (3, 17), (64, 64), (130, 136), (300, 257)])
def test_identity_gives_the_dequantized_operand(
    shape: tuple[int, int], out_dtype: torch.dtype, device: torch.device
) -> None:
    rows, k = shape
    t = reference.quantize(random_values(rows, k, dtype=torch.float32, device=device))
    want = reference.dequantize(t, out_dtype)
    eye = cases.identity(k, "8x4", "per_tensor").to(device)
    assert_equal(fp4gemm.gemm(t, eye.prepack(), out_dtype=out_dtype), want, f"{shape}: A . I")
    assert_equal(fp4gemm.gemm(eye, t.prepack(), out_dtype=out_dtype), want.t(), f"{shape}: I . B'")
    assert_equal(fp4gemm.gemm(eye.prepack(), t.prepack(), out_dtype=out_dtype), want.t(), f"{shape}: both prepacked")


@pytest.mark.parametrize("dtype", ACTIVATIONS)
@pytest.mark.parametrize("m", [2032, 100, 9])
def test_every_code_and_block_scale(m: int, dtype: torch.dtype, device: torch.device) -> None:
    """All 16 codes under all scale bytes 0..126, picked by tokens of a single 1: exact in every output type's range."""
    generator = torch.Generator().manual_seed(1)
    n, groups = 70, 127
    codes = torch.randint(0, 16, (n, 16 * groups), generator=generator, dtype=torch.uint8)
    codes[:16] = torch.arange(16, dtype=torch.uint8)[:, None]
    scales = torch.arange(groups, dtype=torch.uint8).expand(n, groups).contiguous()
    w = cases.packed(codes, scales, torch.ones(()), "linear").to(device)
    x = torch.eye(16 * groups, device=device, dtype=dtype)
    want = reference.dequantize(w).t()
    packed = w.prepack()
    for first in range(0, len(x), m):
        got = fp4gemm.gemm(x[first : first + m], packed, out_dtype=torch.float32)
        assert_equal(got, want[first : first + m], f"rows from {first}")


def test_a_nan_scale_spoils_its_column_only(device: torch.device) -> None:
    for m, dtype in ((1, torch.bfloat16), (5, torch.float16), (40, torch.bfloat16), (200, torch.float16)):
        w = cases.exact_operand(100, 528, "linear", "per_row", 1)
        scales = w.block_scale.view(torch.uint8).clone()
        scales[37, 20] = 0x7F
        w = FP4Tensor(w.data, scales.view(torch.float8_e4m3fn), w.outer_scale, w.shape, "linear").to(device)
        x = cases.exact_activations(m, 528, dtype, 2).to(device)
        got, want = fp4gemm.gemm(x, w.prepack()), reference.gemm(x, w)
        assert bool(got[:, 37].isnan().all())
        others = [n for n in range(100) if n != 37]
        assert_equal(got[:, others], want[:, others], f"M = {m}")


def test_nan_and_inf_tokens_spoil_their_rows_only(device: torch.device) -> None:
    for m in (6, 40, 300):
        x = cases.exact_activations(m, 272, torch.bfloat16, 1).to(device)
        clean = fp4gemm.gemm(x, weight(1000, 272, True, device)[1])
        x[2, 5], x[4, 200] = float("nan"), float("inf")
        got = fp4gemm.gemm(x, weight(1000, 272, True, device)[1])
        assert bool(got[2].isnan().all())
        assert not bool(got[4].isfinite().any())
        rows = [i for i in range(m) if i not in (2, 4)]
        assert_equal(got[rows], clean[rows], f"M = {m}")


# --- every M ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("M", range(1, 513))
def test_every_m_with_ragged_n_and_k(M: int, device: torch.device) -> None:
    rng = random.Random(1000 + M)
    N = rng.choice((1, 8 * rng.randint(1, 50), rng.randint(1, 700), 128 * rng.randint(1, 3)))
    K = rng.choice((16 * rng.randint(1, 60), rng.randint(1, 1500), 64 * rng.randint(1, 16), 8 * rng.randint(1, 90)))
    a_dtype, out_name, bias_name, source = variant = rng.choice(cases.PLAIN_VARIANTS)
    dtype, out_dtype = TORCH_DTYPES[a_dtype], TORCH_DTYPES[out_name]
    options: dict[str, object] = {"out_dtype": out_dtype, "column_major": rng.random() < 0.5}
    bias = None if bias_name is None else random_values(N, dtype=TORCH_DTYPES[bias_name], device=device)
    c = random_values(M, N, dtype=out_dtype, device=device) if source else None
    what = f"{M}x{N}x{K} {variant} {options}\n"
    what += cases.repro("test_engine_gpu.py::test_every_m_with_ragged_n_and_k", M)

    x = cases.exact_activations(M, K, dtype, M).to(device)
    w = cases.exact_operand(N, K, rng.choice(LAYOUTS), rng.choice(("per_row", "per_tensor")), M).to(device)
    want = reference.gemm(x, w, bias, out_dtype, c=c, beta=-1.5)
    cases.poison(device, want.numel() * want.element_size())
    got = fp4gemm.gemm(x, w.prepack(), bias, c=c, beta=-1.5, **options)
    assert got.stride() == ((1, M) if options["column_major"] else (N, 1))
    assert_equal(got, want, what)
    assert_equal(fp4gemm.gemm(x, w, bias, c=c, beta=-1.5, **options), want, f"not prepacked: {what}")

    x, w = random_values(M, K, dtype=dtype, device=device), reference.quantize(w.dequantize() + 0.1)
    got = fp4gemm.gemm(x, w.prepack(), bias, c=c, beta=-1.5, **options)
    cases.assert_within_bound(got, x, w, bias, out_dtype, what, c, -1.5)


@pytest.mark.parametrize("shape", [(0, 32, 64), (8, 0, 64), (8, 24, 0), (0, 0, 0), (0, 24, 0)])
def test_empty(shape: tuple[int, int, int], device: torch.device) -> None:
    M, N, K = shape
    w = reference.quantize(torch.zeros(N, K)).to(device)
    for dtype in ACTIVATIONS:
        x, c = torch.zeros(M, K, dtype=dtype, device=device), torch.ones(M, N, dtype=dtype, device=device)
        for b in (w, w.prepack()):
            out = nan(M, N, dtype=dtype, device=device)
            assert fp4gemm.gemm(x, b, out=out) is out
            assert bool((out == 0).all())
            assert bool((fp4gemm.gemm(x, b, torch.full((N,), 2.0, device=device), c=c, beta=3.0) == 5).all())


# --- operands as they come --------------------------------------------------------------------------------------------


def views(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The values of x [M, K], bf16 or fp16, at other strides and alignments."""
    m, k = x.shape
    wide = torch.full((m, k + 13), float("nan"), dtype=x.dtype, device=x.device)
    wide[:, 3 : 3 + k] = x
    padded = torch.full((m, -(-k // 8) * 8 + 8), float("nan"), dtype=x.dtype, device=x.device)
    padded[:, :k] = x
    shifted = torch.full((m * k + 1,), float("nan"), dtype=x.dtype, device=x.device)
    shifted[1:] = x.flatten()
    every_second = torch.full((2 * m, k), float("nan"), dtype=x.dtype, device=x.device)
    every_second[::2] = x
    return {
        "whole": x,
        "transposed": x.t().contiguous().t(),
        "slice of columns": wide[:, 3 : 3 + k],
        "rows of whole 16 bytes": padded[:, :k],
        "misaligned": shifted[1:].view(m, k),
        "every second row": every_second[::2],
        "every second column": torch.stack((x, x + 1), dim=-1)[..., 0],
    }


@pytest.mark.parametrize("dtype", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(1, 70, 64), (5, 1000, 272), (40, 65, 17), (130, 200, 100), (300, 136, 1001)])
def test_activations_of_any_strides(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> None:
    m, n, k = shape
    plain, packed = weight(n, k, True, device)
    x = cases.exact_activations(m, k, dtype, 1).to(device)
    want = reference.gemm(x, plain)
    for name, view in views(x).items():
        assert torch.equal(view, x), name
        assert_equal(fp4gemm.gemm(view, packed), want, f"{name} {view.stride()}")


@pytest.mark.parametrize("m", [4, 16, 40, 300])
def test_rows_that_overlap(m: int, device: torch.device) -> None:
    """One token for all rows, and windows of a signal: no TMA descriptor allows strides below a row."""
    plain, packed = weight(200, 64, True, device)
    x = cases.exact_activations(1, 64, torch.bfloat16, 1).to(device).expand(m, 64)
    assert_equal(fp4gemm.gemm(x, packed), reference.gemm(x, plain), "expanded")
    signal = cases.exact_activations(1, 64 + 8 * m, torch.bfloat16, 1).to(device).flatten()
    x = signal.as_strided((m, 64), (8, 1))
    assert_equal(fp4gemm.gemm(x, packed), reference.gemm(x, plain), "windows")


@pytest.mark.parametrize("m", [3, 40, 300])
def test_weights_that_start_anywhere(m: int, device: torch.device) -> None:
    """The packed bytes of a slice of a file, and its outer scales, bias and outputs one element into a buffer."""
    plain, packed = weight(200, 272, True, device)
    x = cases.exact_activations(m, 272, torch.bfloat16, 1).to(device)
    bias = random_values(200, dtype=torch.bfloat16, device=device)
    want = reference.gemm(x, plain, bias)

    def moved(t: torch.Tensor) -> torch.Tensor:
        buffer = torch.zeros(t.numel() + 1, dtype=t.dtype, device=device)
        buffer[1:] = t.flatten()
        return buffer[1:].view(t.shape)

    w = FP4Tensor(moved(packed.data), packed.block_scale, moved(packed.outer_scale), packed.shape, "linear", "sm90")
    out = moved(nan(m, 200, dtype=torch.bfloat16, device=device))
    fp4gemm.gemm(x, w, moved(bias), out=out)
    assert_equal(out, want, "one element into a buffer")


@pytest.mark.parametrize("out_dtype", cases.DTYPES)
@pytest.mark.parametrize("shape", [(1, 70, 64), (7, 33, 272), (40, 65, 48), (130, 201, 100), (300, 136, 1001)])
def test_outputs(shape: tuple[int, int, int], out_dtype: torch.dtype, device: torch.device) -> None:
    """`out` whole, as a slice, column-major, and with odd leading dimensions; what is around it stays as it was."""
    m, n, k = shape
    plain, packed = weight(n, k, True, device)
    x = cases.exact_activations(m, k, torch.bfloat16, 1).to(device)
    bias = random_values(n, dtype=torch.bfloat16, device=device)
    c = random_values(m, n, dtype=out_dtype, device=device)
    want = reference.gemm(x, plain, out_dtype=out_dtype)
    with_c = reference.gemm(x, plain, bias, out_dtype, c=c, beta=0.7)

    def outs() -> list[tuple[str, torch.Tensor, torch.Tensor]]:
        whole = nan(m, n, dtype=out_dtype, device=device)
        wide = nan(m + 2, n + 3, dtype=out_dtype, device=device)
        tall = nan(m + 3, n + 2, dtype=out_dtype, device=device, column_major=True)
        column = nan(m, n, dtype=out_dtype, device=device, column_major=True)
        return [
            ("whole", whole, whole),
            ("slice", wide, wide[1 : m + 1, 1 : n + 1]),
            ("column-major", column, column),
            ("column-major slice", tall, tall[1 : m + 1, 1 : n + 1]),
        ]

    for name, everything, out in outs():
        assert fp4gemm.gemm(x, packed, out=out) is out
        assert_equal(out, want, name)
        assert int(everything.isnan().sum()) == everything.numel() - out.numel(), f"{name}: wrote past its end"
    for name, everything, out in outs():
        fp4gemm.gemm(x, packed, bias, c=c, beta=0.7, out=out)
        assert_equal(out, with_c, f"{name}, C elsewhere")
        assert int(everything.isnan().sum()) == everything.numel() - out.numel(), f"{name}: wrote past its end"
    for name, _, out in outs():
        out.copy_(c)
        fp4gemm.gemm(x, packed, bias, c=out, beta=0.7, out=out)
        assert_equal(out, with_c, f"{name}, in place")
    assert_equal(fp4gemm.gemm(x, packed, out_dtype=out_dtype, column_major=True), want, "column_major")
    column = fp4gemm.gemm(x, packed, bias, c=c.t().contiguous().t(), beta=0.7, out_dtype=out_dtype)
    assert_equal(column, with_c, "C of other strides than D")


def test_accumulation_over_parts_of_k(device: torch.device) -> None:
    """`c=out` adds up products, as tensor-parallel ranks and split K do."""
    x = cases.exact_activations(33, 512, torch.float16, 1).to(device)
    ones = torch.ones((), device=device)
    w = cases.exact_operand(200, 512, "linear", "per_tensor", 2).to(device)
    w = FP4Tensor(w.data, w.block_scale, ones, w.shape, "linear")
    out = fp4gemm.gemm(x[:, :256], part(w, 0, 256), out_dtype=torch.float32)
    fp4gemm.gemm(x[:, 256:], part(w, 256, 512), c=out, out=out)
    assert_equal(out, fp4gemm.gemm(x, w.prepack(), out_dtype=torch.float32), "two halves of K")


def part(w: FP4Tensor, first: int, last: int) -> FP4Tensor:
    """Columns of a weight in the linear layout, prepacked."""
    data, scales = w.data[:, first // 2 : last // 2], w.block_scale[:, first // 16 : last // 16]
    shape = (w.rows, last - first)
    return FP4Tensor(data.contiguous(), scales.contiguous(), w.outer_scale, shape, "linear").prepack()


def test_uninitialized_memory_never_shows(device: torch.device) -> None:
    """Output and every scratch buffer, padded rows and columns included, start as NaN."""
    for m, n, k in ((1, 8, 16), (5, 3, 17), (130, 257, 72), (64, 128, 1000), (300, 70, 33)):
        plain, packed = weight(n, k, True, device)
        for dtype in ACTIVATIONS:
            x = cases.exact_activations(m, k, dtype, 3).to(device)
            want = reference.gemm(x, plain)
            with cases.filled_with_nan():
                assert_equal(fp4gemm.gemm(x, packed), want, f"{m}x{n}x{k}")
                assert_equal(fp4gemm.gemm(x, plain), want, f"{m}x{n}x{k}, not prepacked")


# --- quantize_gemm ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("given", ["no", "scalar", "rows"])
@pytest.mark.parametrize("shape", [(1, 256, 512), (7, 33, 50), (16, 1000, 2048), (129, 130, 272), (300, 512, 8208)])
def test_quantize_gemm_is_gemm_of_quantize(
    shape: tuple[int, int, int], given: str, dtype: torch.dtype, device: torch.device
) -> None:
    m, n, k = shape
    x, bias = random_values(m, k, dtype=dtype, device=device), random_values(n, dtype=dtype, device=device)
    plain, packed = weight(n, k, False, device)
    outer = {"no": None, "scalar": torch.tensor(1 / 512), "rows": torch.linspace(1e-3, 1e-2, m)}[given]
    outer = None if outer is None else outer.to(device)
    quantized = fp4gemm.quantize(x, outer_scale=outer)
    for b in (None, bias):
        want = fp4gemm.gemm(quantized, packed, b, out_dtype=dtype)
        got = fp4gemm.quantize_gemm(x, packed, b, outer_scale=outer)
        cases.assert_same_bits(got, want, f"bias {b is not None}")
        got = fp4gemm.quantize_gemm(x, plain, b, outer_scale=outer)
        cases.assert_same_bits(got, want, f"not prepacked, bias {b is not None}")
        if k < 4096:
            cases.assert_within_bound(want, quantized, plain, b, dtype, f"bias {b is not None}")


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("m", [1, 2, 3, 7, 8, 9, 15, 16])
def test_quantization_inside_the_kernel(m: int, dtype: torch.dtype, device: torch.device) -> None:
    """A few rows with given outer scales: NaN and Inf, scales that underflow or saturate, and every end of K."""
    for n, k in ((64, 16), (200, 272), (1000, 2064), (4096, 4096), (8200, 1040)):
        _, packed = weight(n, k, False, device)
        x = random_values(m, k, dtype=dtype, device=device)
        x[0, k // 2], x[m // 2, 3], x[m - 1, k - 1] = float("nan"), float("inf"), float("-inf")
        x[m // 2, :16] = 0
        rows = torch.logspace(-12, 4, m).to(device)
        rows[m // 3] = 1e-39  # subnormal: its reciprocal overflows
        for outer in (rows, torch.tensor(1 / 512, device=device), torch.tensor(0.0, device=device)):
            want = fp4gemm.gemm(fp4gemm.quantize(x, outer_scale=outer), packed, out_dtype=torch.float32)
            with cases.filled_with_nan():
                got = fp4gemm.quantize_gemm(x, packed, out_dtype=torch.float32, outer_scale=outer)
            cases.assert_same_bits(got, want, f"{m}x{n}x{k} {dtype} {tuple(outer.shape)}")


# --- the same bits, always --------------------------------------------------------------------------------------------

MANY = ((1, 4096, 4096), (8, 1000, 2048), (16, 4096, 14336), (33, 4096, 4096), (100, 6144, 4096), (300, 4097, 1032))


@pytest.mark.parametrize("shape", MANY)
def test_identical_run_to_run(shape: tuple[int, int, int], cuda: torch.device) -> None:
    """Partial sums meet in a fixed order. The values are not exactly summable, so another order would show."""
    m, n, k = shape
    x, (_, packed) = random_values(m, k, dtype=torch.bfloat16, device=cuda), weight(n, k, False, cuda)
    want = fp4gemm.gemm(x, packed, out_dtype=torch.float32)
    for _ in range(10):
        cases.assert_same_bits(fp4gemm.gemm(x, packed, out_dtype=torch.float32), want, f"{shape}")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fp4gemm.gemm(x, packed, out_dtype=torch.float32)
    for _ in range(3):
        out.fill_(float("nan"))
        graph.replay()
        cases.assert_same_bits(out, want, f"{shape}, graph")


def layers(m: int, device: torch.device, prepacked: bool = True) -> list[FP4Tensor]:
    sizes = (512, 1024, 264, 2048, 136, 512)
    made = [weight(n, k, False, device)[prepacked] for k, n in pairwise(sizes)]
    scale = torch.full((), 0.02, device=device)
    return [FP4Tensor(w.data, w.block_scale, scale, w.shape, w.sf_layout, w.prepacked) for w in made]


def chain(x: torch.Tensor, weights: list[FP4Tensor], quantized: bool) -> torch.Tensor:
    for w in weights:
        x = fp4gemm.quantize_gemm(x, w) if quantized else fp4gemm.gemm(x, w)
    return x


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("m", [1, 8, 16, 40, 130, 300])
def test_dependent_layers(m: int, quantized: bool, cuda: torch.device) -> None:
    """Five layers, each of which begins before the last has ended, eagerly and in a graph."""
    weights, x = layers(m, cuda), random_values(m, 512, dtype=torch.bfloat16, device=cuda)
    want = chain(x, weights, quantized)
    assert bool(want.isfinite().all())
    with launch.programmatic():
        for _ in range(10):
            cases.poison(cuda, *(m * w.rows * 2 for w in weights))
            cases.assert_same_bits(chain(x, weights, quantized), want, f"M = {m}")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = chain(x, weights, quantized)
    for seed in range(3):
        x.copy_(random_values(m, 512, dtype=torch.bfloat16, device=cuda, seed=seed))
        graph.replay()
        replayed = out.clone()
        cases.assert_same_bits(replayed, chain(x, weights, quantized), f"M = {m}, graph, seed {seed}")


@pytest.mark.parametrize("m", [1, 16, 130])
def test_dependent_layers_that_pack_their_weights(m: int, cuda: torch.device) -> None:
    """A weight packed by the kernel in front of the GEMM must not be fetched before it is there."""
    x = random_values(m, 512, dtype=torch.bfloat16, device=cuda)
    want = chain(x, layers(m, cuda), False)
    plain = layers(m, cuda, prepacked=False)
    with launch.programmatic():
        for _ in range(20):
            cases.poison(cuda, *(w.prepack().data.numel() for w in plain))
            cases.assert_same_bits(chain(x, plain, False), want, f"M = {m}")


def refill(how: str, x: torch.Tensor, source: torch.Tensor) -> None:
    """x becomes source: by a copy, a kernel, a memset and a kernel, or a kernel on another stream."""
    if how == "copy":
        x.copy_(source)
    elif how == "kernel":
        torch.add(source, 0, out=x)
    elif how == "memset":
        x.zero_()
        x.add_(source)
    else:
        here, other = torch.cuda.current_stream(), torch.cuda.Stream()
        other.wait_stream(here)
        with torch.cuda.stream(other):
            torch.add(source, 0, out=x)
        here.wait_stream(other)


@pytest.mark.parametrize("how", ["copy", "kernel", "memset", "stream"])
@pytest.mark.parametrize("m, n", [(1, 512), (16, 512), (64, 512), (300, 512), (2048, 4096)])
def test_a_gemm_that_begins_early_waits_for_its_weight(m: int, n: int, how: str, cuda: torch.device) -> None:
    """Every GEMM is launched before what stands in front of it has ended; that may write its weight, in place."""
    k = 4096
    sources = [
        fp4gemm.quantize(random_values(n, k, dtype=torch.bfloat16, device=cuda, seed=seed)).prepack()
        for seed in range(3)
    ]
    x = random_values(m, k, dtype=torch.bfloat16, device=cuda)
    want = [fp4gemm.gemm(x, source) for source in sources]
    assert not torch.equal(want[0], want[1])
    first = sources[0]
    scales = first.block_scale, first.outer_scale.clone()
    w = FP4Tensor(first.data.clone(), *scales, first.shape, first.sf_layout, first.prepacked)
    for source, expected in zip(sources * 5, want * 5, strict=True):
        w.outer_scale.copy_(source.outer_scale)
        refill(how, w.data, source.data)
        cases.assert_same_bits(fp4gemm.gemm(x, w), expected, f"M = {m}, {how}")
    held = first.data.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        refill(how, w.data, held)
        got = fp4gemm.gemm(x, w)
    for source, expected in zip(sources, want, strict=True):
        w.outer_scale.copy_(source.outer_scale)
        held.copy_(source.data)
        graph.replay()
        cases.assert_same_bits(got, expected, f"M = {m}, {how}, graph")


def packed_as_bf16(n: int, k: int, device: torch.device, seed: int) -> torch.Tensor:
    """The bytes of a prepacked weight as bf16 [blocks, 1152], -1.5 to -2^-63, which the identity keeps."""
    rows, blocks, size = packed_shape(n, k)
    words = random_values(rows * blocks, size // 2, dtype=torch.bfloat16, device=device, seed=seed).view(torch.int16)
    # Bytes 0xA0 to 0xBF: two codes each, or a scale of 0.25 to 3.75.
    return (words & 0x1F1F | -0x5F60).view(torch.bfloat16)


@pytest.mark.parametrize("m, n", [(1, 512), (16, 512), (64, 512), (300, 512), (2048, 4096)])
def test_a_gemm_waits_for_the_gemm_that_writes_its_weight(m: int, n: int, cuda: torch.device) -> None:
    """Every GEMM lets the next one begin long before it writes D; here D are the bytes of the next one's weight."""
    k = 4096
    sources = [packed_as_bf16(n, k, cuda, seed) for seed in range(3)]
    held, written = sources[0].clone(), torch.empty_like(sources[0])
    one, empty = torch.ones((), device=cuda), torch.empty(0, dtype=torch.float8_e4m3fn, device=cuda)

    def packed(data: torch.Tensor) -> FP4Tensor:
        return FP4Tensor(data.view(torch.uint8).view(packed_shape(n, k)), empty, one, (n, k), prepacked="sm90")

    eye = cases.identity(written.shape[1]).to(cuda).prepack()
    x = random_values(m, k, dtype=torch.bfloat16, device=cuda)
    want = [fp4gemm.gemm(x, packed(source)) for source in sources]
    assert not torch.equal(want[0], want[1])
    fp4gemm.gemm(held, eye, out=written)
    assert torch.equal(written, held)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fp4gemm.gemm(held, eye, out=written)
        got = fp4gemm.gemm(x, packed(written))
    for i in (1, 2, 0) * 3:  # never the one that is there
        held.copy_(sources[i])
        graph.replay()
        cases.assert_same_bits(got, want[i], f"M = {m}")


@pytest.mark.parametrize("how", ["copy", "kernel", "memset", "stream"])
@pytest.mark.parametrize("m", [1, 16, 64, 128, 300])
def test_a_quantizer_that_begins_early_waits_for_its_input(m: int, how: str, cuda: torch.device) -> None:
    """Whatever stands in front of it, eagerly and in a graph: a quantizer of few CTAs is launched before that has
    ended, and x, refilled in place, is what it must see."""
    k = 4096
    packed = weight(512, k, False, cuda)[1]
    sources = [random_values(m, k, dtype=torch.bfloat16, device=cuda, seed=seed) for seed in range(4)]
    want = [fp4gemm.quantize_gemm(source, packed) for source in sources]
    x = torch.zeros_like(sources[0])
    for source, expected in zip(sources * 5, want * 5, strict=True):
        refill(how, x, source)
        cases.assert_same_bits(fp4gemm.quantize_gemm(x, packed), expected, f"M = {m}, {how}")
    held = sources[0].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        refill(how, x, held)
        first = fp4gemm.quantize_gemm(x, packed)
        refill(how, x, held * 2)
        second = fp4gemm.quantize_gemm(x, packed)
    for source, expected in zip(sources, want, strict=True):
        held.copy_(source)
        graph.replay()
        cases.assert_same_bits(first, expected, f"M = {m}, {how}, graph")
        # Outer scales double exactly, and so do products.
        cases.assert_same_bits(second, expected * 2, f"M = {m}, {how}, graph, twice x")


def test_two_streams_at_once(cuda: torch.device) -> None:
    """They share plans, whose argument each launch writes."""
    for m in (8, 40, 300):
        packed = weight(4097, 1032, False, cuda)[1]
        inputs = [random_values(m, 1032, dtype=torch.bfloat16, device=cuda, seed=seed) for seed in range(2)]
        want = [fp4gemm.gemm(x, packed) for x in inputs]
        streams = [torch.cuda.Stream() for _ in inputs]
        torch.cuda.synchronize()
        got: list[list[torch.Tensor]] = [[], []]
        for _ in range(20):
            for stream, x, results in zip(streams, inputs, got, strict=True):
                with torch.cuda.stream(stream):
                    results.append(fp4gemm.gemm(x, packed))
        torch.cuda.synchronize()
        for expected, results in zip(want, got, strict=True):
            for result in results:
                cases.assert_same_bits(result, expected, f"M = {m}")


def test_two_devices(cuda: torch.device) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two CUDA devices, found {torch.cuda.device_count()}")
    for index in (1, 0, 1):
        device = torch.device("cuda", index)
        for m in (5, 140):
            plain, packed = weight(264, 144, True, device)
            x = cases.exact_activations(m, 144, torch.bfloat16, 1).to(device)
            assert_equal(fp4gemm.gemm(x, packed), reference.gemm(x, plain), f"device {index}")
        assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("m", [5, 130])
def test_compiled(m: int, device: torch.device) -> None:
    _, packed = weight(200, 272, False, device)
    x = random_values(m, 272, dtype=torch.bfloat16, device=device)

    def layer(x: torch.Tensor, w: FP4Tensor, out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        fp4gemm.gemm(x, w, out=out)
        return fp4gemm.gemm(x + 1, w, c=out, beta=0.5), fp4gemm.quantize_gemm(x, w)

    out = nan(m, 200, dtype=torch.bfloat16, device=device)
    got = torch.compile(layer, fullgraph=True, backend="aot_eager")(x, packed, out)
    cases.assert_same_bits(out, fp4gemm.gemm(x, packed), "out")
    for one, other in zip(got, layer(x, packed, torch.empty_like(out)), strict=True):
        cases.assert_same_bits(one, other, "compiled")

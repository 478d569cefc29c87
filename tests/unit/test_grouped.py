"""GroupedWeight, the grouped operators on the CPU, their errors, and the rule that chooses a kernel."""

import copy
import io
import pickle

import pytest
import torch
from torch.utils import _pytree as pytree

import fp4gemm
from fp4gemm import FP4Batch, GroupedWeight, reference, select
from fp4gemm.bench import routing
from fp4gemm.division import SHARED_BYTES, divide
from fp4gemm.grouped_ops import mean_tokens
from fp4gemm.spec import check

E, N, K = 3, 40, 48


def make(scaling: str = "per_row", experts: int = E) -> tuple[list[fp4gemm.FP4Tensor], GroupedWeight]:
    generator = torch.Generator().manual_seed(0)
    plain = [fp4gemm.quantize(torch.randn(N, K, generator=generator), scaling=scaling) for _ in range(experts)]
    return plain, fp4gemm.stack_weights(plain)


def tokens(count: int = 20, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(count, K, generator=torch.Generator().manual_seed(1)).to(dtype)


OFFSETS = torch.tensor([0, 3, 3, 20])


@pytest.mark.parametrize("scaling", ["per_row", "per_tensor"])
def test_stacked_weights_are_the_prepacked_ones(scaling):
    plain, w = make(scaling)
    assert (w.shape, w.experts, w.rows, w.k, w.device) == ((E, N, K), E, N, K, torch.device("cpu"))
    assert tuple(w.outer_scale.shape) == ((E, N) if scaling == "per_row" else (E,))
    for e, t in enumerate(plain):
        one = w.expert(e)
        assert torch.equal(one.data, t.prepack().data)
        assert torch.equal(one.dequantize(), t.dequantize())
        assert one.data.data_ptr() == w.data[e].data_ptr()
    assert w.nbytes == sum(w.expert(e).nbytes for e in range(E))
    assert repr(w) == f"GroupedWeight(shape=(3, 40, 48), scaling={scaling}, device=cpu, {w.nbytes} B)"


def test_it_is_saved_and_loaded():
    w, buffer = fp4gemm.stack_weights([fp4gemm.quantize(torch.randn(24, 48)) for _ in range(3)]), io.BytesIO()
    torch.save(w, buffer)
    buffer.seek(0)
    for other in (torch.load(buffer, weights_only=True), copy.deepcopy(w), pickle.loads(pickle.dumps(w))):
        assert other.shape == w.shape
        assert torch.equal(other.data, w.data)
        assert torch.equal(other.outer_scale, w.outer_scale)


def test_a_pytree_that_compiles():
    _, w = make()
    leaves, spec = pytree.tree_flatten(w)
    assert [leaf is t for leaf, t in zip(leaves, (w.data, w.outer_scale), strict=True)] == [True, True]
    assert pytree.tree_unflatten(leaves, spec).shape == w.shape
    assert w.to("cpu").data is w.data

    def both(x, w, offsets):
        return fp4gemm.gemm_grouped(x, w, offsets), fp4gemm.quantize_gemm_grouped(x, w, offsets)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(tokens(), w, OFFSETS), both(tokens(), w, OFFSETS), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("quantized", [False, True])
def test_each_expert_is_a_gemm_of_its_own(quantized):
    plain, w = make()
    x, bias = tokens(), torch.randn(E, N)
    c = torch.randn(20, N)
    a = fp4gemm.quantize(x) if quantized else x
    got = fp4gemm.gemm_grouped(a, w, OFFSETS, bias, out_dtype=torch.float32, c=c, beta=0.5)
    for e, rows in enumerate((slice(0, 3), slice(3, 3), slice(3, 20))):
        part = fp4gemm.quantize(x[rows]) if quantized else x[rows]
        want = fp4gemm.gemm(part, plain[e], bias[e], out_dtype=torch.float32, c=c[rows], beta=0.5)
        torch.testing.assert_close(got[rows], want)


def test_quantize_gemm_grouped_is_gemm_grouped_of_quantize():
    _, w = make()
    x = tokens()
    assert torch.equal(
        fp4gemm.quantize_gemm_grouped(x, w, OFFSETS),
        fp4gemm.gemm_grouped(fp4gemm.quantize(x), w, OFFSETS, out_dtype=x.dtype),
    )
    both = torch.cat((x, x), 1)
    assert torch.equal(
        fp4gemm.quantize_gemm_grouped(both, w, OFFSETS, producer="silu_mul", outer_scale=torch.tensor(1e-3)),
        fp4gemm.gemm_grouped(fp4gemm.quantize(both, producer="silu_mul", outer_scale=torch.tensor(1e-3)), w, OFFSETS),
    )


def test_rows_of_no_expert_are_left_alone():
    _, w = make()
    out = torch.full((20, N), float("nan"), dtype=torch.bfloat16)
    fp4gemm.gemm_grouped(tokens(), w, torch.tensor([2, 3, 3, 11]), out=out)
    assert bool(out[2:11].isfinite().all())
    assert bool(out[:2].isnan().all())
    assert bool(out[11:].isnan().all())


@pytest.mark.parametrize("scaling", ["per_row", "per_tensor"])
@pytest.mark.parametrize("prepacked", [False, True])
def test_a_batch_is_a_weight_of_experts(scaling, prepacked):
    plain, w = make(scaling)
    batch = FP4Batch.stack(plain)
    batch = batch.prepack() if prepacked else batch
    x, bias = tokens(), torch.randn(E, N)

    def both(x, w):
        return fp4gemm.gemm_grouped(x, w, OFFSETS, bias), fp4gemm.quantize_gemm_grouped(x, w, OFFSETS, bias)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for of_batch, through_dispatcher, want in zip(both(x, batch), compiled(x, batch), both(x, w), strict=True):
        assert torch.equal(of_batch, want)
        assert torch.equal(through_dispatcher, want)
    out = torch.zeros(20, N)
    assert torch.equal(
        fp4gemm.gemm_grouped(x, batch, OFFSETS, out=out), fp4gemm.gemm_grouped(x, w, OFFSETS, out_dtype=torch.float32)
    )


def test_a_batch_of_too_many():
    one = fp4gemm.quantize(torch.ones(1, 16))
    parts = (t.expand(1025, *t.shape).contiguous() for t in (one.data, one.block_scale, one.outer_scale))
    with pytest.raises(ValueError, match="w: expected at most 1024 experts, got 1025"):
        fp4gemm.gemm_grouped(torch.ones(1, 16).bfloat16(), FP4Batch(*parts, (1025, 1, 16)), torch.zeros(1026).long())


WRONG = (
    (
        {"x": torch.zeros(20, K)},
        TypeError,
        "x: expected an FP4Tensor, or a bf16 or fp16 tensor, got dtype torch.float32",
    ),
    ({"x": tokens()[:, :40]}, ValueError, r"x: expected shape \[T, K\] with K = 48"),
    ({"w": None}, TypeError, "w: expected a GroupedWeight, as stack_weights makes it, or an FP4Batch, got NoneType"),
    ({"offsets": OFFSETS.int()}, TypeError, "offsets: expected dtype torch.int64, got torch.int32"),
    ({"offsets": OFFSETS[1:]}, ValueError, r"offsets: expected shape \[4\] .*, got \[3\]"),
    ({"offsets": [0, 3, 3, 20]}, TypeError, "offsets: expected a torch.Tensor, got list"),
    ({"offsets": OFFSETS.to("meta")}, ValueError, "offsets: expected device cpu"),
    (
        {"offsets": torch.tensor([0, 3, 2, 20])},
        ValueError,
        r"offsets: expected values that do not decrease, .* \[0, 3, 2",
    ),
    ({"offsets": torch.tensor([0, 3, 3, 21])}, ValueError, "offsets: .* from 0 to T = 20"),
    ({"offsets": torch.tensor([-1, 3, 3, 20])}, ValueError, "offsets: .* from 0 to T = 20"),
    ({"bias": torch.zeros(N)}, ValueError, r"bias: expected shape \[3, 40\]"),
    ({"bias": torch.zeros(E, N).double()}, TypeError, "bias.dtype"),
    ({"out_dtype": torch.float64}, TypeError, "out_dtype"),
    ({"tokens": 0}, ValueError, "tokens: expected None or an int >= 1, got 0"),
    ({"c": torch.zeros(20, N)}, TypeError, "c: expected dtype torch.bfloat16"),
    ({"out": torch.zeros(19, N).bfloat16()}, ValueError, r"out: expected shape \[20, 40\]"),
    ({"out": torch.zeros(N, 20).bfloat16().t()}, ValueError, "out: expected contiguous rows"),
)


@pytest.mark.parametrize("changes, error, message", WRONG)
def test_wrong_arguments(changes, error, message):
    arguments = {"x": tokens(), "w": make()[1], "offsets": OFFSETS} | changes
    with pytest.raises(error, match=message):
        fp4gemm.gemm_grouped(**arguments)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        *(case for case in WRONG if next(iter(case[0])) not in ("x", "c", "out")),
        ({"x": tokens()[:, :40]}, ValueError, r"x: expected shape \[T, K\] with K = 48"),
        ({"x": tokens(), "producer": "silu_mul"}, ValueError, "K = 48 .*twice for silu_mul.*, got"),
        ({"x": tokens().double()}, TypeError, "x.dtype"),
        ({"outer_scale": torch.zeros(3)}, ValueError, "outer_scale"),
    ],
)
def test_wrong_arguments_of_the_quantizing_one(changes, error, message):
    arguments = {"x": tokens(), "w": make()[1], "offsets": OFFSETS} | changes
    with pytest.raises(error, match=message):
        fp4gemm.quantize_gemm_grouped(**arguments)


def test_weights_that_do_not_fit():
    plain, w = make()
    other = fp4gemm.quantize(torch.randn(N, K + 16))
    with pytest.raises(ValueError, match=r"weights\[3\]: expected shape \(40, 48\)"):
        fp4gemm.stack_weights([*plain, other])
    with pytest.raises(ValueError, match=r"weights\[1\]: expected scaling per_row"):
        fp4gemm.stack_weights([plain[0], make("per_tensor")[0][1]])
    with pytest.raises(TypeError, match=r"weights\[1\]: expected an FP4Tensor, got Tensor"):
        fp4gemm.stack_weights([plain[0], torch.zeros(N, K)])
    with pytest.raises(ValueError, match="weights: expected 1 to 1024"):
        fp4gemm.stack_weights([])
    with pytest.raises(ValueError, match=r"shape: expected \(E, N, K\)"):
        GroupedWeight(w.data, w.outer_scale, (N, K))
    with pytest.raises(ValueError, match="data: expected shape"):
        GroupedWeight(w.data[1:], w.outer_scale, w.shape)
    with pytest.raises(TypeError, match="outer_scale: expected dtype"):
        GroupedWeight(w.data, w.outer_scale.double(), w.shape)
    with pytest.raises(ValueError, match="data: expected a contiguous"):
        GroupedWeight(w.data.transpose(0, 3).contiguous().transpose(0, 3), w.outer_scale, w.shape)


# --- the choice of a kernel -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", select.grouped_configs(), ids=str)
@pytest.mark.parametrize("panels", [1, 6, 7, 8, 13, 64, 229])
def test_division_of_a_grouped_product(config, panels):
    spec = select.grouped_spec(132, 8, 1, 64, 64, "bf16", "bf16", None, False)
    spec = type(spec)("sm_90a", "bf16", "bf16", None, False, *config, grouped=True)
    division = divide(spec, 1000, 64 * panels, 4096, 132, 9)
    row_tiles, token_tiles, raster, *rest = division.numbers
    assert (token_tiles, rest) == (0, [0] * 8)
    assert raster >= 1
    if not spec.uneven:  # else the device cuts: tests/emulated walks its tiles
        assert (row_tiles - 1) * spec.multicast * spec.panels < panels <= row_tiles * spec.multicast * spec.panels
    cluster = spec.multicast * spec.split
    assert division.ctas % cluster == 0
    assert cluster <= division.ctas <= 132
    assert division.shared_bytes <= SHARED_BYTES


def test_a_few_tokens_have_a_few_ctas():
    spec = select.grouped_spec(132, 128, 1, 64, 64, "bf16", "bf16", None, False)
    assert divide(spec, 3, 64, 64, 132, 128).ctas <= 3 * spec.multicast * spec.split


@pytest.mark.parametrize("experts", [1, 8, 1024])
@pytest.mark.parametrize("tokens_", [1, 8, 9, 17, 65, 200, 5000])
@pytest.mark.parametrize("terms", [("bf16", None, False), ("fp32", "fp32", True), ("fp32", "bf16", False)])
def test_the_rule_serves_everything(experts, tokens_, terms):
    spec = select.grouped_spec(132, experts, tokens_, 1000, 4096, "bf16", *terms)
    assert check(spec) is None
    assert spec.grouped
    assert divide(spec, experts * tokens_, 1000, 4096, 132, experts) is not None
    assert spec.config in select.grouped_configs()


def test_more_tokens_have_larger_tiles():
    tiles = [select.grouped_spec(132, 8, t, 14336, 4096, "bf16", "bf16", None, False).tokens for t in (1, 16, 64, 4096)]
    assert tiles == sorted(tiles)
    assert tiles[0] < tiles[-1]


@pytest.mark.parametrize("n, panels, split", [(14336, 7, 1), (2048, 4, 1), (128, 1, 2)])
def test_fewer_rows_have_smaller_tiles_then_share_k(n, panels, split):
    spec = select.grouped_spec(132, 8, 16, n, 4096, "bf16", "bf16", None, False)
    assert (spec.tokens, spec.panels, spec.split) == (48, panels, split)


def test_the_mean_of_tokens():
    assert [mean_tokens(total, 8) for total in (0, 1, 8, 9, 80)] == [1, 1, 1, 2, 10]


@pytest.mark.parametrize("name", routing.ROUTINGS)
@pytest.mark.parametrize("experts, total", [(8, 128), (64, 64), (64, 100_000), (1, 5), (8, 0)])
def test_routings_give_all_tokens(name, experts, total):
    counts = routing.counts(name, experts, total)
    assert (len(counts), sum(counts), min(counts) >= 0) == (experts, total, True)
    if name == "balanced":
        assert max(counts) - min(counts) <= 1
    elif total >= 100 * experts > 100:
        assert max(counts) > 2 * total / experts  # skewed


def test_an_unknown_routing():
    with pytest.raises(ValueError, match="routing: expected one of balanced"):
        routing.counts("random", 8, 64)


def test_the_reference_reads_offsets():
    assert reference.gemm_grouped(tokens(), make()[1], torch.tensor([5, 5, 5, 5])).eq(0).all()

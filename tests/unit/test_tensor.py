"""FP4Tensor: validation, conversion, serialization, pytree and torch.compile."""

import copy
import dataclasses
import io
import pickle

import pytest
import torch
from torch.utils import _pytree as pytree

import fp4gemm
from fp4gemm import reference
from fp4gemm.formats import SF_LAYOUTS
from fp4gemm.tensor import FP4Tensor

LAYOUTS = sorted(SF_LAYOUTS)


def make(rows=33, k=40, **options) -> FP4Tensor:
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(rows * 1000 + k))
    return reference.quantize(x, **options)


def assert_same(got: FP4Tensor, expected: FP4Tensor) -> None:
    assert (got.shape, got.sf_layout) == (expected.shape, expected.sf_layout)
    assert torch.equal(got.data, expected.data)
    assert torch.equal(got.block_scale.view(torch.uint8), expected.block_scale.view(torch.uint8))
    assert torch.equal(got.outer_scale, expected.outer_scale)


def changed(**fields) -> dict:
    base = make(rows=4, k=40, sf_layout="linear")
    return {f.name: getattr(base, f.name) for f in dataclasses.fields(base)} | fields


def test_repr_says_what_it_is():
    t = make(4096, 64)
    megabytes = (4096 * 32 + 4096 * 4 + 4096 * 4) / 1e6
    assert repr(t) == (
        f"FP4Tensor(shape=(4096, 64), scaling=per_row, sf_layout='128x4', device=cpu, {megabytes * 1e3:.2f} kB)"
    )
    assert "scaling=per_tensor" in repr(make(4, 16, scaling="per_tensor", sf_layout="8x4"))
    assert repr(make(1, 16, sf_layout="linear")).endswith("13 B)")


def test_repr_of_the_size_in_the_readme():
    zeros = FP4Tensor(
        torch.zeros(4096, 2048, dtype=torch.uint8),
        torch.zeros(4096 * 256).to(torch.float8_e4m3fn),
        torch.zeros(4096),
        (4096, 4096),
    )
    assert repr(zeros) == "FP4Tensor(shape=(4096, 4096), scaling=per_row, sf_layout='128x4', device=cpu, 9.45 MB)"
    assert zeros.nbytes == 4096 * 2048 + 4096 * 256 + 4096 * 4


def test_properties():
    t = make(33, 40, sf_layout="8x4")
    assert (t.rows, t.k, t.device, t.scaling) == (33, 40, torch.device("cpu"), "per_row")
    assert t.layout is SF_LAYOUTS["8x4"]
    assert make(scaling="per_tensor").scaling == "per_tensor"
    assert make(1, 16).scaling == "per_row"


def test_it_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make().data = torch.zeros(1)


@pytest.mark.parametrize(
    "fields, error, message",
    [
        ({"data": None}, TypeError, "data: expected a torch.Tensor, got NoneType"),
        ({"outer_scale": 1.0}, TypeError, "outer_scale: expected a torch.Tensor, got float"),
        ({"data": torch.zeros(4, 24, dtype=torch.int8)}, TypeError, "data: expected dtype torch.uint8, got torch.int8"),
        ({"data": torch.zeros(4, 20, dtype=torch.uint8)}, ValueError, r"data: expected shape \(4, 24\), got \(4, 20\)"),
        ({"data": torch.zeros(24, 4, dtype=torch.uint8).t()}, ValueError, "data: expected a contiguous tensor"),
        ({"block_scale": torch.zeros(4, 3)}, TypeError, "block_scale: expected dtype torch.float8_e4m3fn"),
        ({"block_scale": torch.zeros(12).to(torch.float8_e4m3fn)}, ValueError, r"block_scale: expected shape \(4, 3\)"),
        ({"outer_scale": torch.zeros(4, dtype=torch.float64)}, TypeError, "outer_scale: expected dtype torch.float32"),
        ({"outer_scale": torch.zeros(3)}, ValueError, r"outer_scale: expected shape \(4,\), got \(3,\)"),
        ({"outer_scale": torch.zeros(4, 1)}, ValueError, r"outer_scale: expected shape \(4,\), got \(4, 1\)"),
        ({"outer_scale": torch.zeros(4, device="meta")}, ValueError, "outer_scale: expected device cpu .*, got meta"),
        ({"shape": (4,)}, ValueError, r"shape: expected \(M, K\)"),
        ({"shape": (-1, 40)}, ValueError, r"shape: expected \(M, K\)"),
        ({"shape": (4, 49)}, ValueError, r"data: expected shape \(4, 32\)"),
        ({"sf_layout": "rows"}, ValueError, "sf_layout: expected one of linear, 128x4, 8x4, got 'rows'"),
        ({"sf_layout": "8x4"}, ValueError, r"block_scale: expected shape \(32,\), got \(4, 3\)"),
    ],
)
def test_bad_fields_are_named(fields, error, message):
    with pytest.raises(error, match=message):
        FP4Tensor(**changed(**fields))


@pytest.mark.parametrize("first", LAYOUTS)
@pytest.mark.parametrize("second", LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 16), (33, 40), (130, 200), (0, 16), (3, 0)])
def test_with_layout_gives_what_quantize_gives_in_that_layout(first, second, shape):
    assert_same(make(*shape, sf_layout=first).with_layout(second), make(*shape, sf_layout=second))


def test_with_layout_shares_what_it_does_not_change():
    t = make()
    assert t.with_layout("128x4") is t
    assert t.with_layout("8x4").data is t.data
    with pytest.raises(ValueError, match="sf_layout: expected one of"):
        t.with_layout("16x4")


def test_padding_scales_are_zero_after_a_conversion():
    t = make(5, 40, sf_layout="linear").with_layout("128x4")
    assert int((t.block_scale.view(torch.uint8) != 0).sum()) == 5 * 3


def test_to_moves_every_tensor():
    moved = make().to("meta")
    assert moved.device.type == "meta"
    assert {moved.data.device, moved.block_scale.device, moved.outer_scale.device} == {torch.device("meta")}
    assert moved.shape == (33, 40)


def test_to_the_same_device_shares_storage():
    t = make()
    assert t.to("cpu").data.data_ptr() == t.data.data_ptr()


def test_dequantize_is_the_reference_on_cpu():
    pytest.importorskip("fp4gemm.ops", reason="needs fp4gemm.ops")
    t = make(17, 50)
    assert torch.equal(t.dequantize(), reference.dequantize(t))
    assert torch.equal(t.dequantize(torch.bfloat16), reference.dequantize(t, torch.bfloat16))


@pytest.mark.parametrize("sf_layout", LAYOUTS)
@pytest.mark.parametrize("scaling", ["per_row", "per_tensor"])
def test_plain_tensors_round_trip(sf_layout, scaling):
    t = make(9, 50, sf_layout=sf_layout, scaling=scaling)
    tensors = t.to_tensors("encoder.weight.")
    assert set(tensors) == {f"encoder.weight.{n}" for n in ("data", "block_scale", "outer_scale", "shape", "sf_layout")}
    assert all(type(value) is torch.Tensor for value in tensors.values())
    assert_same(FP4Tensor.from_tensors(tensors | {"other": torch.ones(1)}, "encoder.weight."), t)


def test_plain_tensors_name_what_is_missing():
    tensors = make().to_tensors("w.")
    del tensors["w.shape"]
    with pytest.raises(KeyError, match=r"missing w\.shape"):
        FP4Tensor.from_tensors(tensors, "w.")


def test_safetensors_file_round_trip(tmp_path):
    files = pytest.importorskip("safetensors.torch", reason="needs safetensors")
    t = make(9, 50)
    files.save_file(t.to_tensors("w."), tmp_path / "w.safetensors")
    assert_same(FP4Tensor.from_tensors(files.load_file(tmp_path / "w.safetensors"), "w."), t)


def test_torch_save_loads_with_weights_only():
    t, buffer = make(), io.BytesIO()
    torch.save({"w": t}, buffer)
    buffer.seek(0)
    assert_same(torch.load(buffer, weights_only=True)["w"], t)


def test_pickle_and_deepcopy_rebuild_separate_storage():
    t = make()
    assert_same(pickle.loads(pickle.dumps(t)), t)
    twin = copy.deepcopy(t)
    assert_same(twin, t)
    assert twin.data.data_ptr() != t.data.data_ptr()


def test_one_that_is_made_of_a_parameter_is_copied_and_detached():
    t = fp4gemm.quantize(torch.nn.Parameter(torch.randn(4, 32)))
    assert t.outer_scale.requires_grad  # nothing is detached silently
    for twin in (t.detach(), copy.deepcopy(t), pickle.loads(pickle.dumps(t))):
        assert_same(twin, t.detach())
        assert not any(leaf.requires_grad for leaf in (twin.data, twin.block_scale, twin.outer_scale))
    assert t.detach().data.data_ptr() == t.data.data_ptr()


def test_what_pickle_rebuilds_is_validated():
    rebuild, arguments = make().__reduce__()
    with pytest.raises(ValueError, match="block_scale: expected shape"):
        rebuild(*arguments[:-1], "linear")


def test_pytree_leaves_are_the_three_tensors():
    t = make()
    leaves, spec = pytree.tree_flatten({"w": t})
    assert [leaf is field for leaf, field in zip(leaves, (t.data, t.block_scale, t.outer_scale), strict=True)] == [
        True
    ] * 3
    assert_same(pytree.tree_unflatten(leaves, spec)["w"], t)
    names = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(t)[0]]
    assert names == [".data", ".block_scale", ".outer_scale"]


def test_tree_map_may_change_the_leaves_to_anything():
    shapes = pytree.tree_map(lambda leaf: tuple(leaf.shape), make(33, 40))
    assert (shapes.data, shapes.block_scale, shapes.outer_scale) == ((33, 24), (512,), (33,))


def through(t: FP4Tensor, x: torch.Tensor):
    """Takes an FP4Tensor, and returns: itself, a converted one, a newly built one, and a plain tensor."""
    built = FP4Tensor(t.data + 1, t.block_scale, t.outer_scale * 2, t.shape, t.sf_layout)
    return t, t.with_layout("8x4"), built, pytree.tree_map(torch.clone, t), x * t.outer_scale.sum() + t.nbytes


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("dynamic", [None, True])
def test_compiles_as_input_and_as_output(backend, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(through, fullgraph=True, backend=backend, dynamic=dynamic)
    for t in (make(33, 40), make(130, 72), make(33, 40, scaling="per_tensor", sf_layout="linear")):
        *got, plain = compiled(t, torch.ones(3))
        *expected, plain_expected = through(t, torch.ones(3))
        assert all(type(one) is FP4Tensor for one in got)
        for one, other in zip(got, expected, strict=True):
            assert_same(one, other)
        assert torch.equal(plain, plain_expected)


def test_validation_still_holds_inside_a_compiled_function():
    torch._dynamo.reset()

    def wrong(t: FP4Tensor) -> FP4Tensor:
        return FP4Tensor(t.data, t.block_scale, t.outer_scale[1:], t.shape, t.sf_layout)

    with pytest.raises(Exception, match=r"outer_scale: expected shape"):
        torch.compile(wrong, fullgraph=True, backend="eager")(make())


# --- prepacked ---


def prepacked(rows=33, k=40, **options) -> FP4Tensor:
    return make(rows, k, **options).prepack()


@pytest.mark.parametrize("sf_layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 16), (33, 40), (130, 200), (0, 16), (3, 0), (0, 0)])
@pytest.mark.parametrize("scaling", ["per_row", "per_tensor"])
def test_prepack_and_back(shape, sf_layout, scaling):
    x = torch.rand(shape, generator=torch.Generator().manual_seed(1)) + 0.5  # no block scale is 0: nothing is lost
    t = reference.quantize(x, sf_layout=sf_layout, scaling=scaling)
    p = t.prepack()
    assert (p.shape, p.sf_layout, p.prepacked, p.scaling) == (t.shape, sf_layout, "sm90", t.scaling)
    assert torch.equal(p.data, reference.packed.pack(t.data, t.linear_block_scale(), t.shape))
    assert p.block_scale.shape == (0,)
    assert p.outer_scale is t.outer_scale
    assert_same(p.unpack(), t)


def test_prepack_of_what_is_prepacked_is_itself():
    t, p = make(), prepacked()
    assert p.prepack() is p
    assert p.prepack("sm90") is p
    assert t.unpack() is t
    with pytest.raises(ValueError, match="prepacked: expected one of sm90, got 'sm80'"):
        t.prepack("sm80")


def test_a_prepacked_tensor_has_the_values_and_scales_of_the_plain_one():
    t, p = make(17, 50, sf_layout="8x4"), prepacked(17, 50, sf_layout="8x4")
    assert torch.equal(p.dequantize(torch.bfloat16), t.dequantize(torch.bfloat16))
    assert torch.equal(reference.dequantize(p, outer=False), reference.dequantize(t, outer=False))
    assert torch.equal(p.linear_block_scale().view(torch.uint8), t.linear_block_scale().view(torch.uint8))
    for layout in LAYOUTS:
        assert_same(p.with_layout(layout), t.with_layout(layout))
        assert p.with_layout(layout).prepacked is None
    with pytest.raises(ValueError, match="sf_layout: expected one of"):
        p.with_layout("16x4")


def test_repr_and_size_of_a_prepacked_tensor():
    p = prepacked(130, 200)
    assert p.nbytes == 3 * 4 * 2304 + 4 * 130
    assert repr(p) == (
        "FP4Tensor(shape=(130, 200), scaling=per_row, sf_layout='128x4', prepacked='sm90', device=cpu, 28.17 kB)"
    )


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"prepacked": "sm80"}, "prepacked: expected one of sm90, got 'sm80'"),
        ({"data": torch.zeros(4, 24, dtype=torch.uint8)}, r"data: expected shape \(1, 1, 2304\), got \(4, 24\)"),
        ({"block_scale": torch.zeros(4, 3).to(torch.float8_e4m3fn)}, r"block_scale: expected shape \(0,\), got"),
        ({"shape": (65, 40)}, r"data: expected shape \(2, 1, 2304\)"),
        ({"sf_layout": "rows"}, "sf_layout: expected one of"),
        ({"prepacked": None}, r"data: expected shape \(4, 24\), got \(1, 1, 2304\)"),
    ],
)
def test_bad_fields_of_a_prepacked_tensor_are_named(fields, message):
    base = prepacked(4, 40)
    good = {f.name: getattr(base, f.name) for f in dataclasses.fields(base)}
    assert FP4Tensor(**good).prepacked == "sm90"
    with pytest.raises(ValueError, match=message):
        FP4Tensor(**good | fields)


def assert_same_form(got: FP4Tensor, expected: FP4Tensor) -> None:
    assert got.prepacked == expected.prepacked
    assert_same(got, expected)


def test_a_prepacked_tensor_is_saved_and_loaded(tmp_path):
    p = prepacked(9, 50, sf_layout="8x4")
    tensors = p.to_tensors("w.")
    assert set(tensors) == {f"w.{n}" for n in ("data", "block_scale", "outer_scale", "shape", "sf_layout", "prepacked")}
    assert_same_form(FP4Tensor.from_tensors(tensors, "w."), p)
    assert_same_form(pickle.loads(pickle.dumps(p)), p)
    assert_same_form(copy.deepcopy(p), p)
    torch.save(p, tmp_path / "w.pt")
    assert_same_form(torch.load(tmp_path / "w.pt", weights_only=True), p)
    assert_same_form(p.to("cpu"), p)
    assert p.to("meta").prepacked == "sm90"


def test_a_prepacked_tensor_in_a_safetensors_file(tmp_path):
    files = pytest.importorskip("safetensors.torch", reason="needs safetensors")
    p = prepacked(9, 50)
    files.save_file(p.to_tensors("w."), tmp_path / "w.safetensors")
    assert_same_form(FP4Tensor.from_tensors(files.load_file(tmp_path / "w.safetensors"), "w."), p)


def test_files_from_before_there_was_a_form_load():
    t = make()
    tensors, (rebuild, arguments) = t.to_tensors(), t.__reduce__()
    assert "prepacked" not in tensors
    assert FP4Tensor.from_tensors(tensors).prepacked is None
    assert rebuild(*arguments[:5]).prepacked is None


def test_a_prepacked_tensor_is_a_pytree():
    p = prepacked()
    leaves, spec = pytree.tree_flatten(p)
    assert len(leaves) == 3
    assert spec != pytree.tree_structure(make())
    assert_same_form(pytree.tree_unflatten(leaves, spec), p)
    assert_same_form(pytree.tree_map(torch.clone, p), p)


def there_and_back(t: FP4Tensor, p: FP4Tensor):
    return t.prepack(), p.unpack(), p, p.with_layout("linear"), p.dequantize()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("dynamic", [None, True])
def test_prepacking_compiles(backend, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(there_and_back, fullgraph=True, backend=backend, dynamic=dynamic)
    for t in (make(33, 40), make(130, 72), make(33, 40, scaling="per_tensor", sf_layout="linear")):
        *got, values = compiled(t, t.prepack())
        *expected, expected_values = there_and_back(t, t.prepack())
        for one, other in zip(got, expected, strict=True):
            assert_same_form(one, other)
        assert torch.equal(values, expected_values)


@pytest.mark.parametrize("shape", [(5, 40), (0, 16), (130, 200)])
def test_the_operators_of_prepacking_are_sound(shape):
    """As torch checks them; its schema test alone multiplies float8 tensors, which torch cannot."""
    t = make(*shape, sf_layout="8x4")
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    arguments = (t.data, t.block_scale, "8x4", t.k)
    torch.library.opcheck(torch.ops.fp4gemm.prepack.default, arguments, test_utils=checks)
    packed = (t.prepack().data, "8x4", *t.shape)
    torch.library.opcheck(torch.ops.fp4gemm.unpack.default, packed, test_utils=checks)

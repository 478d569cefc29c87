"""Files of tensors and of quantized weights: what the safetensors package reads, and what a model's file becomes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import fp4gemm
from fp4gemm import checkpoint, cli, model_file, search, tensor_file
from fp4gemm.search import Method


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Shape, dtype and bytes."""
    same_kind = (a.shape, a.dtype) == (b.shape, b.dtype)
    return same_kind and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def same(a: fp4gemm.FP4Tensor, b: fp4gemm.FP4Tensor) -> bool:
    kinds = (a.shape, a.sf_layout) == (b.shape, b.sf_layout)
    return kinds and all(equal(getattr(a, n), getattr(b, n)) for n in ("data", "block_scale", "outer_scale"))


TENSORS = {
    "b": torch.randn(3, 5),
    "a": torch.tensor(2.5, dtype=torch.float16),
    "half": torch.randn(7).bfloat16(),
    "none": torch.empty(0, 4),
    "bytes": torch.arange(9, dtype=torch.uint8),
    "scales": torch.arange(16, dtype=torch.uint8).view(torch.float8_e4m3fn),
    "flag": torch.tensor([True, False]),
    "long": torch.tensor([[2**40]]),
    "strided": torch.randn(4, 6).t(),
}


def test_files_are_those_of_the_safetensors_package(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "deep" / "ours", tmp_path / "theirs"
    tensor_file.write(ours, TENSORS, {"format": "pt"})
    contiguous = {name: t.contiguous() for name, t in TENSORS.items()}
    save_file(contiguous, theirs, {"format": "pt"})
    for read in (tensor_file.read(theirs), load_file(ours), tensor_file.read(ours)):
        assert set(read) == set(TENSORS)
        assert all(equal(read[name], t) for name, t in contiguous.items())
    with tensor_file.Reader(theirs) as file:
        assert file.metadata == {"format": "pt"}
        assert file.entries["b"] == tensor_file.Entry("b", "F32", (3, 5), 60)
    assert [path.name for path in ours.parent.iterdir()] == ["ours"]


def _header(fields: Any, data: bytes = b"") -> bytes:
    text = json.dumps(fields).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "a header of 0 bytes in a file of 0"),
        ((1 << 40).to_bytes(8, "little") + b"{}", "a header of 1099511627776 bytes"),
        (_header([]), "not a whole safetensors file"),
        (_header({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"1234"), "x: bytes 0 to 8 of 4"),
        (_header({"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, b"12345678"), "x: 8 bytes for F32"),
        (_header({"x": {"dtype": "F32", "shape": [3]}}), "data_offsets"),
        (_header({"x": {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}}, b"12345678"), "x: a shape of"),
        (_header({"__metadata__": "pt"}), "__metadata__: expected an object, got 'pt'"),
    ],
)
def test_a_damaged_file_is_named(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        tensor_file.read(path)
    assert str(path) in str(caught.value)


def test_a_failing_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "x"
    tensor_file.write(path, {"a": torch.ones(2)})
    with pytest.raises(KeyError):
        tensor_file.write(path, {"a": torch.ones(2), "c": torch.ones(2, dtype=torch.complex64)})
    assert equal(tensor_file.read(path)["a"], torch.ones(2))
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


# --- quantized weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", ["per_row", "per_tensor"])
@pytest.mark.parametrize("shape", [(5, 48), (1, 16), (3, 40), (130, 272)])
def test_weights_come_back(shape: tuple[int, int], scaling: str, tmp_path: Path) -> None:
    w = torch.randn(shape)
    held = {"a.b": fp4gemm.quantize(w, scaling=scaling), "": fp4gemm.quantize(w).prepack()}
    path = tmp_path / "w.safetensors"
    fp4gemm.save_quantized(path, held)
    found = fp4gemm.load_quantized(path)
    assert list(found) == ["a.b", ""]
    assert same(found["a.b"], held["a.b"])
    assert same(found[""], held[""].unpack())
    linear = fp4gemm.load_quantized(path, sf_layout="linear")["a.b"]
    assert equal(linear.dequantize(), held["a.b"].dequantize())
    # As the names promise, computed from the file alone.
    raw = load_file(path)
    codes = torch.stack((raw["a.b.weight"] & 15, raw["a.b.weight"] >> 4), -1).flatten(1)
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])[(codes & 7).long()] * torch.where(codes > 7, -1.0, 1.0)
    scales = raw["a.b.weight_scale"].float().repeat_interleave(16, 1)
    value = (values * scales * raw["a.b.weight_scale_2"].reshape(-1, 1))[:, : shape[1]]
    torch.testing.assert_close(value, held["a.b"].dequantize(), rtol=1e-6, atol=0)


def test_a_file_of_model_optimizer(tmp_path: Path) -> None:
    """No metadata of ours, one outer scale, further tensors."""
    t = fp4gemm.quantize(torch.randn(4, 32), scaling="per_tensor", convention="modelopt", sf_layout="linear")
    parts = {"l.weight": t.data, "l.weight_scale": t.block_scale, "l.weight_scale_2": t.outer_scale}
    path = tmp_path / "m.safetensors"
    save_file({**parts, "l.input_scale": torch.tensor(1.0), "l.bias": torch.zeros(4), "n.weight": torch.ones(3)}, path)
    found = fp4gemm.load_quantized(path, sf_layout="linear")
    assert list(found) == ["l"]
    assert same(found["l"], t)
    save_file({**parts, "l.weight_scale": torch.zeros(4, 3).to(torch.float8_e4m3fn)}, path)
    with pytest.raises(ValueError, match=r"m.safetensors: l.weight: weight_scale: expected shape \(4, 2\)"):
        fp4gemm.load_quantized(path)


# --- a model's file ---------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "embed.weight": torch.randn(10, 32, generator=generator),
        "layers.0.up.weight": torch.randn(24, 40, generator=generator).bfloat16(),
        "layers.0.up.bias": torch.randn(24, generator=generator),
        "layers.0.norm.weight": torch.ones(32),
        "layers.1.down.weight": torch.randn(8, 32, generator=generator).half(),
        "layers.1.table": torch.randn(4, 4, generator=generator),
        "steps": torch.tensor(7),
    }
    save_file(tensors, tmp_path / "in.safetensors", {"format": "pt", "mine": "kept"})
    return tmp_path / "in.safetensors", tensors


@pytest.mark.parametrize(
    "method", [Method(), Method("amax"), Method("4/6", scaling="per_tensor"), Method(block=32, outer="search")]
)
def test_matrices_are_quantized_and_the_rest_is_copied(
    method: Method, model: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    source, tensors = model
    out = tmp_path / "out.safetensors"
    told: list[str] = []
    summary = model_file.quantize_file(source, out, method, tell=told.append)
    layers = ["layers.0.up", "layers.1.down"]
    assert sorted(told) == sorted(summary.quantized) == layers
    found = fp4gemm.load_quantized(out)
    for layer in layers:
        assert same(found[layer], method.quantize(tensors[f"{layer}.weight"]))
    read = load_file(out)
    names = [f"{layer}.{part}" for layer in layers for part in ("weight", "weight_scale", "weight_scale_2")]
    rest = sorted(set(tensors) - {f"{layer}.weight" for layer in layers})
    assert sorted(read) == sorted([*names, *rest])
    assert sorted(summary.copied) == rest
    assert all(equal(read[name], tensors[name]) for name in rest)
    assert summary.bytes_before == sum(t.nbytes for t in tensors.values())
    assert summary.bytes_after == sum(t.nbytes for t in read.values())
    with tensor_file.Reader(out) as file:
        assert file.metadata["mine"] == "kept"
        assert file.metadata["quant_algo"] == "NVFP4"
        assert Method(**json.loads(file.metadata["method"])) == method


def test_globs(model: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    source, _ = model
    out = tmp_path / "out.safetensors"

    def layers(**options: Any) -> list[str]:
        return sorted(model_file.quantize_file(source, out, Method("amax"), **options).quantized)

    assert layers(include=["layers.0.*"]) == ["layers.0.up"]
    assert layers(exclude=[]) == ["embed", "layers.0.up", "layers.1.down"]
    assert layers(exclude=["*.up", "embed"]) == ["layers.1.down"]
    with pytest.raises(ValueError, match=r"in.safetensors: no matrix \*.weight"):
        layers(include=["nothing"])


def test_with_hessians(model: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    source, tensors = model
    out, folder = tmp_path / "out.safetensors", tmp_path / "hessians"
    method = Method("hessian", feedback=True)
    accumulators = {}
    for layer in ("layers.0.up", "layers.1.down"):
        k = tensors[f"{layer}.weight"].shape[1]
        found = accumulators[layer] = search.HessianAccumulator(k, full=layer.endswith("up"))
        found.add(torch.randn(100, k) @ torch.randn(k, k))

    def run(**options: Any) -> None:
        model_file.quantize_file(source, out, method, hessians=folder, **options)

    accumulators["layers.0.up"].save(folder / "layers.0.up.safetensors")
    with pytest.raises(ValueError, match=r"layers.1.down.weight: expected its Hessian in .*layers.1.down.safetensors"):
        run()
    run(include=["*.up"])
    w = tensors["layers.0.up.weight"]
    assert same(fp4gemm.load_quantized(out)["layers.0.up"], method.quantize(w, accumulators["layers.0.up"]))
    before = out.read_bytes()
    accumulators["layers.1.down"].save(folder / "layers.1.down.safetensors")
    with pytest.raises(ValueError, match="expected a Hessian of all columns, for feedback"):
        run()
    accumulators["layers.0.up"].save(folder / "layers.1.down.safetensors")
    with pytest.raises(ValueError, match="expected a Hessian of 32 columns, got one of 40"):
        run()
    assert out.read_bytes() == before  # a run that fails leaves the file of the one before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hessians", "in.safetensors", "out.safetensors"]
    for wrong in ((Method(), folder), (Method("hessian"), None)):
        with pytest.raises(ValueError, match="hessians: expected"):
            model_file.quantize_file(source, out, wrong[0], hessians=wrong[1])


def test_names_that_are_taken(tmp_path: Path) -> None:
    source = tmp_path / "in.safetensors"
    save_file({"a.weight": torch.ones(2, 16), "a.weight_scale": torch.ones(1)}, source)
    with pytest.raises(ValueError, match=r"two tensors would be called 'a.weight_scale'"):
        model_file.quantize_file(source, tmp_path / "out", Method("amax"))
    assert [p.name for p in tmp_path.iterdir()] == ["in.safetensors"]


def test_command(model: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    source, tensors = model
    out = tmp_path / "out.safetensors"

    def call(*arguments: object, code: int = 0) -> str:
        result = CliRunner().invoke(cli.app, ["quantize-model", *map(str, arguments), "--device", "cpu"])
        assert result.exit_code == code, result.output
        return result.output

    assert "2 layers in NVFP4, 5 tensors copied" in call(source, out)
    want = fp4gemm.search_scales(tensors["layers.1.down.weight"])
    assert same(fp4gemm.load_quantized(out)["layers.1.down"], want)
    output = call(source, out, "--metric", "amax", "--exclude", "*.up", "--exclude", "layers.1.*")
    assert "1 layers in NVFP4, 6 tensors copied" in output
    assert "metric: expected one of amax, 4/6, sse, hessian" in call(source, out, "--metric", "mse", code=1)
    assert "feedback: expected metric='hessian'" in call(source, out, "--feedback", code=1)
    assert "hessians: expected a folder" in call(source, out, "--metric", "hessian", code=1)
    assert "no such" in call(tmp_path / "absent", out, code=1).lower()


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"metric": "mse"}, "metric: expected one of"),
        ({"feedback": True}, "feedback: expected"),
        ({"metric": "amax", "block": 32}, "block, outer: expected 16"),
        ({"metric": "4/6", "outer": "search"}, "block, outer: expected 16"),
        ({"block": 8}, "block: expected 16 or 32"),
        ({"damping": -1.0}, "damping: expected"),
        ({"damping": float("nan")}, "damping: expected"),
        ({"scaling": "per_column"}, "scaling: expected one of"),
        ({"outer": "grid"}, "outer: expected one of"),
    ],
)
def test_methods_that_are_none(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Method(**arguments)


@pytest.mark.parametrize("text", ["no", "[1]", '{"a": "b"}', '{"a": -1}'])
def test_columns_that_are_none(text: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    fp4gemm.save_quantized(path, {"a": fp4gemm.quantize(torch.randn(4, 20))})
    tensor_file.write(path, tensor_file.read(path), {"nvfp4_columns": text})
    with pytest.raises(ValueError, match="nvfp4_columns: expected JSON with a number of columns") as caught:
        fp4gemm.load_quantized(path)
    assert str(path) in str(caught.value)


def test_a_weight_that_is_no_matrix(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    parts = checkpoint.to_parts(fp4gemm.quantize(torch.randn(4, 32)))
    tensor_file.write(path, {f"a.{name}": part.flatten() for name, part in parts.items()}, {})
    with pytest.raises(ValueError, match=r"a\.weight: weight: expected shape \[N, .* got \[64\]"):
        fp4gemm.load_quantized(path)


def test_parts_that_are_not_there() -> None:
    names = ["a.weight", "a.weight_scale", "a.weight_scale_2", "b.weight", "b.weight_scale_2", "weight_scale_2"]
    assert checkpoint.layers_of(names) == ["a"]
    assert checkpoint.layers_of([*names, "weight", "weight_scale"]) == ["a", ""]

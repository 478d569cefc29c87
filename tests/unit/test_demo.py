"""The demo: its numbers agree with an independent float64 quantizer, and the real model keeps its meaning."""

import importlib.util
import io
import math
import statistics
import struct

import pytest
import torch
from rich.console import Console
from torch import nn

import fp4gemm
from fp4gemm import cli, demo, select
from fp4gemm.demo import encoder, measure

GRID = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
# The check rounds in float64: a few values next to a tie go the other way and move an SNR by far less than this.
SNR_TOLERANCE_DB = 0.02


def nearest_nvfp4(x):
    """Per-row NVFP4 of x by the nearest point of the grid, in float64: shares no code with the package."""
    rows, k = x.shape
    blocks = nn.functional.pad(x.double(), (0, -k % 16)).reshape(rows, -1, 16)
    scale = 2688 / blocks.abs().amax(dim=(1, 2), keepdim=True).clamp_min(1e-12)
    block_scale = (blocks.abs().amax(dim=2, keepdim=True) * scale / 6).float().to(torch.float8_e4m3fn).double()
    scaled = blocks * scale / block_scale.clamp_min(2.0**-9)
    codes = GRID[(scaled.abs().unsqueeze(-1) - GRID).abs().argmin(dim=-1)] * scaled.sign()
    return (codes * block_scale / scale).reshape(rows, -1)[:, :k]


def power(db):
    return 10 ** (-db / 10)


@pytest.fixture(scope="module")
def tiny():
    """A random BERT whose widths are no multiples of 16, with a tokenizer that makes two kinds of padding."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=40, num_hidden_layers=2, num_attention_heads=4, intermediate_size=72,
        max_position_embeddings=16, initializer_range=0.2,
    )  # fmt: skip

    def tokenize(sentences, **_):
        lengths = [3 + len(sentence) % 5 for sentence in sentences]
        mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
        ids = torch.randint(1, 50, mask.shape, generator=torch.Generator().manual_seed(1)) * mask
        return {"input_ids": ids, "attention_mask": mask}

    return encoder.Encoder("tiny", transformers.BertModel(config).eval(), tokenize)


@pytest.fixture(scope="module")
def report(tiny):
    pairs = [demo.Pair("a", "one", "three"), demo.Pair("b", "seven!!", "nine")]
    return demo.examine(tiny, pairs, torch.device("cpu"), "reference on the CPU", torch.float32)


@pytest.mark.parametrize("bias", [True, False])
def test_fp4_linear_is_the_product_of_the_quantized_operands(bias):
    torch.manual_seed(1)
    linear = nn.Linear(48, 24, bias=bias)
    x = torch.randn(2, 5, 48)
    got = fp4gemm.nn.FP4Linear(fp4gemm.quantize(linear.weight.detach()), linear.bias)(x)
    exact = nearest_nvfp4(x.reshape(10, 48)) @ nearest_nvfp4(linear.weight.detach()).T
    expected = exact + (linear.bias.detach().double() if bias else 0)
    assert got.shape == (2, 5, 24)
    assert (
        measure.snr_db(expected, got.reshape(10, 24)) > 100
    )  # fp32 sums of 48 products: relative error below 48·2^-24


def test_conversion_leaves_the_original_and_the_rest_alone(tiny):
    before = {name: tensor.clone() for name, tensor in tiny.model.state_dict().items()}
    converted = encoder.to_fp4(tiny.model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny.model.state_dict().items())
    assert len(list(encoder.fp4_linears(converted))) == 12
    assert encoder.linears(converted) == {}
    assert isinstance(converted.get_submodule("pooler.dense"), nn.Linear)
    assert encoder.to_fp4(tiny.model, torch.bfloat16).embeddings.word_embeddings.weight.dtype == torch.bfloat16


def test_captured_inputs_hold_real_tokens_only(tiny):
    batch = tiny.batch(["one", "three", "seven!!"])
    inputs = measure.capture_inputs(tiny.model, batch)
    tokens = int(batch["attention_mask"].sum())
    assert tokens < batch["attention_mask"].numel()
    assert {x.shape[0] for x in inputs.values()} == {tokens}
    assert set(inputs) == set(encoder.linears(tiny.model))


def test_linear_errors_agree_with_an_independent_quantizer(tiny):
    batch = tiny.batch(["one", "three"])
    inputs = measure.capture_inputs(tiny.model, batch)
    errors = measure.linear_errors(tiny.model, encoder.to_fp4(tiny.model), inputs, torch.float32)
    assert len(errors) == 12
    for error, (name, linear) in zip(errors, encoder.linears(tiny.model).items(), strict=True):
        x, w, bias = inputs[name].double(), linear.weight.detach().double(), linear.bias.detach().double()
        x4, w4 = nearest_nvfp4(inputs[name]), nearest_nvfp4(linear.weight.detach())
        exact = x @ w.T + bias
        assert error.weight == pytest.approx(measure.snr_db(w, w4), abs=SNR_TOLERANCE_DB)
        assert error.output == pytest.approx(measure.snr_db(exact, x4 @ w4.T + bias), abs=SNR_TOLERANCE_DB)
        assert error.weight_only == pytest.approx(measure.snr_db(exact, x @ w4.T + bias), abs=SNR_TOLERANCE_DB)
        assert error.activation_only == pytest.approx(measure.snr_db(exact, x4 @ w.T + bias), abs=SNR_TOLERANCE_DB)


def test_report_of_a_tiny_model(tiny, report):
    layers = [(40, 40)] * 4 + [(40, 72), (72, 40)]  # (K, N) of a layer's Linears
    assert report.bytes_before == 2 * sum(4 * k * n for k, n in layers)
    padded = [(-(-k // 16) * 8 * n + 128 * 4 * -(-k // 64) + 4 * n) for k, n in layers]
    assert report.bytes_after == 2 * sum(padded)
    assert report.tokens == int(tiny.batch(["one", "three", "seven!!", "nine"])["attention_mask"].sum())
    assert report.channels.shape == (3, 40)
    assert report.channels[0].abs().max() == 0  # nothing is quantized before the first layer
    assert math.isinf(report.depth_db[0])
    # The mean over channels of (error / RMS)² is the noise-to-signal ratio of the state.
    for row, db in zip(report.channels[1:], report.depth_db[1:], strict=True):
        assert float(row.square().mean()) == pytest.approx(power(db), rel=1e-4)


def test_snr():
    ones = torch.ones(100)
    assert measure.snr_db(ones, ones * 1.1) == pytest.approx(20, abs=1e-4)
    assert measure.snr_db(ones, ones) == math.inf


@pytest.mark.parametrize(
    "name, expected",
    [
        ("encoder.layer.3.output.dense", (3, "MLP down")),
        ("encoder.layer.11.attention.self.key", (11, "key")),
        ("layer.0.x", (0, "x")),
    ],
)
def test_split_name(name, expected):
    assert measure.split_name(name) == expected


def test_split_name_outside_a_layer():
    with pytest.raises(ValueError, match=r"name: got 'pooler\.dense'"):
        measure.split_name("pooler.dense")


def test_pairs_are_complete():
    pairs = demo.read_pairs()
    assert len(pairs) == 12
    assert {pair.group for pair in pairs} == {"same meaning", "related", "unrelated"}
    assert all(len(sentence.split()) > 3 for pair in pairs for sentence in (pair.first, pair.second))


@pytest.mark.parametrize("argument, value", [("device", "gpu"), ("dtype", "fp8")])
def test_bad_argument_names_what_is_taken(tmp_path, argument, value):
    with pytest.raises(ValueError, match=f"{argument}: got '{value}', expected"):
        demo.run(out=tmp_path / "x.png", **{argument: value})


@pytest.mark.parametrize("capability, where", [((9, 0), "cuda"), ((8, 9), "cpu"), (None, "cpu")])
def test_device_is_a_gpu_that_has_kernels(monkeypatch, capability, where):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    select.arch_of.cache_clear()  # it remembers devices
    try:
        device, backend = select.pick_device("auto")
        assert device.type == where
        assert ("kernels on some GPU" in backend) == (where == "cuda")
        assert select.pick_device("cpu") == (torch.device("cpu"), "reference on the CPU")
        if where == "cpu":
            with pytest.raises((ValueError, NotImplementedError)):
                select.pick_device("cuda")
    finally:
        select.arch_of.cache_clear()


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        encoder.model_folder(tmp_path)


@pytest.mark.parametrize("name", ["transformers", "matplotlib", encoder.MODEL_PACKAGE])
def test_missing_extra_is_named_before_any_work(monkeypatch, tmp_path, name):
    from typer.testing import CliRunner

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda wanted, *rest: None if wanted == name else find_spec(wanted)
    )
    result = CliRunner().invoke(cli.app, ["demo", "--out", str(tmp_path / "x.png")])
    assert result.exit_code == 1
    assert f"No module named '{name}'; this needs: pip install 'fp4gemm[demo]'" in result.output


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The demo as a user runs it, on the real model: report, picture, printed text."""
    for name in (*demo.EXTRAS, encoder.MODEL_PACKAGE):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed (pip install 'fp4gemm[demo]')")
    picture, text = tmp_path_factory.mktemp("demo") / "demo.png", io.StringIO()
    report = demo.run(out=picture, device="cpu", console=Console(file=text, width=120))
    return report, picture, text.getvalue()


def test_real_model_signal_to_noise(real):
    errors = real[0].linears
    assert {(error.layer, error.kind) for error in errors} == {
        (n, kind) for n in range(6) for kind in measure.KINDS.values()
    }
    torch.manual_seed(0)
    normal = torch.randn(384, 384)
    gaussian = measure.snr_db(normal, nearest_nvfp4(normal))
    # Trained weights are close to normal; an output has two such noises, and the exact bias can only help.
    assert all(abs(error.weight - gaussian) < 0.5 for error in errors)
    assert all(error.output > gaussian - 10 * math.log10(2) - 1.5 for error in errors)
    # The noises of the two operands are nearly uncorrelated: their powers add, save where one outlier rules an output.
    sums = [power(error.weight_only) + power(error.activation_only) for error in errors]
    ratios = [power(error.output) / total for error, total in zip(errors, sums, strict=True)]
    assert statistics.median(ratios) == pytest.approx(1, abs=0.05)
    assert all(0.5 < ratio < 1.5 for ratio in ratios)


def test_real_model_keeps_similarities(real):
    pairs = real[0].pairs
    means = {}
    for group in ("same meaning", "related", "unrelated"):
        after = [pair.after for pair in pairs if pair.group == group]
        means[group] = sum(after) / len(after)
    assert means["same meaning"] > means["related"] + 0.2 > means["unrelated"] + 0.3
    assert max(abs(pair.after - pair.before) for pair in pairs) < 0.12
    assert all(-1 <= value <= 1 for pair in pairs for value in (pair.before, pair.after))


def test_real_model_size(real):
    report = real[0]
    assert report.bytes_before == 6 * (4 * 384 * 384 + 2 * 384 * 1536) * 4
    assert report.bytes_before / report.bytes_after == pytest.approx(32 / (4 + 8 / 16), rel=0.02)


def test_real_model_embeddings_before_are_the_models_own(real):
    transformers = pytest.importorskip("transformers")
    folder = encoder.model_folder(None)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = transformers.AutoModel.from_pretrained(folder, local_files_only=True)
    pair = real[0].pairs[0]
    vectors = []
    for sentence in (pair.first, pair.second):  # one at a time, so without padding and without a mask
        hidden = model(**tokenizer(sentence, return_tensors="pt")).last_hidden_state[0]
        vectors.append(hidden.mean(dim=0))
    assert float(nn.functional.cosine_similarity(*vectors, dim=0).detach()) == pytest.approx(pair.before, abs=1e-4)


def test_real_model_says_what_ran_and_what_it_found(real):
    report, picture, text = real
    assert "reference on the CPU" in text
    assert f"{report.pairs[0].before:.3f}" in text
    assert f"{report.linears[0].weight:.1f}→{report.linears[0].output:.1f}" in text
    assert f"{report.bytes_after / 1e6:.2f} MB" in text
    assert picture.name in text.replace("\n", "")


def test_picture_is_a_png_with_something_on_it(real):
    head = real[1].read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", head[16:24])
    assert (width, height) == (2100, 1500)
    from matplotlib import image

    pixels = image.imread(real[1])[..., :3]
    assert 0.05 < pixels.std() < 0.5
    assert len({tuple(color) for color in (pixels[::7, ::7] * 255).astype(int).reshape(-1, 3)}) > 100


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_activation_types(tiny, dtype):
    pairs = [demo.Pair("a", "one", "three")]
    wide = demo.examine(tiny, pairs, torch.device("cpu"), "cpu", torch.float32)
    narrow = demo.examine(tiny, pairs, torch.device("cpu"), "cpu", dtype)
    for one, other in zip(wide.linears, narrow.linears, strict=True):
        assert one.weight == other.weight  # weights are quantized from fp32 whatever the activations are
        assert other.output == pytest.approx(one.output, abs=1.0)


def test_uses_the_public_calls_only(monkeypatch, tiny):
    calls = []
    for name in ("quantize", "convert"):
        function = getattr(fp4gemm, name)
        monkeypatch.setattr(fp4gemm, name, lambda *a, _f=function, _n=name, **k: (calls.append(_n), _f(*a, **k))[1])
    encoder.to_fp4(tiny.model)
    assert sorted(calls) == ["convert", *["quantize"] * 12]

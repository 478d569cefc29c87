"""The command line: what it writes, what it says and the exit codes, against the modules it drives."""

import importlib
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from fp4gemm import cache, cli, render, report, spec, variants
from fp4gemm.formats import SF_LAYOUTS

SMALL = spec.AmaxSpec("sm_90a", "bf16")  # a tenth of a second of NVRTC, no CUTLASS


@pytest.fixture(autouse=True)
def cache_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("FP4GEMM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("FP4GEMM_DISABLE_JIT", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path / "cache"


def call(*arguments, code=0):
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.output


def test_help_names_every_subcommand_and_loads_no_extra():
    script = "import sys; from fp4gemm.cli import app; app(['--help'], standalone_mode=False); print(*sys.modules)"
    output = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    for name in ("generate", "list", "build", "doctor", "demo", "quantize-model", "bench"):
        assert re.search(rf"\b{name}\b", output)
    loaded = set(output.splitlines()[-1].split())
    assert not loaded & {"matplotlib", "transformers", "fp4gemm.demo", "fp4gemm.bench"}


def test_generate_writes_every_default_variant(tmp_path):
    output = call("generate", "--out", tmp_path / "out")
    expected = {f"{variant.name}.cu": render.render(variant) for variant in variants.default_variants()}
    written = {path.name: path.read_text() for path in (tmp_path / "out").iterdir()}
    assert written == expected
    assert f"{len(expected)} written" in output
    assert "0 written" in call("generate", "--out", tmp_path / "out")


def test_generate_deletes_only_when_asked(tmp_path):
    (tmp_path / "stale.cu").write_text("old")
    (tmp_path / "notes.txt").write_text("mine")
    call("generate", "--out", tmp_path, "--arch", "sm_90a", "--prune")  # one arch cannot know what is stale
    assert (tmp_path / "stale.cu").exists()
    call("generate", "--out", tmp_path)
    assert (tmp_path / "stale.cu").exists()
    assert "1 deleted" in call("generate", "--out", tmp_path, "--prune")
    assert not (tmp_path / "stale.cu").exists()
    assert (tmp_path / "notes.txt").exists()


def test_generate_for_one_arch(tmp_path):
    call("generate", "--out", tmp_path, "--arch", "sm_100a")
    assert {p.stem for p in tmp_path.glob("*.cu")} == {v.name for v in variants.default_variants(("sm_100a",))}


def test_unknown_arch_names_the_known_ones():
    output = call("list", "--arch", "sm_80", code=1)
    assert "--arch: got sm_80, expected one of sm_90a, sm_100a, sm_120a" in output


def test_list_shows_what_is_cached():
    assert not re.search(r"\byes\b", call("list"))
    cache.get(SMALL)
    lines = call("list").splitlines()
    assert [line for line in lines if re.search(r"\byes\b", line)] == [line for line in lines if SMALL.name in line]
    assert sum(bool(re.search(r"\b(yes|no)\b", line)) for line in lines) == len(variants.default_variants())


def test_build_compiles_once():
    output = call("build", SMALL.name)
    entry = cache.lookup(SMALL)
    assert entry is not None
    assert (entry.path / "kernel.cubin").read_bytes()[:4] == b"\x7fELF"
    row = next(line for line in output.splitlines() if SMALL.name in line and "│" in line)
    shown = [f"{entry.meta['seconds']:.1f}", *(str(entry.meta[key]) for key in ("peak_mb", "registers"))]
    assert [cell.strip() for cell in row.strip("│ ").split("│")][1:] == [*shown, "0", str(entry.meta["smem_bytes"])]
    heading = next(line for line in output.splitlines() if "seconds" in line)
    assert re.split(r"\s*┃\s*", heading.strip("┃ ")) == [
        *("kernel", "seconds", "peak MB", "registers", "spill bytes", "shared memory, bytes")
    ]
    assert "to build: 0" in call("build", SMALL.name)


def test_build_reports_what_compiling_took(tmp_path):
    """Of kernels that are built now and of those that the cache held."""
    dequantize = spec.DequantizeSpec("sm_90a", "bf16", "linear", False)
    call("build", SMALL.name)
    path = tmp_path / "new" / "compile.json"
    assert "2 rows in" in call("build", SMALL.name, dequantize.name, "--report", path)
    document = report.read(path)
    assert document["bench"] == "compile"
    for row, kernel in zip(document["rows"], (SMALL, dequantize), strict=True):
        meta = cache.lookup(kernel).meta
        assert row == report.compile_row(kernel.name, kernel.arch, meta)
        assert (row["seconds"], row["spill_bytes"]) == (meta["seconds"], 0)


@pytest.mark.parametrize("arguments", [[], ["--all", SMALL.name]])
def test_build_wants_names_or_all(arguments):
    call("build", *arguments, code=2)


def test_build_for_k_builds_what_select_picks(monkeypatch):
    from fp4gemm import builder, select

    asked = []
    monkeypatch.setattr(builder, "build_all", lambda specs, jobs: asked.extend(specs) or iter(()))
    call("build", "--k", "4096", "--arch", "sm_90a")
    assert asked == select.bf16_specs("sm_90a", 4096)
    picked = {
        select.quantize_spec("sm_90a", "bf16", 4096, "per_row", "te_per_token", name, True) for name in SF_LAYOUTS
    }
    assert picked < set(asked)


def test_build_refuses_unknown_names():
    assert "no default variant is called nonsense" in call("build", SMALL.name, "nonsense", code=1)


def test_build_that_fails_says_why_and_exits_1(monkeypatch):
    monkeypatch.setenv("FP4GEMM_DISABLE_JIT", "1")
    output = call("build", SMALL.name, code=1)
    assert "failed" in output
    assert "KernelMissing" in output
    assert "FP4GEMM_DISABLE_JIT" in output


@pytest.mark.parametrize("command", [["list"], ["build", "--all"], ["doctor"]])
def test_misspelt_variable_is_an_error(monkeypatch, command):
    monkeypatch.setenv("FP4GEMM_CACHEDIR", "/nowhere")
    assert "FP4GEMM_CACHEDIR" in call(*command, code=1)


def test_bench_hands_its_arguments_on():
    output = call("bench", "--help")
    assert "Usage: fp4gemm bench" in output


def test_missing_extra_is_named(monkeypatch):
    def fail(name, *rest):
        raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")

    monkeypatch.setattr(cli, "importlib", type("importer", (), {"import_module": staticmethod(fail)}))
    assert "pip install 'fp4gemm[bench]'" in call("bench", "all", code=1)


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(render, "render", lambda _: {}["bug"])
    result = CliRunner().invoke(cli.app, ["generate"])
    assert isinstance(result.exception, KeyError)


def test_console_script_points_here():
    entries = importlib.metadata.entry_points(group="console_scripts", name="fp4gemm")
    if not entries:
        pytest.skip("fp4gemm is not installed (run from the source tree)")
    assert next(iter(entries)).value == "fp4gemm.cli:app"

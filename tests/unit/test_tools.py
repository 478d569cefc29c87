"""tools/render.py and tools/plot.py."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fp4gemm import provenance, report

ROOT = Path(__file__).resolve().parents[2]


def load(path: Path) -> ModuleType:
    name = f"loaded_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def render() -> ModuleType:
    return load(ROOT / "tools" / "render.py")


def quantize_row(**changes: Any) -> dict[str, Any]:
    row = {
        "bench": "quantize", "M": 16384, "K": 8192, "dtype": "bf16", "mode": "graph", "us": 50.0, "bytes": 171_966_464,
        "options": {"scaling": "per_row", "outer_scale": "amax", "sf_layout": "128x4"},
        "vs_us": {"copy_same_bytes": 45.0},
    }  # fmt: skip
    return row | changes


def gemm_row(**changes: Any) -> dict[str, Any]:
    row = {
        "bench": "gemm", "op": "gemm", "arch": "sm_90a", "layout": "tn", "M": 8192, "N": 8192, "K": 8192, "a": "nvfp4",
        "b": "nvfp4", "epilogue": "rowcol", "mode": "graph", "kernel": "gemm_x", "us": 1500.0,
        "vs_us": {"cublas_bf16": 1425.0}, "rel_error": 1.6e-3,
    }  # fmt: skip
    return row | changes


OTHER_ROWS = [
    quantize_row(bench="dequantize", options={"sf_layout": "128x4"}),
    {"bench": "overhead", "op": "gemm", "M": 16, "N": 256, "K": 256, "mode": "eager", "us": 8.5, "process_us": 9.0,
     "vs_us": {"torch_mm": 4.0, "driver_launch": 2.0}},
    {"bench": "load", "kernel": "gemm_x", "arch": "sm_90a", "ms": 12.5, "max_ms": 14.0},
    {"bench": "compile", "kernel": "gemm_x", "arch": "sm_90a", "seconds": 22.0, "peak_mb": 3500, "registers": 168,
     "spill_bytes": 0, "smem_bytes": 214_016},
]  # fmt: skip


def document(rows: list[dict[str, Any]], date: str = "2026-11-20T10:00:00Z", **changes: Any) -> dict[str, Any]:
    environment = provenance.Environment("0123456789abcdef", False, "NVIDIA H200", "580.159", {"torch": "2.11.0"})
    tests = report.TestCounts(10, 0, 1, "pytest tests/gpu")
    return report.Report("all", "fp4gemm bench all", environment, 4.2, rows, tests, date).document() | changes


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with one generated source, one measurement and a README with a region."""
    (tmp_path / "generated").mkdir()
    (tmp_path / "generated" / "a.cu").write_text("kernel a\n")
    (tmp_path / "README.md").write_text(
        "# Title\n\n<!-- measurements:begin -->\nold\n<!-- measurements:end -->\n\nrest\n"
    )
    rows = [quantize_row(), gemm_row(), gemm_row(mode="eager", us=1510.0), *OTHER_ROWS]
    report.write(document(rows), tmp_path / "docs" / "measurements" / "all-h200-2026-11-20.json")
    return tmp_path


# --- tools/render.py --------------------------------------------------------------------------------------------------


def test_render_writes_then_checks(render: ModuleType, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rendered = {"a.cu": "kernel a\n", "b.cu": "kernel b\n"}
    assert render.main(["--check"], project, rendered) == 1
    out = capsys.readouterr().out
    assert "missing: generated/b.cu" in out
    assert "stale: README.md" in out
    assert "-old" in out
    assert not (project / "generated" / "b.cu").exists()
    assert render.main([], project, rendered) == 0
    assert (project / "generated" / "b.cu").read_text() == "kernel b\n"
    assert render.main(["--check"], project, rendered) == 0


def test_check_fails_when_a_template_changed(
    render: ModuleType, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert render.main([], project, {"a.cu": "kernel a\n"}) == 0
    assert render.main(["--check"], project, {"a.cu": "kernel a, changed\n"}) == 1
    out = capsys.readouterr().out
    assert "stale: generated/a.cu" in out
    assert "-kernel a" in out
    assert "+kernel a, changed" in out
    assert "python tools/render.py" in out


def test_extra_sources_are_reported_and_removed(
    render: ModuleType, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "generated" / "old.cu").write_text("kernel old\n")
    (project / "generated" / "README.md").write_text("not a source\n")
    render.main([], project, {"a.cu": "kernel a\n"})
    assert sorted(path.name for path in (project / "generated").iterdir()) == ["README.md", "a.cu"]
    (project / "generated" / "old.cu").write_text("kernel old\n")
    assert render.main(["--check"], project, {"a.cu": "kernel a\n"}) == 1
    assert "extra: generated/old.cu" in capsys.readouterr().out


def test_check_fails_when_a_measurement_changed(render: ModuleType, project: Path) -> None:
    rendered = {"a.cu": "kernel a\n"}
    render.main([], project, rendered)
    newer = document([gemm_row(us=1400.0)], date="2026-11-21T10:00:00Z")
    report.write(newer, project / "docs" / "measurements" / "gemm-h200-2026-11-21.json")
    assert render.main(["--check"], project, rendered) == 1
    assert render.main([], project, rendered) == 0
    readme = (project / "README.md").read_text()
    assert "1,400" in readme
    assert "1,500" not in readme
    assert (
        "| 16384 x 8192 | per_row | 128x4 | graph | 50.0 | 3,439 | 45.0 | 90% |" in readme
    )  # still from the older file
    assert readme.startswith("# Title\n\n<!-- measurements:begin -->\n")
    assert readme.endswith("<!-- measurements:end -->\n\nrest\n")


def test_readme_gets_a_summary_and_docs_get_all(render: ModuleType, project: Path) -> None:
    page = project / "docs" / "tables.md"
    page.write_text("<!-- measurements:begin -->\n<!-- measurements:end -->\n")
    (project / "docs" / "other.md").write_text("a page that names `<!-- measurements:begin -->` has no region\n")
    assert render.main([], project, {}) == 0
    readme, full = (project / "README.md").read_text(), page.read_text()
    assert "eager | 1,510" in full
    assert "eager | 1,510" not in readme
    assert "214016" in full
    assert "214016" not in readme
    for text in (readme, full):
        assert (
            "NVIDIA H200, driver 580.159, torch 2.11.0; copy bandwidth 4.20 TB/s; 2026-11-20, commit 0123456789ab"
            in text
        )
        assert "tests: 10 passed, 0 failed, 1 skipped" in text
        assert "`gemm` | nvfp4 | nvfp4 | graph | 1,500 | 733 | 1,425 | 0.95x | 1.6e-03 |" in text
        assert "| `gemm_x` | 12.5 | 14.0 |" in text


def test_no_measurements_and_bad_ones(render: ModuleType, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measured = next((project / "docs" / "measurements").glob("*.json"))
    measured.write_text(json.dumps(document([quantize_row(us=-1.0)])))
    assert render.main(["--check"], project, {}) == 2
    assert measured.name in capsys.readouterr().err
    measured.unlink()
    assert render.main([], project, {}) == 0
    assert "No measurements yet." in (project / "README.md").read_text()


@pytest.mark.parametrize(
    "text", ["", "<!-- measurements:end --><!-- measurements:begin -->", "<!-- measurements:begin -->"]
)
def test_readme_without_a_region_is_an_error(
    render: ModuleType, project: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "README.md").write_text(text)
    assert render.main(["--check"], project, {}) == 2
    assert "README.md: expected one line <!-- measurements:begin -->" in capsys.readouterr().err


def test_the_repository_is_rendered(render: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert render.main(["--check"]) == 0, capsys.readouterr().out


# --- tools/plot.py ----------------------------------------------------------------------------------------------------


def test_plot_draws_both_figures(project: Path) -> None:
    pytest.importorskip("matplotlib")
    plot = load(ROOT / "tools" / "plot.py")
    folder, out = project / "docs" / "measurements", project / "plots"
    assert plot.main(["--folder", str(folder), "--out-dir", str(out)]) == 0
    assert (out / "quantize.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert not (out / "gemm.png").exists()  # no sweep yet
    sweep = [
        gemm_row(
            a="bf16", M=M, N=N, us=us, bytes=N * 4608, limit_ratio=2.0, vs_us={"cublas_bf16": 25.0, "humming": 15.0}
        )
        | {"mode": mode}
        for N in (4096, 28672)
        for M, us, mode in ((1, 10.0, "graph"), (1, 9.0, "graph_pdl"), (64, 12.0, "graph"), (1024, 26.0, "graph"))
    ]
    report.write(document(sweep, date="2026-11-21T10:00:00Z"), folder / "gemm-h200-2026-11-21.json")
    assert plot.main(["--folder", str(folder), "--out-dir", str(out)]) == 0
    assert (out / "gemm.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert plot.main(["--folder", str(project / "generated")]) == 1


def test_tables_are_made_from_whole_runs(render: ModuleType, project: Path) -> None:
    quick = document([quantize_row(us=40.0)], date="2026-11-21T10:00:00Z") | {
        "command": "fp4gemm bench quantize --quick"
    }
    report.write(quick, project / "docs" / "measurements" / "quantize-h200-2026-11-21.json")
    assert render.main([], project, {}) == 0
    assert "| graph | 50.0 |" in (project / "README.md").read_text()

"""The measurement format: what is accepted, what is refused, how files are named and written."""

from __future__ import annotations

import copy
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from fp4gemm import files, provenance, report

ENVIRONMENT = provenance.Environment("0123456789abcdef", False, "NVIDIA H200", "580.159", {"torch": "2.11.0"})
QUANTIZE_ROW = {
    "bench": "quantize",
    "M": 8192,
    "K": 8192,
    "dtype": "bf16",
    "options": {"scaling": "per_row", "sf_layout": "128x4"},
    "mode": "graph",
    "us": 50.0,
    "bytes": 171_966_464,
    "vs_us": {"copy_same_bytes": 45.0},
}
COMPILE_ROW = {
    "bench": "compile",
    "kernel": "gemm_sm90",
    "arch": "sm_90a",
    "seconds": 30.5,
    "peak_mb": 3500,
    "registers": 168,
    "spill_bytes": 0,
    "smem_bytes": 200_000,
}


def document(**changes: Any) -> dict[str, Any]:
    rows = [copy.deepcopy(QUANTIZE_ROW), dict(COMPILE_ROW)]
    made = report.Report(
        "all", "fp4gemm bench", ENVIRONMENT, 4.2, rows, report.TestCounts(3, 0, 1, "pytest"), "2026-11-20T10:00:00Z"
    )
    return made.document() | changes


def test_the_example_of_the_format_is_valid() -> None:
    example = {
        "schema": 1, "bench": "gemm", "command": "fp4gemm bench gemm ...", "commit": "abc", "dirty": False,
        "date": "2026-11-20T10:00:00Z", "gpu": "NVIDIA H200", "driver": "580.159",
        "versions": {"fp4gemm": "...", "torch": "...", "nvrtc": "...", "cutlass": "..."}, "copy_tb_s": 4.2,
        "rows": [
            {"bench": "gemm", "arch": "sm_90a", "layout": "tn", "M": 1, "N": 28672, "K": 8192, "a": "bf16",
             "b": "nvfp4", "epilogue": "rowcol", "mode": "graph", "kernel": "gemm_sm90", "us": 1.0,
             "vs_us": {"cublas_bf16": 1.0, "humming": 1.0}, "rel_error": 0.0},
            {"bench": "search", "metric": "hessian", "N": 8192, "K": 8192, "us": 1.0, "vs_us": {"modelopt": 2.0},
             "identical_to_exhaustive": True},
            QUANTIZE_ROW, COMPILE_ROW,
        ],
        "tests": {"passed": 0, "failed": 0, "skipped": 0, "command": "pytest tests/gpu"},
    }  # fmt: skip
    assert report.problems(example) == []


def test_document_has_the_format_s_fields_and_round_trips(tmp_path: Path) -> None:
    made = document()
    assert list(made) == [
        *("schema", "bench", "command", "commit", "dirty", "date", "gpu", "driver", "versions"),
        *("copy_tb_s", "rows", "tests"),
    ]
    path = report.write(made, tmp_path / "deep" / report.file_name(made))
    assert path.name == "all-h200-2026-11-20.json"
    assert report.read(path) == made
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"schema": 2}, "'schema'"),
        ({"bench": "speed"}, "'bench'"),
        ({"date": "yesterday"}, "'date'"),
        ({"dirty": "no"}, "'dirty'"),
        ({"commit": ""}, "'commit'"),
        ({"copy_tb_s": float("nan")}, "'copy_tb_s'"),
        ({"copy_tb_s": -1.0}, "'copy_tb_s'"),
        ({"versions": {"torch": 2}}, "'versions'"),
        ({"rows": {}}, "'rows'"),
        ({"rows": [{"bench": "other"}]}, "rows[0]: field 'bench'"),
        ({"rows": [3]}, "rows[0]"),
        ({"rows": [QUANTIZE_ROW | {"us": 0.0}]}, "rows[0]: field 'us'"),
        ({"rows": [QUANTIZE_ROW | {"us": float("inf")}]}, "'us'"),
        ({"rows": [QUANTIZE_ROW | {"us": "50"}]}, "'us'"),
        ({"rows": [QUANTIZE_ROW | {"M": True}]}, "'M'"),
        ({"rows": [QUANTIZE_ROW | {"vs_us": {"copy": None}}]}, "'vs_us'"),
        ({"rows": [{"bench": "load", "kernel": "k", "arch": "sm_90a"}]}, "'ms' is missing"),
        ({"tests": {"passed": 1}}, "tests: field 'failed' is missing"),
        ({"tests": None}, "'tests'"),
    ],
)
def test_what_breaks_the_format_is_named(changes: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    with pytest.raises(report.ReportError) as caught:
        report.write(document(**changes), tmp_path / "x.json")
    assert complaint in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_every_problem_is_listed_and_missing_fields_too() -> None:
    broken = document(rows=[{"bench": "quantize"}])
    del broken["gpu"], broken["tests"]
    found = report.problems(broken)
    assert {"document: field 'gpu' is missing", "document: field 'tests' is missing"} <= set(found)
    assert len(found) == 2 + 8
    assert report.problems([]) == ["document: expected an object, got list"]


def test_a_failing_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = report.write(document(), tmp_path / "x.json")
    before = path.read_text()

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        report.write(document(commit="other"), path)
    assert path.read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_reading_a_broken_file_names_it(tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    for text in ("{", "[]", json.dumps(document(schema=0))):
        path.write_text(text)
        with pytest.raises(report.ReportError, match=r"broken\.json"):
            report.read(path)


def test_runs_of_one_day_do_not_overwrite_each_other(tmp_path: Path) -> None:
    name = report.file_name(document())
    paths = [report.write(document(), report.free_path(tmp_path, name)) for _ in range(3)]
    assert [p.name for p in paths] == [f"all-h200-2026-11-20{suffix}.json" for suffix in ("", "-2", "-3")]


def test_read_all_puts_the_newest_first(tmp_path: Path) -> None:
    for name, date in (("a", "2026-11-20T10:00:00Z"), ("b", "2026-11-21T09:00:00Z"), ("c", "2026-11-19T10:00:00Z")):
        report.write(document(date=date), tmp_path / f"{name}.json")
    assert [path.stem for path, _ in report.read_all(tmp_path)] == ["b", "a", "c"]
    assert report.read_all(tmp_path / "absent") == []


@pytest.mark.parametrize(
    "gpu, slug",
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA GeForce RTX 5090", "geforce-rtx-5090"),
        ("NVIDIA RTX PRO 6000 (Max-Q)", "rtx-pro-6000-max-q"),
        ("cpu", "cpu"),
        ("??", "unknown"),
    ],
)
def test_gpu_slug(gpu: str, slug: str) -> None:
    assert files.gpu_slug(gpu) == slug


def test_test_counts_from_json_and_junit(tmp_path: Path) -> None:
    path = tmp_path / "tests.json"
    path.write_text('{"passed": 5, "failed": 1, "skipped": 2, "command": "pytest", "other": 1}')
    assert report.read_tests(path) == report.TestCounts(5, 1, 2, "pytest")
    path.write_text('{"passed": 5}')
    with pytest.raises(report.ReportError, match="failed"):
        report.read_tests(path)
    path.write_text("nothing")
    with pytest.raises(report.ReportError, match=r"tests\.json"):
        report.read_tests(path)
    xml = tmp_path / "junit.xml"
    xml.write_text('<testsuites><testsuite name="pytest" errors="1" failures="2" skipped="3" tests="10"/></testsuites>')
    assert report.read_tests(xml) == report.TestCounts(4, 3, 3, "pytest --junitxml=junit.xml")


# --- what was measured ------------------------------------------------------------------------------------------------


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_commit_from_git_and_from_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GIT_COMMIT", raising=False)
    git(tmp_path, "init", "-q")
    assert provenance.source_state(root=tmp_path) == ("unknown", True)  # no commit yet
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-q", "--no-verify", "-m", "one")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert provenance.source_state(root=tmp_path) == (head, False)
    (tmp_path / "b").write_text("untracked files do not count")
    assert provenance.source_state(root=tmp_path) == (head, False)
    (tmp_path / "a").write_text("2")
    assert provenance.source_state(root=tmp_path) == (head, True)
    assert provenance.source_state(head[:9], root=tmp_path) == (head[:9], True)
    assert provenance.source_state("feed", root=tmp_path) == ("feed", False)


def test_commit_without_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GIT_COMMIT", raising=False)
    assert provenance.source_state(root=tmp_path) == ("unknown", True)
    assert provenance.source_state("abc", root=tmp_path) == ("abc", False)
    monkeypatch.setenv("GIT_COMMIT", "def")
    assert provenance.source_state(root=tmp_path) == ("def", True)
    monkeypatch.setenv("PATH", str(tmp_path))  # no git, no nvidia-smi
    (tmp_path / ".git").mkdir()
    assert provenance.source_state(root=tmp_path) == ("def", True)
    assert provenance.driver_version() == "unknown"


def test_a_missing_toolchain_does_not_lose_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from fp4gemm import toolchain

    def absent() -> str:
        raise toolchain.ToolchainError("no NVRTC")

    monkeypatch.setattr(toolchain, "nvrtc_version", absent)
    found = provenance.versions()
    assert found["nvrtc"] == "absent (ToolchainError)"
    assert set(found) == {"fp4gemm", "torch", "nvrtc", "cutlass"}
    assert all(isinstance(value, str) and value for value in found.values())


def test_environment_names_the_machine() -> None:
    environment = provenance.environment("abc")
    assert environment.commit == "abc"
    assert environment.gpu
    assert environment.driver


def test_a_command_line_leaves_out_where_results_went():
    words = ["--text", "a b", "--folder", "/somewhere", "--page", "x.md", "--render"]
    line = report.command_line("examples/train.py", words, ("--folder", "--page"))
    assert line == "examples/train.py --text 'a b' --render"


def test_a_region_is_filled_between_its_markers():
    assert report.filled("a\n<b>\nold\n<e>\nc\n", "<b>", "<e>", "new") == "a\n<b>\nnew\n<e>\nc\n"

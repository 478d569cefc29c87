"""The translation of headers fails closed: new PTX, or PTX that changed, is an error."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import translate

from fp4gemm.render import template_dir


@pytest.fixture
def headers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A copy of the package's headers that a test may edit."""
    shutil.copytree(template_dir() / "include", tmp_path / "templates/include")
    monkeypatch.setattr(translate, "template_dir", lambda: tmp_path / "templates")
    return tmp_path / "templates/include/fp4gemm"


def test_headers_as_they_are(headers: Path, tmp_path: Path) -> None:
    translate.translate(tmp_path / "out")
    names = {path.name for path in (tmp_path / "out/fp4gemm").iterdir()}
    assert {"packed_mma.hpp", "packed_wgmma.hpp", "async.hpp"} <= names


def test_new_ptx_is_an_error(headers: Path, tmp_path: Path) -> None:
    path = headers / "packed_gemm.hpp"
    path.write_text(path.read_text() + '\ninline void f() { asm volatile("nanosleep.u32 1;"); }\n')
    with pytest.raises(ValueError, match=r"packed_gemm\.hpp: PTX without a translation"):
        translate.translate(tmp_path / "out")


def test_a_rule_that_finds_nothing_is_an_error(headers: Path, tmp_path: Path) -> None:
    path = headers / "packed_gemm.hpp"
    path.write_text(path.read_text().replace("movmatrix", "other"))
    with pytest.raises(ValueError, match=r"packed_gemm\.hpp: nothing matches"):
        translate.translate(tmp_path / "out")

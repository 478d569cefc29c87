"""The overlay on CUTLASS's headers: what it changes, and that a CUTLASS it does not know is refused."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

import overlay
import pytest

from fp4gemm import toolchain
from fp4gemm.toolchain import ToolchainError

try:
    CUTLASS = toolchain.cutlass_include()
except ToolchainError as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A CUTLASS of version 9.9.9 that a test may change."""
    for name in (*overlay.EDITS, "cutlass/version.h"):
        target = tmp_path / "cutlass" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text((CUTLASS / name).read_text())
    version = tmp_path / "cutlass/cutlass/version.h"
    version.write_text("#define CUTLASS_MAJOR 9\n#define CUTLASS_MINOR 9\n#define CUTLASS_PATCH 9\n")
    return tmp_path / "cutlass"


@pytest.mark.parametrize("name", overlay.EDITS)
def test_without_emulation_an_overlay_changes_nothing(name: str, tmp_path: Path) -> None:
    """Every line it adds or changes is the include, in a branch of FP4GEMM_EMULATE, or a name of a type."""
    before = (CUTLASS / name).read_text().splitlines()
    after = (overlay.make(tmp_path) / name).read_text()
    inert = re.sub(r"#if defined\(FP4GEMM_EMULATE\)\n.*?#elif", "#if", after, flags=re.DOTALL)
    changed = [line for line in difflib.ndiff(before, inert.splitlines()) if line[0] in "+-"]
    changed = [line for line in changed if line[1:].strip() and not line.split()[1].startswith("#if")]
    include = "+ #include <emulation/blackwell.hpp>"
    assert changed[0] == include
    if name != "cute/atom/copy_traits_sm90_tma.hpp":
        assert changed == [include]
    else:  # which only an emulated build has anyway
        assert sum("TmaType<" in line for line in changed if line[0] == "+") == 3
        assert len(changed) == 8


@pytest.mark.parametrize("name", overlay.EDITS)
def test_every_edit_refuses_a_header_that_changed(name: str, copy: Path, tmp_path: Path) -> None:
    text = (CUTLASS / name).read_text()
    for edit in overlay.EDITS[name]:
        begins = re.search(edit.begins, text, re.MULTILINE)
        assert begins
        looked_for = f"#if defined({edit.guard})" if isinstance(edit, overlay.Guarded) else edit.old
        at = text.index(looked_for, begins.end())
        for changed in (
            text[:at] + text[at + len(looked_for) :],  # what it looks for is gone
            text[: begins.start()] + text[begins.end() :],  # where it looks is gone
            text[: begins.end()] + "\n}\n" + begins[0] + text[begins.end() :],  # or there twice
        ):
            (copy / name).write_text(changed)
            with pytest.raises(overlay.OverlayError, match=rf"CUTLASS 9\.9\.9 cannot be emulated: {re.escape(name)}: "):
                overlay.make(tmp_path / "overlay", copy)


def test_a_missing_header_is_refused(copy: Path, tmp_path: Path) -> None:
    (copy / "cutlass/arch/barrier.h").unlink()
    with pytest.raises(overlay.OverlayError, match=r"CUTLASS 9\.9\.9 cannot be emulated: cutlass/arch/barrier\.h"):
        overlay.make(tmp_path / "overlay", copy)


def test_an_overlay_is_the_same_each_time(copy: Path, tmp_path: Path) -> None:
    one, two = overlay.make(tmp_path / "one"), overlay.make(tmp_path / "two", copy)
    names = sorted(str(path.relative_to(one)) for path in one.rglob("*") if path.is_file())
    assert names == sorted([*overlay.EDITS, "emulation/blackwell.hpp"])
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in names)

#!/usr/bin/env python3
"""Renders what the repository keeps rendered, or checks that it is up to date.

    python tools/render.py           writes
    python tools/render.py --check   writes nothing; exit code 1 and a summary of differences when there are any

(a) generated/<spec name>.cu: the sources of the default kernel variants, so that a template change shows as a diff;
(b) README.md and docs/*.md: the text between `<!-- measurements:begin -->` and `<!-- measurements:end -->`, from the
    newest docs/measurements/*.json. README gets a summary, docs get every row.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a checkout renders itself, whatever is installed

from fp4gemm import report  # noqa: E402
from fp4gemm.bench import tables  # noqa: E402

BEGIN, END = "<!-- measurements:begin -->", "<!-- measurements:end -->"
_SHOWN_LINES = 12  # of each file's diff


class RegionError(ValueError):
    """Markers of a measurements region that are missing, doubled or in the wrong order."""


@dataclass(frozen=True)
class File:
    """A file that is rendered: `want` None means that it should not be there."""

    path: Path
    want: str | None

    @property
    def got(self) -> str | None:
        return self.path.read_text(encoding="utf-8") if self.path.exists() else None


# --- generated/ -------------------------------------------------------------------------------------------------------


def sources() -> dict[str, str]:
    """File name -> text of every default variant."""
    from fp4gemm.render import render
    from fp4gemm.variants import default_variants

    return {f"{spec.name}.cu": render(spec) for spec in default_variants()}


def generated_files(root: Path, rendered: Mapping[str, str]) -> list[File]:
    """What generated/ should hold, and what it holds beyond that."""
    folder = root / "generated"
    extra = sorted(path for path in folder.glob("*.cu") if path.name not in rendered)
    return [File(folder / name, text) for name, text in sorted(rendered.items())] + [File(path, None) for path in extra]


# --- measurements -----------------------------------------------------------------------------------------------------


Documents = list[tuple[Path, dict[str, Any]]]


def newest_with(bench: str, documents: Documents) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole run that has rows of this bench, not a `--quick` one; `documents` come newest first."""
    whole = (item for item in documents if report.is_whole(item[1]))
    return next((item for item in whole if any(row["bench"] == bench for row in item[1]["rows"])), None)


def _heading(path: Path, document: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    tests = document["tests"]
    copied = f"; copy bandwidth {document['copy_tb_s']:.2f} TB/s" if document["copy_tb_s"] else ""
    counts = f"; tests: {tests['passed']} passed, {tests['failed']} failed, {tests['skipped']} skipped"
    counts += f" in {tests['seconds']:.0f} s" if tests.get("seconds") else ""
    return (
        f"{document['gpu']}, driver {document['driver']}, {versions}{copied}; "
        f"{document['date'][:10]}, commit {document['commit'][:12]}{' (modified)' if document['dirty'] else ''}"
        f"{counts if any(tests[name] for name in ('passed', 'failed', 'skipped')) else ''} (`{path.name}`)."
    )


def measurements(documents: Documents, summary: bool) -> str:
    """The Markdown between the markers: one table per bench, each under the run that it comes from."""
    if not documents:
        return "No measurements yet."
    parts: list[str] = []
    for bench in tables.TABLES:
        found = newest_with(bench, documents)
        for table in tables.of(bench, found[1]["rows"], summary) if found else []:
            heading = _heading(*found)
            parts += [heading] if heading not in parts else []
            parts += [f"**{table.title}**", tables.markdown(table), *([table.note] if table.note else [])]
    return "\n\n".join(parts) if parts else "No measurements yet."


def replace_region(text: str, body: str, name: str) -> str:
    """`text` with the region's content replaced. Raises RegionError that names the file unless there is exactly one."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise RegionError(f"{name}: expected one line {BEGIN} and, below it, one line {END}")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{body}\n{END}{rest.split(END)[1]}"


def measured_files(root: Path) -> list[File]:
    """README.md, which must have a region, and every file of docs/ that has one."""
    documents = report.read_all(root / "docs" / "measurements")
    pages = [root / "README.md", *sorted((root / "docs").rglob("*.md"))]
    return list(_measured_pages(root, pages, documents))


def _measured_pages(root: Path, pages: list[Path], documents: Documents) -> Iterator[File]:
    for page in pages:
        readme = page.name == "README.md" and page.parent == root
        text = page.read_text(encoding="utf-8") if page.exists() else ""
        if readme or any(line.strip() in (BEGIN, END) for line in text.splitlines()):
            body = measurements(documents, summary=readme)
            yield File(page, replace_region(text, body, str(page.relative_to(root))))


# --- check and write --------------------------------------------------------------------------------------------------


def describe(file: File, root: Path) -> str | None:
    """One paragraph on how a file differs from what it should be; None when it does not."""
    name, got, want = file.path.relative_to(root), file.got, file.want
    if got == want:
        return None
    if want is None:
        return f"extra: {name} is rendered by no default variant"
    if got is None:
        return f"missing: {name}"
    lines = [
        *difflib.unified_diff(got.splitlines(), want.splitlines(), f"{name}", f"{name} (rendered)", n=1, lineterm="")
    ]
    rest = len(lines) - _SHOWN_LINES
    shown = lines[:_SHOWN_LINES] + ([f"... {rest} more lines of diff"] if rest > 0 else [])
    return "\n  ".join([f"stale: {name}", *shown])


def write(file: File) -> None:
    """Makes the file what it should be."""
    if file.want is None:
        file.path.unlink()
        return
    file.path.parent.mkdir(parents=True, exist_ok=True)
    file.path.write_text(file.want, encoding="utf-8")


def main(arguments: list[str] | None = None, root: Path = ROOT, rendered: Mapping[str, str] | None = None) -> int:
    """0: everything is up to date (or was written); 1: --check found differences; 2: a file cannot be rendered."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 when something is out of date")
    check = parser.parse_args(arguments).check
    try:
        files = [*generated_files(root, sources() if rendered is None else rendered), *measured_files(root)]
    except (RegionError, report.ReportError) as error:
        print(f"tools/render.py: {error}", file=sys.stderr)
        return 2
    different = [(file, text) for file in files if (text := describe(file, root)) is not None]
    for file, text in different:
        print(text if check else text.splitlines()[0])
        if not check:
            write(file)
    if check and different:
        print(f"{len(different)} of {len(files)} rendered files are out of date; run: python tools/render.py")
        return 1
    print(f"{len(files)} rendered files, {len(different)} {'out of date' if check else 'written'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

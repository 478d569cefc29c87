"""The reporter: measured rows become one JSON file per run, `docs/measurements/<bench>-<gpu>-<date>.json`.

Tables and plots are rendered from these files (`tools/render.py`, `tools/plot.py`): a figure without such a file does
not exist. A document is checked before it is written, so a half-filled row cannot reach the tables.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from fp4gemm.files import gpu_slug, write_whole
from fp4gemm.provenance import Environment

SCHEMA = 1
DATE_FORMAT = "%Y-%m-%dT%H:%M:%SZ"
Row = dict[str, Any]

Check = Callable[[Any], bool]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_map(value: Any) -> bool:
    return isinstance(value, Mapping)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_amount(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def _is_positive(value: Any) -> bool:
    return _is_amount(value) and value > 0


def _are_times(value: Any) -> bool:
    return _is_map(value) and all(_is_name(name) and _is_positive(time) for name, time in value.items())


def _are_texts(value: Any) -> bool:
    return _is_map(value) and all(_is_name(name) and _is_text(text) for name, text in value.items())


def _is_date(value: Any) -> bool:
    try:
        datetime.strptime(value, DATE_FORMAT)
    except (TypeError, ValueError):
        return False
    return True


# A field's name says its kind, whatever the row.
_KINDS: dict[str, Check] = {
    **dict.fromkeys(
        ("M", "N", "K", "experts", "bytes", "registers", "spill_bytes", "smem_bytes", "seed", "steps"), _is_count
    ),
    **dict.fromkeys(("passed", "failed", "skipped"), _is_count),
    **dict.fromkeys(("layer", "tokens", "held_out_tokens"), _is_count),
    **dict.fromkeys(("us", "ms"), _is_positive),
    **dict.fromkeys(("weight_error", "block_error", "hessian_error", "output_error"), _is_positive),
    **dict.fromkeys(("process_us", "rel_error", "seconds", "peak_mb", "copy_tb_s"), _is_amount),
    **dict.fromkeys(("train_loss", "val_loss", "ratio", "limit_ratio", "quantize_cost", "tb_s", "tflop_s"), _is_amount),
    **dict.fromkeys(
        ("arch", "layout", "a", "b", "epilogue", "mode", "kernel", "dtype", "op", "metric", "recipe", "routing"),
        _is_name,
    ),
    **dict.fromkeys(("commit", "gpu", "driver", "linear", "method"), _is_name),
    **dict.fromkeys(("dirty", "identical_to_exhaustive"), _is_bool),
    **dict.fromkeys(("options", "tests"), _is_map),
    "vs_us": _are_times,
    "versions": _are_texts,
    "command": _is_text,
    "date": _is_date,
    "rows": lambda value: isinstance(value, list),
    "schema": lambda value: value == SCHEMA,
    "bench": lambda value: value == "all" or value in ROW_FIELDS,
}
_QUANTIZE_FIELDS = ("M", "K", "dtype", "options", "mode", "us", "bytes", "vs_us")
_COMPILE_FIELDS = ("seconds", "peak_mb", "registers", "spill_bytes", "smem_bytes")
_QUALITY_FIELDS = ("weight_error", "block_error", "hessian_error", "output_error")
# What every row of a bench must have; a row may carry more.
ROW_FIELDS: dict[str, tuple[str, ...]] = {
    "quantize": _QUANTIZE_FIELDS,
    "dequantize": _QUANTIZE_FIELDS,
    "tiles": (*_QUANTIZE_FIELDS, "kernel"),
    "gemm": ("arch", "layout", "M", "N", "K", "a", "b", "epilogue", "mode", "kernel", "us", "vs_us", "rel_error"),
    "selection": ("arch", "M", "N", "K", "mode", "kernel", "options", "us", "vs_us"),
    "sweep": ("op", "layout", "M", "N", "K", "dtype", "options", "mode", "us", "vs_us"),
    "grouped": ("op", "experts", "M", "N", "K", "routing", "mode", "kernel", "us", "vs_us", "rel_error"),
    "quantize_grouped": ("experts", "M", "K", "routing", "options", "mode", "us", "bytes", "vs_us"),
    "overhead": ("op", "M", "N", "K", "us", "process_us", "vs_us"),
    "load": ("kernel", "arch", "ms"),
    "training": ("recipe", "options", "seed", "steps", "train_loss", "val_loss", "seconds", "curve"),
    "quality": ("layer", "linear", "N", "K", "method", "options", "tokens", *_QUALITY_FIELDS, "seconds"),
    "search": ("metric", "N", "K", "us", "vs_us", "identical_to_exhaustive"),
    "compile": ("kernel", "arch", *_COMPILE_FIELDS),
    "emulated": ("kernel", "arch", *_COMPILE_FIELDS),
}
_TEST_FIELDS = ("passed", "failed", "skipped", "command")


def utc_now() -> str:
    """The time now, UTC, as the documents write it."""
    return datetime.now(UTC).strftime(DATE_FORMAT)


class ReportError(ValueError):
    """A measurement document that breaks the format; the message lists every problem."""


@dataclass(frozen=True)
class TestCounts:
    """The outcome of the tests that belong to a measurement run; `seconds` of all of them, 0 where not timed."""

    __test__ = False  # the name starts with "Test": keep pytest from collecting it

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    command: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Report:
    """One run. `copy_tb_s` is the copy bandwidth in TB/s (bytes read + written) measured in the same process; 0 where
    nothing ran on a GPU."""

    bench: str
    command: str
    environment: Environment
    copy_tb_s: float
    rows: list[Row]
    tests: TestCounts = field(default_factory=TestCounts)
    date: str = field(default_factory=utc_now)

    def document(self) -> dict[str, Any]:
        """The JSON document, in the order of the format's description."""
        env = self.environment
        return {
            "schema": SCHEMA,
            "bench": self.bench,
            "command": self.command,
            "commit": env.commit,
            "dirty": env.dirty,
            "date": self.date,
            "gpu": env.gpu,
            "driver": env.driver,
            "versions": dict(env.versions),
            "copy_tb_s": self.copy_tb_s,
            "rows": [dict(row) for row in self.rows],
            "tests": vars(self.tests).copy(),
        }


def compile_row(kernel: str, arch: str, meta: Mapping[str, Any], bench: str = "compile") -> Row:
    """The row of a kernel whose cache entry has this meta data."""
    return {"bench": bench, "kernel": kernel, "arch": arch, **{name: meta[name] for name in _COMPILE_FIELDS}}


# --- validation -------------------------------------------------------------------------------------------------------


_TOP_FIELDS = (
    *("schema", "bench", "command", "commit", "dirty", "date", "gpu", "driver", "versions"),
    *("copy_tb_s", "rows", "tests"),
)


def _field_problems(where: str, got: Any, required: Sequence[str]) -> list[str]:
    if not isinstance(got, Mapping):
        return [f"{where}: expected an object, got {type(got).__name__}"]
    missing = [f"{where}: field '{name}' is missing" for name in required if name not in got]
    wrong = [
        f"{where}: field '{name}' cannot be {got[name]!r}"
        for name in got
        if name in _KINDS and not _KINDS[name](got[name])
    ]
    return missing + wrong


def _row_problems(index: int, row: Any) -> list[str]:
    where = f"rows[{index}]"
    bench = row.get("bench") if isinstance(row, Mapping) else None
    if bench not in ROW_FIELDS:
        return [f"{where}: field 'bench' must be one of {', '.join(ROW_FIELDS)}, got {bench!r}"]
    return _field_problems(where, row, ROW_FIELDS[bench])


def problems(document: Any) -> list[str]:
    """Everything that is wrong with a measurement document; empty when it follows the format."""
    found = _field_problems("document", document, _TOP_FIELDS)
    if not isinstance(document, Mapping):
        return found
    rows = document.get("rows")
    for index, row in enumerate(rows if isinstance(rows, list) else []):
        found += _row_problems(index, row)
    if isinstance(document.get("tests"), Mapping):
        found += _field_problems("tests", document["tests"], _TEST_FIELDS)
    return found


def validate(document: Any) -> None:
    """Raises ReportError, naming every problem, when `document` breaks the format."""
    found = problems(document)
    if found:
        raise ReportError("not a measurement document:\n  " + "\n  ".join(found))


# --- files ------------------------------------------------------------------------------------------------------------


def file_name(document: Mapping[str, Any]) -> str:
    """`<bench>-<gpu>-<date>.json`."""
    return f"{document['bench']}-{gpu_slug(document['gpu'])}-{document['date'][:10]}.json"


def is_whole(document: Mapping[str, Any]) -> bool:
    """Whether a run measured all that its bench has: tables and plots are not made from `--quick` ones."""
    return "--quick" not in str(document["command"]).split()


def free_path(folder: Path, name: str) -> Path:
    """`folder/name`, or the same with -2, -3, ... before the suffix: a run never overwrites another run of the day."""
    path, count = folder / name, 1
    while path.exists():
        count += 1
        path = folder / f"{Path(name).stem}-{count}{Path(name).suffix}"
    return path


def write(document: Mapping[str, Any], path: Path) -> Path:
    """Validates, then writes `path` whole or not at all."""
    validate(document)
    write_whole(path, json.dumps(document, indent=1, allow_nan=False) + "\n")
    return path


def read(path: Path) -> dict[str, Any]:
    """A validated document. Raises ReportError that names the file when it is not one."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        validate(document)
    except (json.JSONDecodeError, ReportError) as error:
        raise ReportError(f"{path}: {error}") from error
    return dict(document)


def read_all(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Every document of a folder, newest first (by the date inside, then by name)."""
    found = [(path, read(path)) for path in sorted(folder.glob("*.json"))]
    return sorted(found, key=lambda item: (item[1]["date"], item[0].name), reverse=True)


def newest(folder: Path, bench: str) -> tuple[Path, dict[str, Any]] | None:
    """The newest document of a folder with rows of this bench; None where there is none."""
    documents = read_all(folder) if folder.is_dir() else []
    return next(((path, d) for path, d in documents if any(row["bench"] == bench for row in d["rows"])), None)


def filled(page: str, begin: str, end: str, text: str) -> str:
    """``page`` with ``text`` between the two markers."""
    before, _, rest = page.partition(begin)
    return f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}"


def command_line(script: str, words: Sequence[str], without: Sequence[str]) -> str:
    """What a document says was run; options in ``without``, and their values, say only where results went."""
    kept = [word for at, word in enumerate(words) if word not in without and (at == 0 or words[at - 1] not in without)]
    return shlex.join([script, *kept])


def read_tests(path: Path) -> TestCounts:
    """Test counts from `{"passed", "failed", "skipped", "command"}` JSON, or from the XML of `pytest --junitxml`."""
    if path.suffix == ".xml":
        return _read_junit(path)
    try:
        got = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ReportError(f"{path}: {error}") from error
    found = _field_problems(str(path), got, _TEST_FIELDS)
    if found:
        raise ReportError("\n".join(found))
    return TestCounts(**{name: got[name] for name in _TEST_FIELDS})


def _read_junit(path: Path) -> TestCounts:
    total = failed = skipped = 0
    for suite in ElementTree.parse(path).getroot().iter("testsuite"):
        total += int(suite.get("tests", 0))
        failed += int(suite.get("failures", 0)) + int(suite.get("errors", 0))
        skipped += int(suite.get("skipped", 0))
    return TestCounts(total - failed - skipped, failed, skipped, f"pytest --junitxml={path.name}")

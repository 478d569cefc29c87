"""safetensors files, one tensor at a time: a model of any size passes through the memory of its largest tensor.

The safetensors package reads them lazily but can only write what is all in memory. The format: the length of a header
(8 bytes, little endian), the header (JSON: dtype, shape and offsets by name, and text by name), then the tensors.
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import torch
from torch import Tensor

from fp4gemm.files import whole

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_METADATA = "__metadata__"
_CHUNK = 1 << 24


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: what it is, and how many bytes. A dtype that torch has no name for can only be copied."""

    name: str
    kind: str
    shape: tuple[int, ...]
    nbytes: int

    @classmethod
    def of(cls, name: str, dtype: torch.dtype, shape: Sequence[int]) -> Entry:
        return cls(name, _NAMES[dtype], tuple(shape), torch.Size(shape).numel() * dtype.itemsize)

    @property
    def dtype(self) -> torch.dtype | None:
        return _DTYPES.get(self.kind)


class Reader:
    """``with Reader(path) as file:`` has ``entries`` by name and ``metadata``; ``read`` gives a tensor on the CPU.

    Raises ValueError that names the file where it is not a whole safetensors file, and OSError.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stream = path.open("rb")
        try:
            self._read_header()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self._stream.close()
            raise ValueError(f"{path}: not a whole safetensors file: {error}") from error

    def _read_header(self) -> None:
        size = os.fstat(self._stream.fileno()).st_size
        length = int.from_bytes(self._stream.read(8), "little")
        if length > size - 8:
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        header = json.loads(self._stream.read(length))
        self.metadata: dict[str, str] = header.pop(_METADATA, None) or {}
        if not isinstance(self.metadata, dict):
            raise TypeError(f"{_METADATA}: expected an object, got {self.metadata!r}")
        self.entries: dict[str, Entry] = {}
        self._starts: dict[str, int] = {}
        for name, field in sorted(header.items(), key=lambda item: tuple(item[1]["data_offsets"])):
            start, end = field["data_offsets"]
            if not all(isinstance(size, int) and size >= 0 for size in field["shape"]):
                raise ValueError(f"{name}: a shape of {field['shape']}")
            entry = Entry(name, field["dtype"], tuple(field["shape"]), end - start)
            if not 0 <= start <= end <= size - 8 - length:
                raise ValueError(f"{name}: bytes {start} to {end} of {size - 8 - length}")
            if entry.dtype and Entry.of(name, entry.dtype, entry.shape).nbytes != entry.nbytes:
                raise ValueError(f"{name}: {entry.nbytes} bytes for {entry.kind} {list(entry.shape)}")
            self.entries[name], self._starts[name] = entry, 8 + length + start

    def read(self, name: str) -> Tensor:
        """A tensor of a dtype that torch has."""
        entry = self.entries[name]
        if entry.dtype is None:
            raise ValueError(f"{self.path}: {name}: torch has no dtype for {entry.kind}")
        if not entry.nbytes:
            return torch.empty(entry.shape, dtype=entry.dtype)
        buffer = bytearray(entry.nbytes)
        self._stream.seek(self._starts[name])
        self._stream.readinto(buffer)
        return torch.frombuffer(buffer, dtype=torch.uint8).view(entry.dtype).reshape(entry.shape)

    def copy(self, name: str, stream: IO[bytes]) -> None:
        """The bytes of a tensor of any dtype."""
        self._stream.seek(self._starts[name])
        left = self.entries[name].nbytes
        while left:
            chunk = self._stream.read(min(left, _CHUNK))
            stream.write(chunk)
            left -= len(chunk)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stream.close()


def write_header(stream: IO[bytes], entries: Sequence[Entry], metadata: Mapping[str, str]) -> None:
    """What stands before the tensors, which follow in the order of ``entries``. ValueError for a name given twice."""
    header: dict[str, object] = {_METADATA: dict(metadata)} if metadata else {}
    at = 0
    for entry in entries:
        if entry.name in header:
            raise ValueError(f"two tensors would be called {entry.name!r}")
        header[entry.name] = {
            "dtype": entry.kind, "shape": list(entry.shape), "data_offsets": [at, at + entry.nbytes]
        }  # fmt: skip
        at += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    stream.write(len(text).to_bytes(8, "little") + text)


def feed(t: Tensor, sink: Callable[[memoryview], object]) -> None:
    """Calls ``sink`` with the bytes of a tensor, which it must not keep."""
    t = t.detach().cpu().contiguous()
    if t.numel():
        sink(memoryview((ctypes.c_char * t.nbytes).from_address(t.data_ptr())))


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """A file of tensors that are in memory, in their order, whole or not at all."""
    with whole(path) as stream:
        write_header(stream, [Entry.of(name, t.dtype, t.shape) for name, t in tensors.items()], metadata or {})
        for t in tensors.values():
            feed(t, stream.write)


def read(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file, on the CPU."""
    with Reader(path) as file:
        return {name: file.read(name) for name in file.entries}

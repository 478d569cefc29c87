"""What a layer's inputs say about its weight: sums of x x^T, over as many batches and ranks as there are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fp4gemm import tensor_file
from fp4gemm.formats import SEARCH_BLOCKS
from fp4gemm.reference.arguments import FLOATS
from fp4gemm.search.factor import diagonal_blocks

_CHUNK = 1 << 24  # values at a time: their float32 copy stays below 64 MB


class HessianAccumulator:
    """Sums of x x^T over tokens x [K], for each block of columns, and for all of them if ``full``; float32.

    The squared error that replacing a weight W by W + D makes in the outputs of a layer, summed over the tokens, is
    the sum of d^T H d over the rows d of D. ``search_scales(w, "hessian", hessian=a.hessian())`` minimizes its block
    diagonal; feedback needs ``full``.
    """

    def __init__(
        self, k: int, *, block: int = 16, full: bool = False, device: torch.device | str | None = None
    ) -> None:
        """Raises ValueError where ``k`` is not positive or ``block`` is neither 16 nor 32."""
        if k < 1:
            raise ValueError(f"k: expected at least 1, got {k}")
        if block not in SEARCH_BLOCKS:
            raise ValueError(f"block: expected 16 or 32, got {block!r}")
        self.k, self.block, self.full = k, block, full
        units = -(-k // block)
        shape = (k, k) if full else (units, block, block)
        self.sum = torch.zeros(shape, dtype=torch.float32, device=device)
        self.tokens = 0

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Adds activations [..., K], bf16, fp16 or fp32; they are moved to the accumulator's device."""
        if x.dtype not in FLOATS:
            raise TypeError(f"x: expected bf16, fp16 or fp32, got {x.dtype}")
        if x.dim() < 1 or x.shape[-1] != self.k:
            raise ValueError(f"x: expected [..., {self.k}], got shape {tuple(x.shape)}")
        tokens = x.detach().reshape(-1, self.k)
        step = max(1, _CHUNK // self.k)
        with _exact_float32():
            for start in range(0, tokens.shape[0], step):
                self._add(tokens[start : start + step].to(self.sum.device).float())
        self.tokens += tokens.shape[0]

    def _add(self, x: Tensor) -> None:
        if self.full:
            self.sum.addmm_(x.t(), x)
            return
        blocks = F.pad(x, (0, -self.k % self.block)).reshape(x.shape[0], -1, self.block).transpose(0, 1)
        self.sum.baddbmm_(blocks.transpose(1, 2), blocks)

    def all_reduce(self, group: Any = None) -> None:
        """Sums over the ranks of a ``torch.distributed`` process group, each of which has it afterwards."""
        tokens = torch.tensor([self.tokens], dtype=torch.int64, device=self.sum.device)
        torch.distributed.all_reduce(self.sum, group=group)
        torch.distributed.all_reduce(tokens, group=group)
        self.tokens = int(tokens)

    def merge(self, other: HessianAccumulator) -> None:
        """Adds what another accumulator of the same shape has seen."""
        if (other.k, other.block, other.full) != (self.k, self.block, self.full):
            raise ValueError(
                f"other: expected k={self.k}, block={self.block}, full={self.full}, got k={other.k}, "
                f"block={other.block}, full={other.full}"
            )
        self.sum += other.sum.to(self.sum.device)
        self.tokens += other.tokens

    def hessian(self, *, damping: float = 0.0, normalize: bool = True) -> Tensor:
        """float32 [ceil(K / block), block, block]: the mean over tokens, or the sum; columns past K are 0.

        ``damping``: this times the mean of a block's diagonal is added to its diagonal, which keeps it regular.
        """
        return _damped(self._blocks() / self._divisor(normalize), damping)

    def full_hessian(self, *, damping: float = 0.0, normalize: bool = True) -> Tensor:
        """float32 [K, K], the same of all columns. Raises ValueError without ``full``."""
        if not self.full:
            raise ValueError("full_hessian: expected an accumulator made with full=True")
        return _damped((self.sum / self._divisor(normalize)).unsqueeze(0), damping).squeeze(0)

    def _divisor(self, normalize: bool) -> int:
        return max(1, self.tokens) if normalize else 1

    def _blocks(self) -> Tensor:
        return diagonal_blocks(self.sum, self.block) if self.full else self.sum

    def state_dict(self) -> dict[str, Tensor]:
        """``sum`` and ``meta`` (int64: k, block, full, tokens); :meth:`from_state_dict` reads them."""
        return {"sum": self.sum, "meta": torch.tensor([self.k, self.block, int(self.full), self.tokens])}

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, Tensor], device: torch.device | str | None = None
    ) -> HessianAccumulator:
        """Inverse of :meth:`state_dict`. Raises KeyError or ValueError where it is not one."""
        k, block, full, tokens = state["meta"].tolist()
        found = cls(k, block=block, full=bool(full), device=device if device is not None else state["sum"].device)
        if state["sum"].shape != found.sum.shape:
            raise ValueError(f"state: expected sums {tuple(found.sum.shape)}, got {tuple(state['sum'].shape)}")
        found.sum.copy_(state["sum"])
        found.tokens = tokens
        return found

    def save(self, path: str | Path) -> None:
        """As a safetensors file, whole or not at all."""
        tensor_file.write(Path(path), self.state_dict())

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str | None = None) -> HessianAccumulator:
        """What :meth:`save` wrote. Raises ValueError or KeyError where it is not that."""
        return cls.from_state_dict(tensor_file.read(Path(path)), device)


def _damped(h: Tensor, damping: float) -> Tensor:
    """[n, m, m]."""
    if not damping:
        return h
    mean = h.diagonal(dim1=1, dim2=2).mean(-1, keepdim=True) * damping
    return h + torch.diag_embed(mean.expand(-1, h.shape[-1]))


@contextmanager
def _exact_float32() -> Iterator[None]:
    """No TF32: ten bits of x would do for a Hessian, but not for one that is the same everywhere."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before

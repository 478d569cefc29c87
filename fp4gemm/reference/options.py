"""What the options of ``quantize`` accept, alone and together. Every check raises TypeError or ValueError.

Nothing here reads tensor data.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fp4gemm.formats import ADAPTIVE, BLOCK, PRODUCERS, RESIDUAL_SIDES, QuantizeOptions

ENCODE_CONVENTIONS = ("te_per_token", "te")
"""Those with an S, in whose units 4/6 and companion blocks measure errors."""


def check_name(argument: str, name: str, known: tuple[str, ...]) -> None:
    """Raises ValueError unless ``name`` is one of ``known``."""
    if name not in known:
        raise ValueError(f"{argument}: expected one of {', '.join(known)}, got {name!r}")


def check_options(options: QuantizeOptions, convention: str, block: tuple[int, int], transposed: bool) -> None:
    """Checks options against each other, the convention, the block and the orientation."""
    if options.hadamard is not None:
        check_mask(options.hadamard)
        if not transposed:
            raise ValueError("hadamard: needs transposed=True, as only a transposed result is transformed, got False")
    if options.adaptive is not None:
        check_name("adaptive", options.adaptive, ADAPTIVE)
        if options.hadamard is not None or options.stochastic or options.residual:
            raise ValueError(f"adaptive: expected None beside hadamard, seed or residual, got {options.adaptive!r}")
    if options.residual != 0:
        check_columns(options.residual)
        if options.hadamard is not None or block != (1, BLOCK):
            raise ValueError(f"residual: expected 0 beside hadamard or 16 x 16 blocks, got {options.residual}")
    if (options.adaptive is not None or options.residual) and convention not in ENCODE_CONVENTIONS:
        name = "residual" if options.residual else "adaptive"
        raise ValueError(f"convention: expected one of {', '.join(ENCODE_CONVENTIONS)} with {name}, got {convention!r}")
    check_name("residual_side", options.residual_side, RESIDUAL_SIDES)


def check_producer(
    options: QuantizeOptions, x: Tensor, block: tuple[int, int], transposed: bool, channel_order: Tensor | None
) -> None:
    """Checks what makes the quantized values of x [M, columns] against the other arguments."""
    if options.producer is None:
        return
    check_name("producer", options.producer, PRODUCERS)
    if transposed or block != (1, BLOCK) or channel_order is not None:
        raise ValueError(
            f"producer: expected None beside transposed, 16 x 16 blocks or channel_order, got {options.producer!r}"
        )
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise TypeError(f"x.dtype: expected torch.bfloat16, float16 or float32 with a producer, got {x.dtype}")
    if options.producer == "silu_mul" and x.shape[1] % 2:
        raise ValueError(f"x: expected [M, 2 K] for silu_mul, gate and up, got shape {tuple(x.shape)}")


def check_mask(hadamard: int) -> None:
    """Checks a mask of 16 signs."""
    if not isinstance(hadamard, int) or isinstance(hadamard, bool):
        raise TypeError(f"hadamard: expected an int (a mask of 16 signs) or None, got {type(hadamard).__name__}")
    if not 0 <= hadamard < 1 << BLOCK:
        raise ValueError(f"hadamard: expected a mask in 0..65535, got {hadamard}")


def check_seed(seed: Tensor | int | None, device: torch.device) -> None:
    """Checks a seed: an int, or a tensor on ``device``."""
    if seed is None:
        return
    if isinstance(seed, Tensor):
        check_scalar("seed", seed, (torch.int64,), device)
    elif not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"seed: expected an int, an int64 tensor or None, got {type(seed).__name__}")
    elif not 0 <= seed < 1 << 63:
        raise ValueError(f"seed: expected 0..2**63-1, got {seed}")


def check_scalar(name: str, t: Tensor, dtypes: tuple[torch.dtype, ...], device: torch.device) -> None:
    """Checks a tensor of one element."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor or None, got {type(t).__name__}")
    if t.dtype not in dtypes:
        raise TypeError(f"{name}: expected dtype {' or '.join(map(str, dtypes))}, got {t.dtype}")
    if tuple(t.shape) not in ((), (1,)):
        raise ValueError(f"{name}: expected shape [] or [1], got {list(t.shape)}")
    if t.device != device:
        raise ValueError(f"{name}: expected device {device} (that of x), got {t.device}")


def check_columns(residual: int) -> None:
    """Checks how many columns have companions."""
    if not isinstance(residual, int) or isinstance(residual, bool):
        raise TypeError(f"residual: expected an int, got {type(residual).__name__}")
    if residual < 0 or residual % BLOCK:
        raise ValueError(f"residual: expected a multiple of {BLOCK}, at least 0, got {residual}")


def check_residual(options: QuantizeOptions, source: Tensor, channel_order: Tensor | None) -> None:
    """Checks companions and ``channel_order`` against ``source``, of which both take columns."""
    k = options.columns(source.shape[1])
    if options.residual and k % BLOCK:
        raise ValueError(f"x: expected K to be a multiple of {BLOCK} with a residual, got {k}")
    if options.residual > k:
        raise ValueError(f"residual: expected at most K = {k}, got {options.residual}")
    if channel_order is not None:
        _check_channel_order(channel_order, options, source)


def _check_channel_order(order: Tensor, options: QuantizeOptions, source: Tensor) -> None:
    if not options.residual:
        raise ValueError("channel_order: expected None without a residual, got one")
    if not isinstance(order, Tensor):
        raise TypeError(f"channel_order: expected a torch.Tensor or None, got {type(order).__name__}")
    if order.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"channel_order: expected dtype torch.int64 or torch.int32, got {order.dtype}")
    if tuple(order.shape) != (source.shape[1],):
        raise ValueError(f"channel_order: expected shape [{source.shape[1]}] (K of x), got {list(order.shape)}")
    if order.device != source.device:
        raise ValueError(f"channel_order: expected device {source.device} (that of x), got {order.device}")

"""Layers under DDP and FSDP2, sums of Hessians: two processes do what one does, with gloo on the CPU or NCCL on GPUs.

`run` starts the processes, each of which runs this file: `distributed_cases.py DEVICE CASE...`.
"""

from __future__ import annotations

import copy
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from fp4gemm.nn import convert, micro_batches, per_token
from fp4gemm.search import HessianAccumulator

RECIPE = per_token(rht=True, weight_2d=True)
STEPS, MICRO_BATCHES, ROWS = 3, 2, 16
DEVICE = torch.device("cpu")  # in a process that `run` started: its own


def run(kind: str, *cases: str) -> None:
    """Fails with the output of the rank that did; ``kind``: cpu or cuda."""
    here = Path(__file__).resolve()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    if kind == "cpu":
        shared["CUDA_VISIBLE_DEVICES"] = ""
    path = os.pathsep.join(filter(None, (str(here.parents[1]), os.environ.get("PYTHONPATH"))))
    ranks = [
        subprocess.Popen(
            [sys.executable, str(here), kind, *cases],
            env={**os.environ, **shared, "RANK": str(rank), "PYTHONPATH": path},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        outputs = [rank.communicate(timeout=240)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, output in zip(ranks, outputs, strict=True):
        assert rank.returncode == 0, output
        assert all(f"passed {case}" in output for case in cases), output


def model() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(2)]
    return convert(nn.Sequential(*layers), RECIPE).to(DEVICE)


def batch(step: int, micro_batch: int, rank: int) -> torch.Tensor:
    seed = 100 * step + 10 * micro_batch + rank
    return torch.randn(ROWS, 32, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def loss(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return F.mse_loss(net(x).float(), x.flip(0).float()) / MICRO_BATCHES


def reference(ranks: int, dtype: torch.dtype) -> list[dict[str, torch.Tensor]]:
    """Weights after each step of one process that sees every rank's data."""
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, fused=True)
    history = []
    for step in range(STEPS):
        for micro_batch in range(MICRO_BATCHES):
            for rank in range(ranks):
                used = net if dtype == torch.float32 else copy.deepcopy(net).to(dtype)
                (loss(used, batch(step, micro_batch, rank).to(dtype)) / ranks).backward()
                if used is not net:
                    for p, q in zip(net.parameters(), used.parameters(), strict=True):
                        p.grad = q.grad.float() + (0 if p.grad is None else p.grad)
        optimizer.step()
        optimizer.zero_grad()
        history.append({name: p.detach().clone() for name, p in net.named_parameters()})
    return history


def train(net: nn.Module, set_sync, dtype: torch.dtype) -> list[dict[str, torch.Tensor]]:
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, fused=True)
    history = []
    for step in range(STEPS):
        with micro_batches():
            for micro_batch in range(MICRO_BATCHES):
                set_sync(micro_batch == MICRO_BATCHES - 1)
                loss(net, batch(step, micro_batch, dist.get_rank()).to(dtype)).backward()
        optimizer.step()
        optimizer.zero_grad()
        full = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in net.named_parameters()}
        history.append({name.removeprefix("module."): p.detach().clone() for name, p in full.items()})
    return history


def compare(got: list[dict[str, torch.Tensor]], want: list[dict[str, torch.Tensor]], tolerance: float) -> None:
    for step, (one, other) in enumerate(zip(got, want, strict=True)):
        for name, p in other.items():
            error = float((one[name] - p).norm() / p.norm())
            assert error < tolerance, f"step {step}, {name}: {error}"


def ddp() -> None:
    net = DistributedDataParallel(model())

    def set_sync(last: bool) -> None:
        net.require_backward_grad_sync = last

    compare(train(net, set_sync, torch.float32), reference(2, torch.float32), 1e-3)


def fsdp(reshard: bool, dtype: torch.dtype = torch.float32) -> None:
    net = model()
    options = {"reshard_after_forward": reshard}
    if dtype != torch.float32:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layer in net:
        fully_shard(layer, **options)
    fully_shard(net, **options)

    def set_sync(last: bool) -> None:
        net.set_requires_gradient_sync(last)

    history = train(net, set_sync, dtype)
    compare(history, reference(2, dtype), 1e-3 if dtype == torch.float32 else 1e-2)
    # In eval mode too, where FSDP gathers new weights into the parameter that it had.
    net.eval()
    x = batch(9, 0, 0)
    alone = model().eval()
    for state in (history[-1], {name: 2 * p for name, p in history[-1].items()}):
        alone.load_state_dict(state)
        for module in filter(lambda m: isinstance(m, FSDPModule), net.modules()):
            module.reshard()
        with torch.no_grad():
            for name, p in net.named_parameters():
                p.copy_(torch.distributed.tensor.distribute_tensor(state[name], p.device_mesh, p.placements))
            got, want = net(x.to(dtype)), alone.to(dtype)(x.to(dtype))
        alone.float()
        assert torch.equal(got, want)


def hessian() -> None:
    """Each rank has seen its own tokens; afterwards both have the sums of one that has seen all."""
    for full in (False, True):
        whole, mine = (HessianAccumulator(32, full=full, device=DEVICE) for _ in range(2))
        for step in range(3):  # ranks with different numbers of batches
            for rank in range(2):
                x = batch(step, 0, rank)[: ROWS - 5 * rank]
                whole.add(x)
                if rank == dist.get_rank():
                    mine.add(x)
        assert mine.tokens < whole.tokens
        mine.all_reduce()
        assert mine.tokens == whole.tokens
        torch.testing.assert_close(mine.hessian(), whole.hessian(), rtol=1e-5, atol=1e-5)
        both = [torch.empty_like(mine.sum) for _ in range(2)]
        dist.all_gather(both, mine.sum)
        assert torch.equal(*both)


CASES = {
    "hessian": hessian,
    "ddp": ddp,
    "fsdp": lambda: fsdp(reshard=True),
    "fsdp_keeping": lambda: fsdp(reshard=False),
    "fsdp_bf16": lambda: fsdp(reshard=True, dtype=torch.bfloat16),
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    kind, *names = sys.argv[1:]
    if kind == "cuda":
        DEVICE = torch.device("cuda", int(os.environ["RANK"]))
        torch.cuda.set_device(DEVICE)
    dist.init_process_group("gloo" if kind == "cpu" else "nccl")
    try:
        for case in names:
            CASES[case]()
            print(f"passed {case}", flush=True)
    finally:
        dist.destroy_process_group()

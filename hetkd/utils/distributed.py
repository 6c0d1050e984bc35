"""Sums, concatenations and agreements over all processes; no-ops in a single process."""

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Return the number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first_process() -> bool:
    """Say whether this is the process that writes files, also before the processes know of each other."""
    return dist.get_rank() == 0 if world_size() > 1 else os.environ.get("RANK", "0") == "0"


def largest_of_processes(value: int, device: torch.device) -> int:
    """Return the largest ``value`` of all processes, on which they then agree.

    Args:
        value: Of this process.
        device: Where the processes exchange tensors.
    """
    if world_size() == 1:
        return value
    shared = torch.tensor(value, device=device)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return int(shared.item())


def sum_over_processes(x: Tensor) -> Tensor:
    """Sum ``x`` over all processes.

    Backward sums the gradients too, so that a loss that every process computes from global statistics has, after DDP's
    averaging, the gradient of one process with the whole batch.
    """
    return x if world_size() == 1 else _AllReduceSum.apply(x)


def gather_over_processes(x: Tensor) -> Tensor:
    """Concatenate ``x`` ``[B, ...]`` over all processes along the batch, with gradients; B must be equal."""
    count = world_size()
    if count == 1:
        return x
    padded = x.new_zeros(count, *x.shape)
    padded[dist.get_rank()] = x
    return sum_over_processes(padded).flatten(0, 1)


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

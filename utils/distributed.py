"""Data-parallel processes: `torchrun --nproc-per-node N train_diffusion.py …`. With one process, these functions do nothing.

All ranks draw the same random batch, each computes the gradients of its shard, and the gradients are summed. The result
matches a single process up to rounding, with two exceptions: dropout masks differ between ranks, and the adaptive weight of
the adversarial loss is computed per micro-batch. Rank 0 makes all decisions, writes all files and prints.
Control messages use gloo on the CPU. Gradients use nccl on CUDA.
"""

import datetime
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

TIMEOUT = datetime.timedelta(hours=2)  # other ranks wait while rank 0 builds the image cache or evaluates


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Return the number of processes that torchrun started, 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    return rank() == 0


def init() -> None:
    if world_size() > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)


def cleanup() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Block until all ranks have arrived."""
    if world_size() > 1:
        dist.all_reduce(torch.zeros(1))  # a broadcast would not wait for all ranks


def broadcast(numbers: list[float]) -> list[float]:
    """Broadcast a few floats from rank 0. Fast enough to call in every step."""
    if world_size() == 1:
        return numbers
    tensor = torch.tensor(numbers, dtype=torch.float64)
    dist.broadcast(tensor, src=0)
    return tensor.tolist()


def gather_objects(obj: Any) -> list | None:
    """Gather one object per rank. Returns the list, in rank order, on rank 0 and None on other ranks."""
    if world_size() == 1:
        return [obj]
    objects = [None] * world_size() if is_main() else None
    dist.gather_object(obj, objects, dst=0)
    return objects


def shard(n: int) -> range:
    """Return the contiguous part of range(n) that belongs to this rank."""
    return range(rank() * n // world_size(), (rank() + 1) * n // world_size())


def sum_gradients(net: nn.Module) -> None:
    """Replace every gradient by its sum over ranks."""
    if world_size() == 1:
        return
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, summed in zip(gradients, flat.split([gradient.numel() for gradient in gradients])):
        gradient.copy_(summed.view(gradient.shape))


def all_reduce_sum(value: Tensor) -> Tensor:
    """Return the sum of a tensor over ranks."""
    if world_size() > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value

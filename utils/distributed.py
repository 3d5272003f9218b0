"""Data parallelism with torchrun. In a single process, the functions that communicate do nothing.

All ranks generate the same random numbers for the whole batch. Each rank processes its shard of the batch, and gradients
are summed. The result matches a single process up to rounding, with two exceptions: dropout masks differ between ranks, and
the adaptive weight of the adversarial loss is computed per micro-batch. Only rank 0 decides when to stop, writes files and
prints. Control messages use gloo; gradients on CUDA use nccl.
"""

import datetime
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

TIMEOUT = datetime.timedelta(hours=2)  # long enough for other ranks to wait while rank 0 evaluates
BARRIER_TIMEOUT = datetime.timedelta(days=7)  # long enough to wait while rank 0 downloads and decodes a dataset

_barrier_group = None


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    return rank() == 0


def init() -> None:
    if world_size() > 1 and not dist.is_initialized():
        global _barrier_group
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)
        _barrier_group = dist.new_group(backend="gloo", timeout=BARRIER_TIMEOUT)


def cleanup() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Block until all ranks have arrived."""
    if world_size() > 1:
        dist.all_reduce(torch.zeros(1), group=_barrier_group)  # a broadcast would not wait for all ranks


def broadcast(numbers: list[float]) -> list[float]:
    """Broadcast a few floats from rank 0. Fast enough to call in every step."""
    if world_size() == 1:
        return numbers
    tensor = torch.tensor(numbers, dtype=torch.float64)
    dist.broadcast(tensor, src=0)
    return tensor.tolist()


def gather_objects(obj: Any) -> list | None:
    """Collect one object per rank. Returns the list in rank order on rank 0, and None on other ranks."""
    if world_size() == 1:
        return [obj]
    objects = [None] * world_size() if is_main() else None
    dist.gather_object(obj, objects, dst=0)
    return objects


def shard(n: int) -> range:
    """Return this rank's contiguous part of range(n)."""
    return range(rank() * n // world_size(), (rank() + 1) * n // world_size())


def sum_gradients(net: nn.Module) -> None:
    """Replace every gradient by its sum over ranks.

    DistributedDataParallel would overlap this with the backward pass. It is not used because it supports neither the
    torch.autograd.grad call of the adaptive weight nor repeating a step with smaller micro-batches after running out of
    memory.
    """
    if world_size() == 1:
        return
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, summed in zip(gradients, flat.split([gradient.numel() for gradient in gradients])):
        gradient.copy_(summed.view(gradient.shape))


def all_reduce_sum(value: Tensor) -> Tensor:
    if world_size() > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value

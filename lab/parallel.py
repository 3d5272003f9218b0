"""Several processes, one experiment: `torchrun --nproc-per-node N train_diffusion.py …`. One process needs none of this.

Every process draws the same batch, works on its share of it, and the gradients are summed: the result is that of one
process, to rounding, but for dropout, whose masks are drawn for each share, and the adversarial term's adaptive weight, which is each
part's own. Rank 0 alone decides, writes and speaks.
Commands are given and results gathered on the CPU (gloo), gradients summed where they lie (nccl on CUDA).
"""

import datetime
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

PATIENCE = datetime.timedelta(hours=2)  # the others wait while rank 0 reads the images or draws its pictures


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def size() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def leads() -> bool:
    return rank() == 0


def join() -> None:
    if size() > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def wait() -> None:
    """Until all have come here."""
    if size() > 1:
        dist.all_reduce(torch.zeros(1))  # a broadcast would not wait for all


def tell_numbers(numbers: list[float]) -> list[float]:
    """A few numbers that rank 0 says, to all; fast enough for every step."""
    if size() == 1:
        return numbers
    said = torch.tensor(numbers, dtype=torch.float64)
    dist.broadcast(said, src=0)
    return said.tolist()


def gather(what: Any) -> list | None:
    """What every process has, to rank 0 in the order of ranks; None to the others."""
    if size() == 1:
        return [what]
    gathered = [None] * size() if leads() else None
    dist.gather_object(what, gathered, dst=0)
    return gathered


def share_of(n: int) -> range:
    """This process's part of 0 … n-1, one run of them."""
    return range(rank() * n // size(), (rank() + 1) * n // size())


def sum_gradients(net: nn.Module) -> None:
    """Replace every gradient by its sum over the processes."""
    if size() == 1:
        return
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients])):
        gradient.copy_(summed.view(gradient.shape))


def total(value: Tensor) -> Tensor:
    """The sum of a tensor over the processes."""
    if size() > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value

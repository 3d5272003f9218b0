"""Data parallelism with torchrun. In a single process, the functions that communicate do nothing.

All ranks generate the same random numbers for the whole batch. Each rank processes its shard of the batch, and gradients
are summed. The result matches a single process up to rounding, with two exceptions: dropout masks differ between ranks, and
the adaptive weight of the adversarial loss is computed per micro-batch. Only rank 0 writes logs, weights and messages.
Control messages use gloo; gradients on CUDA use nccl.

The timeouts of collectives are long, because ranks wait for hours while rank 0 evaluates or decodes images. A heartbeat
thread detects ranks that were killed: see _heartbeat().
"""

import contextlib
import datetime
import fcntl
import os
import re
import secrets
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from utils.errors import ProcessLost, UserError
from utils.files import first_line, make_dir

TIMEOUT = datetime.timedelta(hours=2)  # long enough for other ranks to wait while rank 0 evaluates
BARRIER_TIMEOUT = datetime.timedelta(days=7)  # long enough to wait while rank 0 downloads and decodes a dataset
HEARTBEAT_TIMEOUT = datetime.timedelta(minutes=5)  # detects a node that lost power or network: its connections stay open
HEARTBEAT_SECONDS = 5
GRACE_SECONDS = 20  # after a rank is lost, time for the main thread to finish a file or to report its own error
SHARED_SECONDS = 15  # delay with which a network file system may show a new file on other nodes

_barrier_group = None
_heartbeat_thread: threading.Thread | None = None
_finished = threading.Event()


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    return rank() == 0


def init() -> None:
    if world_size() > 1 and not dist.is_initialized():
        global _barrier_group, _heartbeat_thread
        with _setup():
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)
            _barrier_group = dist.new_group(backend="gloo", timeout=BARRIER_TIMEOUT)
            group = dist.new_group(backend="gloo", timeout=HEARTBEAT_TIMEOUT)
        _finished.clear()
        _heartbeat_thread = threading.Thread(target=_heartbeat, args=(group,), daemon=True)
        _heartbeat_thread.start()


def cleanup() -> None:
    """Leave the group after all ranks have called this."""
    if dist.is_initialized():
        _finished.set()
        _heartbeat_thread.join()
        dist.destroy_process_group()


def _heartbeat(group: dist.ProcessGroup) -> None:
    """Exchange messages with all ranks until all have finished. End this process if a rank is lost.

    The operating system closes the connections of a killed process, so the next exchange fails at once. The main thread may
    not notice the loss: it may wait for an nccl kernel that waits for the lost rank, or compute for an hour before its next
    collective operation.
    """
    num_finished = torch.zeros(1)
    try:
        while num_finished < world_size():
            _finished.wait(HEARTBEAT_SECONDS)
            num_finished.fill_(_finished.is_set())
            with _collective():
                dist.all_reduce(num_finished, group=group)
    except ProcessLost as error:
        # In cleanup(), only give torchrun time to end this process after an error on rank 0, which prints it.
        time.sleep(2 if _finished.is_set() else GRACE_SECONDS)
        tqdm.write(f"{'' if is_main() else f'process {rank()}: '}error: {error}", file=sys.stderr)
        sys.stderr.flush()
        os._exit(1)


@contextlib.contextmanager
def _setup() -> Iterator[None]:
    """Raise UserError if the processes cannot connect."""
    try:
        yield
    except RuntimeError as error:
        raise UserError(
            f"the processes cannot connect ({first_line(error)}): check that all have started, and set GLOO_SOCKET_IFNAME "
            f"and NCCL_SOCKET_IFNAME to a network interface that connects the nodes"
        ) from error


@contextlib.contextmanager
def _collective() -> Iterator[None]:
    """Raise ProcessLost if a collective operation fails."""
    try:
        yield
    except RuntimeError as error:
        if "out of memory" in str(error):
            raise
        # gloo's messages look like this: [file:line] Connection closed by peer [address]:port. Advice …
        reason = re.sub(r"^\[[^]]*\] *", "", first_line(error)).split(". ")[0]
        raise ProcessLost(
            f"another process of this run has ended or cannot be reached ({reason}): see its messages, and run the same "
            f"command again on all nodes to continue"
        ) from error


def barrier() -> None:
    """Block until all ranks have arrived."""
    if world_size() > 1:
        with _collective():
            dist.all_reduce(torch.zeros(1), group=_barrier_group)  # a broadcast would not wait for all ranks


def max_over_ranks(numbers: list[float]) -> list[float]:
    """Return the maximum of each of a few floats over ranks. Fast enough to call in every step."""
    if world_size() == 1:
        return numbers
    tensor = torch.tensor(numbers, dtype=torch.float64)
    with _collective():
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.tolist()


def gather_objects(obj: Any) -> list | None:
    """Collect one object per rank. Returns the list in rank order on rank 0, and None on other ranks."""
    if world_size() == 1:
        return [obj]
    objects = [None] * world_size() if is_main() else None
    with _collective():
        dist.gather_object(obj, objects, dst=0)
    return objects


def all_gather_objects(obj: Any) -> list:
    """Return one object per rank, in rank order, on all ranks."""
    if world_size() == 1:
        return [obj]
    objects = [None] * world_size()
    with _collective():
        dist.all_gather_object(objects, obj, group=_barrier_group)
    return objects


def require_same(value: Any, name: str, remedy: str) -> None:
    """Check that a value is the same on all ranks."""
    values = all_gather_objects(value)
    for r, other in enumerate(values):
        if other != values[0]:
            raise UserError(f"{name} is {values[0]} in process 0 and {other} in process {r}: {remedy}")


def require_shared(folder: Path) -> None:
    """Check that all ranks see the same folder: rank 0 writes a file that the others must be able to read."""
    if world_size() == 1:
        return
    with _token_file(folder) if is_main() else contextlib.nullcontext() as token:
        places = all_gather_objects((token, socket.gethostname(), str(folder.absolute())))
        token, main_host, main_path = places[0]
        visible = all_gather_objects(token is None or _appears(folder / token))
    if all(visible):
        return
    r = visible.index(False)
    _, host, path = places[r]
    instead = f" but as {path}" if path != main_path else ""
    raise UserError(
        f"process {r} on {host} does not see what process 0 on {main_host} writes to {main_path}{instead}: several nodes "
        f"need this folder on a shared file system"
    )


@contextlib.contextmanager
def _token_file(folder: Path) -> Iterator[str | None]:
    """Create a file with a random name, which other ranks look for, and yield its name; None if the folder is read-only.

    On exit, the file is removed. The folder is also removed if this function created it.
    """
    is_new = not folder.exists()
    make_dir(folder)
    path = folder / f".shared.{secrets.token_hex(8)}.tmp"  # remove_leftovers() removes it if this process is killed
    try:
        file = open(path, "w")
    except OSError:
        yield None
        return
    try:
        with file:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.write(path.name)
            file.flush()
            os.fsync(file.fileno())
            yield path.name
    finally:
        path.unlink(missing_ok=True)
        if is_new:
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()


def _appears(path: Path) -> bool:
    """Return whether the file that _token_file() created on rank 0 becomes readable here within SHARED_SECONDS."""
    deadline = time.monotonic() + SHARED_SECONDS
    while True:
        with contextlib.suppress(OSError):
            os.listdir(path.parent)  # makes NFS ask the server instead of its cache
            if path.read_text() == path.name:
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)


def shard(n: int) -> range:
    """Return this rank's contiguous part of range(n)."""
    return range(rank() * n // world_size(), (rank() + 1) * n // world_size())


def require_batch_size(key: str, batch_size: int) -> None:
    if batch_size < world_size():
        raise UserError(f"{key} must be at least the number of processes, {world_size()} (got {batch_size})")


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
    with _collective():
        dist.all_reduce(flat)
    for gradient, summed in zip(gradients, flat.split([gradient.numel() for gradient in gradients])):
        gradient.copy_(summed.view(gradient.shape))


def all_reduce_sum(value: Tensor) -> Tensor:
    if world_size() > 1:
        value = value.clone()
        with _collective():
            dist.all_reduce(value)
    return value

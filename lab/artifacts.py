"""Files that outlive a stage: weights (safetensors), training states and encodings (.pt without pickled objects).

Every file is written to a temporary name, flushed to the disk and renamed: a reader never sees half a file.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from itertools import count
from pathlib import Path
from typing import Any, Callable

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lab.errors import UserError


class NoSpace(OSError):
    """The disk is full. What was there before is as it was."""


@contextlib.contextmanager
def noticing_a_full_disk(path: Path):
    """Turn the many ways in which libraries report a full disk into NoSpace; other errors pass."""
    try:
        yield
    except Exception as error:  # OSError, torch's RuntimeError, safetensors' own
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or (path.parent.exists() and shutil.disk_usage(path.parent).free < 1_000_000):
            raise NoSpace(errno.ENOSPC, "no space left on device", str(path)) from error
        raise


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let write(temporary) make the file, then put it at `path` in one step; on any error `path` stays as it was."""
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with noticing_a_full_disk(path):
            write(temporary)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def set_aside(folder: Path, name: str, endings: tuple[str, ...]) -> None:
    """Rename folder/<name><ending>, as far as they exist, to <name>-2<ending>, or the first number that is free; says so."""
    n = next(n for n in count(2) if not any((folder / f"{name}-{n}{ending}").exists() for ending in endings))
    for ending in endings:
        if (folder / f"{name}{ending}").exists():
            (folder / f"{name}{ending}").rename(folder / f"{name}-{n}{ending}")
    print(f"note: {folder / name}{endings[0]} was made otherwise and is kept as {name}-{n}{endings[0]}")


def make_folder(folder: Path) -> None:
    """Make a folder and those above it. Raises UserError where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise UserError(f"{folder} cannot be made a folder ({error.strerror})") from None


def require_space(folder: Path, needed_bytes: int) -> None:
    """Raise UserError if the disk that holds `folder` has less than this free."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    if not os.access(existing, os.W_OK):
        raise UserError(f"{folder}: {existing} cannot be written to")
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise UserError(f"{folder}: {needed_bytes / 1e6:,.0f} MB are needed and {free / 1e6:,.0f} MB are free on that disk")


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """16 hex digits of the SHA-256 of names, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


# Weights for use: tensors and a JSON header that carries what built the network


HEADER_KEYS = {
    "vae": {"settings", "image_size", "data_fingerprint", "step", "steps", "complete"},
    "unet": {
        "settings",
        "schedule",
        "timesteps",
        "prediction",
        "vae_fingerprint",
        "encodings_fingerprint",
        "step",
        "steps",
        "complete",
    },
}


def save_weights(path: Path, tensors: dict[str, Tensor], header: dict) -> None:
    """A safetensors file with `header` in its metadata. Raises NoSpace where the disk is full."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata={"nanoldm": json.dumps(header)}))


def load_weights(path: Path, kind: str, made_by: str) -> tuple[dict[str, Tensor], dict]:
    """Tensors and header of a weights file of this kind. Raises UserError for a missing, damaged or foreign file."""
    if not path.is_file():
        raise UserError(f"{path} does not exist: run {made_by} first")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("nanoldm", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except Exception as error:  # safetensors and json have error types of their own; nothing in the file was executed
        raise UserError(
            f"{path} is damaged or not a safetensors file ({first_line(error)}): remove it and run {made_by} again"
        ) from None
    if not isinstance(header, dict) or header.get("kind") != kind or not HEADER_KEYS[kind] <= header.keys():
        raise UserError(f"{path} is not a {kind} weights file of this version: remove it and run {made_by}")
    return tensors, header


def load_network(
    network: type[torch.nn.Module], path: Path, kind: str, made_by: str, device: torch.device
) -> tuple[torch.nn.Module, dict, dict[str, Tensor]]:
    """The network that a weights file describes, frozen and on the device; the header; and the file's other tensors, whose
    names begin with "normaliser.". Raises UserError."""
    tensors, header = load_weights(path, kind, made_by)
    extra = {name: tensors.pop(name) for name in list(tensors) if name.startswith("normaliser.")}
    try:
        net = network(**header["settings"])
        net.load_state_dict(tensors, strict=True)
    except Exception as error:  # settings that are no settings, missing or misshapen tensors
        raise UserError(f"{path}: its tensors do not fit the network its header describes ({first_line(error)})") from None
    return net.to(device, memory_format=torch.channels_last).eval().requires_grad_(False), header, extra


# Plain .pt files: dictionaries of tensors, numbers and strings


def save_plain(path: Path, content: dict) -> None:
    write_atomically(path, lambda temporary: torch.save(content, temporary))


def load_plain(path: Path, remedy: str, mmap: bool = False) -> dict:
    """Read a .pt dictionary without executing anything in it. Raises UserError for a damaged or hostile file."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # truncated zip, refused pickle, wrong magic: torch raises half a dozen types
        raise UserError(f"{path} is damaged or not made by this project ({first_line(error)}): {remedy}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not made by this project: {remedy}")
    return content


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].split(". This file can still be loaded")[0][:160]

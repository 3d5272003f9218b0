"""Weights files (safetensors with metadata) and tensor files (.pt without pickled objects). Both contain a checksum."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from config import PerceptualConfig
from models.perceptual import find_weights, make_perceptual
from utils import checksums
from utils.errors import UserError
from utils.files import first_line, write_atomically


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """Hash the names, shapes, dtypes and values of tensors: the first 16 hex digits of SHA-256."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


# A weights file contains tensors and JSON metadata. metadata["settings"] holds the constructor arguments of the network.

REQUIRED_METADATA = {
    "vae": {"settings", "image_shape", "data_fingerprint", "step", "steps", "complete"},
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


def save_weights(path: Path, tensors: dict[str, Tensor], metadata: dict) -> None:
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    texts = {"nanoldm": json.dumps(metadata), checksums.KEY: checksums.UNSET}

    def write(temporary: Path) -> None:
        save_file(tensors, temporary, metadata=texts)
        checksums.add_checksum(temporary)

    write_atomically(path, write)


def read_metadata(path: Path, kind: str) -> dict | None:
    """Return the metadata of a weights file of this kind, or None for any other file. The checksum is not verified."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get("nanoldm", "null"))
    except Exception:  # damaged files raise many types of exceptions
        return None
    return metadata if isinstance(metadata, dict) and metadata.get("kind") == kind else None


def load_weights(path: Path, kind: str, made_by: str) -> tuple[dict[str, Tensor], dict]:
    """Verify a weights file and return its tensors and metadata.

    kind: "vae" or "unet". made_by: the script that writes the file, for error messages.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist: run {made_by} first")
    try:
        checksums.verify(path)
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except Exception as error:  # damaged files raise many types of exceptions
        raise UserError(
            f"{path} is damaged or not made by this project ({first_line(error)}): remove it and run {made_by} again"
        ) from None
    metadata = read_metadata(path, kind)
    if metadata is None or not REQUIRED_METADATA[kind] <= metadata.keys():
        raise UserError(f"{path} is not a {kind} weights file of this version: remove it and run {made_by}")
    return tensors, metadata


def load_network(
    network_class: type[nn.Module], path: Path, kind: str, made_by: str, device: torch.device
) -> tuple[nn.Module, dict, dict[str, Tensor]]:
    """Return the frozen network of a weights file, its metadata and, for a U-Net, the tensors of its normalizer."""
    tensors, metadata = load_weights(path, kind, made_by)
    extra = {name: tensors.pop(name) for name in list(tensors) if name.startswith("normalizer.")}
    try:
        net = network_class(**metadata["settings"])
        net.load_state_dict(tensors, strict=True)
    except Exception as error:
        raise UserError(
            f"{path}: the tensors do not fit the network described by the metadata ({first_line(error)}): "
            f"remove it and run {made_by} again"
        ) from None
    return net.to(device, memory_format=torch.channels_last).eval().requires_grad_(False), metadata, extra


# Tensor files: dictionaries of tensors, numbers and strings


def save_tensors(path: Path, content: dict) -> None:
    def write(temporary: Path) -> None:
        torch.save(content, temporary)
        checksums.add_checksum(temporary)

    write_atomically(path, write)


def load_tensors(path: Path, remedy: str, mmap: bool = False, verify: bool = True) -> dict:
    """Read a dictionary from a .pt file without executing code in the file.

    remedy: end of error messages, which says how to fix a damaged file
    verify: whether to verify the checksum first
    """
    try:
        if verify:
            checksums.verify(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # damaged files raise many types of exceptions
        raise UserError(f"{path} is damaged or not made by this project ({first_line(error)}): {remedy}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} was not made by this project: {remedy}")
    return content


def load_perceptual(cfg: PerceptualConfig, device: torch.device) -> nn.Module | None:
    """Load the frozen perceptual distance: two batches (B, C, H, W) in [-1, 1] -> (B,). Return None if net=none."""
    if cfg.net == "none":
        return None
    try:
        distance = make_perceptual(cfg.net, find_weights(cfg.net, cfg.weights))
    except (FileNotFoundError, ValueError) as error:
        raise UserError(str(error)) from None
    return distance.to(device, memory_format=torch.channels_last)

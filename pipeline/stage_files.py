"""Paths of the stages' output files, functions that load them, and checks that they belong together."""

import contextlib
from pathlib import Path

import torch

from config import Config
from dataset.encodings import LatentDataset
from dataset.image_cache import Images, index_dataset
from models.vae import VAE
from utils.checkpoints import fingerprint, load_network, load_weights, read_metadata
from utils.errors import UserError


def vae_path(config: Config) -> Path:
    return config.run_dir / "vae" / "vae.safetensors"


def unet_path(config: Config) -> Path:
    return config.run_dir / config.diffusion_name / "unet.safetensors"


def encodings_path(config: Config) -> Path:
    return config.run_dir / "encodings.pt"


def load_vae(config: Config, device: torch.device) -> tuple[VAE, dict]:
    """Load the frozen VAE and its metadata. Raises UserError if its image size or channels differ from data.*."""
    path, data = vae_path(config), config.data
    vae, metadata, _ = load_network(VAE, path, "vae", "train_vae.py", device)
    old, new = tuple(metadata["image_shape"]), (*data.size, data.channels)
    if old != new:
        raise UserError(
            f"{path} was trained on images of {'x'.join(map(str, old))} (height x width x channels), but data.image_size "
            f"and data.channels are now {'x'.join(map(str, new))}: restore them, or choose another name and run train_vae.py"
        )
    return vae, metadata


def load_encodings(vae: VAE, config: Config) -> LatentDataset:
    """Load the encodings of this experiment. Raises UserError if another VAE made them."""
    path, vae_fingerprint = encodings_path(config), fingerprint(vae.state_dict())
    encodings = LatentDataset.load(path)
    if encodings.vae_fingerprint != vae_fingerprint:
        raise UserError(
            f"{path} was made with another VAE ({encodings.vae_fingerprint}) than {vae_path(config)} ({vae_fingerprint}): "
            f"run create_encodings.py"
        )
    return encodings


def load_images_for(config: Config, vae_metadata: dict, wait: bool = True) -> Images:
    """Load the images that the VAE was trained on.

    Raises UserError for other images, because their validation split may contain images that the VAE was trained on.

    wait: return only after the checksums of all pixels are verified
    """
    images = index_dataset(config).load()
    if vae_metadata["data_fingerprint"] != images.fingerprint:
        raise UserError(
            f"{vae_path(config)} was trained on other images ({vae_metadata['data_fingerprint']}) than the data.* settings "
            f"select now ({images.fingerprint}): restore data.*, or choose another name and run train_vae.py"
        )
    if wait:
        images.verified.result()
    return images


def require_no_dependents(config: Config) -> None:
    """Raise UserError if the experiment has encodings or a U-Net made with its current VAE, which training would change."""
    try:
        vae_fingerprint = fingerprint(load_weights(vae_path(config), "vae", "")[0])
    except UserError:  # no VAE file, or a damaged one: nothing can depend on it
        return
    dependents = []
    with contextlib.suppress(UserError):
        if LatentDataset.load(encodings_path(config), verify=False).vae_fingerprint == vae_fingerprint:
            dependents.append(encodings_path(config))
    for path in sorted(config.run_dir.glob("*/unet.safetensors")):
        metadata = read_metadata(path, "unet")
        if metadata and metadata.get("vae_fingerprint") == vae_fingerprint:
            dependents.append(path)
    if dependents:
        raise UserError(
            f"training would change {vae_path(config)}, but {', '.join(map(str, dependents))} were made with it: set another "
            f"name=…, or set vae.retrain=true and then run the later stages again"
        )


def check_encodings_match(config: Config, unet_metadata: dict) -> None:
    """Raise UserError if encodings.pt exists but is not the one that the U-Net was trained on."""
    path = encodings_path(config)
    # verify=False: only the fingerprint is needed, and verifying all latents would take longer than loading the U-Net.
    if path.exists() and LatentDataset.load(path, verify=False).fingerprint != unet_metadata["encodings_fingerprint"]:
        raise UserError(
            f"{unet_path(config)} was trained on other encodings than {path}: run train_diffusion.py with a new "
            f"diffusion.name, or run create_encodings.py with the original settings"
        )


def note_if_unfinished(path: Path, metadata: dict, script: str) -> None:
    if not metadata["complete"]:
        step, steps = metadata["step"], metadata["steps"]
        print(f"note: {path} is from step {step:,} of {steps:,}; run {script} again to finish training")

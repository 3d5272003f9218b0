"""Outputs of earlier stages: where they are, how to load them, and checks that they belong together."""

from pathlib import Path

import torch

from config import Config
from dataset.encodings import LatentDataset
from dataset.image_cache import Images, load_images
from models.vae import VAE
from utils.checkpoints import fingerprint, load_network
from utils.errors import UserError


def vae_path(config: Config) -> Path:
    return config.run_dir / "vae" / "vae.safetensors"


def unet_path(config: Config) -> Path:
    return config.run_dir / config.diffusion_name / "unet.safetensors"


def encodings_path(config: Config) -> Path:
    return config.run_dir / "encodings.pt"


def load_vae(config: Config, device: torch.device) -> tuple[VAE, dict]:
    """The frozen VAE of this experiment and the metadata of its file."""
    vae, metadata, _ = load_network(VAE, vae_path(config), "vae", "train_vae.py", device)
    return vae, metadata


def load_encodings(vae: VAE, config: Config) -> LatentDataset:
    """The encodings of this experiment. Refuses encodings made by another VAE."""
    path, vae_fingerprint = encodings_path(config), fingerprint(vae.state_dict())
    encodings = LatentDataset.load(path)
    if encodings.vae_fingerprint != vae_fingerprint:
        raise UserError(
            f"{path} was made with another VAE ({encodings.vae_fingerprint}) than {vae_path(config)} ({vae_fingerprint}): "
            f"run create_encodings.py"
        )
    return encodings


def load_images_for(config: Config, vae_metadata: dict) -> Images:
    """The images that the VAE was trained on. Refuses others: their validation split may contain its training images."""
    images = load_images(config)
    if vae_metadata["data_fingerprint"] != images.fingerprint:
        raise UserError(
            f"{vae_path(config)} was trained on other images ({vae_metadata['data_fingerprint']}) than the data.* settings "
            f"select now ({images.fingerprint}): restore data.*, or choose another name and run train_vae.py"
        )
    return images


def check_encodings_match(config: Config, unet_metadata: dict) -> None:
    """Refuse a U-Net that was trained on other encodings than the current encodings.pt, if that exists."""
    path = encodings_path(config)
    if path.exists() and LatentDataset.load(path).fingerprint != unet_metadata["encodings_fingerprint"]:
        raise UserError(
            f"{unet_path(config)} was trained on other encodings than {path}: run train_diffusion.py with a new diffusion.name, "
            f"or run create_encodings.py with the original settings"
        )


def note_if_unfinished(path: Path, metadata: dict, script: str) -> None:
    if not metadata["complete"]:
        step, steps = metadata["step"], metadata["steps"]
        print(f"note: {path} is from step {step:,} of {steps:,}; run {script} again to finish training")

"""A trained experiment, ready to draw: its VAE and its U-Net, checked to belong together, and what lies between them."""

from pathlib import Path

import torch
from torch import Tensor

from artifacts import build, fingerprint, load_weights
from config import Config, Sampling, UserError
from data import Encodings
from models.latents import Normaliser
from models.schedules import make_schedule
from models.unet import UNet
from models.vae import VAE
from sampling import Denoise, Threshold, make_denoiser
from training import autocast


class LatentDiffusion:
    """The EMA weights of both networks on a device. Raises UserError for files that are missing, damaged or do not fit.

    header   of unet.safetensors: schedule, prediction, how far it was trained
    shape    (C, h, w) of a latent;  image_size  pixels
    """

    def __init__(self, config: Config, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        vae_path = config.run_dir / "vae" / "vae.safetensors"
        self.path = config.run_dir / config.diffusion_name / "unet.safetensors"
        vae_tensors, vae_header = load_weights(vae_path, "vae", "train_vae.py")
        unet_tensors, self.header = load_weights(self.path, "unet", "train_diffusion.py")
        if self.header["vae_fingerprint"] != fingerprint(vae_tensors):
            raise UserError(
                f"{self.path} was trained on encodings of another VAE ({self.header['vae_fingerprint']}) than {vae_path} holds "
                f"({fingerprint(vae_tensors)}): run create_encodings.py and train_diffusion.py"
            )
        if not self.header["complete"]:
            print(
                f"note: {self.path} stopped at step {self.header['step']:,} of {self.header['steps']:,}; train_diffusion.py goes on from there"
            )
        check_encodings(config, self.path, self.header)
        try:
            self.normaliser = Normaliser.from_state_dict(unet_tensors, "normaliser.").to(device)
            self.schedule = make_schedule(self.header["schedule"], self.header["timesteps"])
        except (KeyError, ValueError, TypeError) as error:
            raise UserError(f"{self.path} is not as this version writes it ({error!r}): train it again") from None
        net_tensors = {name: value for name, value in unet_tensors.items() if not name.startswith("normaliser.")}
        self.vae = build(VAE, vae_tensors, vae_header, vae_path).to(device, memory_format=torch.channels_last).eval()
        self.unet = build(UNet, net_tensors, self.header, self.path).to(device, memory_format=torch.channels_last).eval()
        self.image_size = vae_header["image_size"]
        settings = self.header["settings"]
        self.shape = (settings["channels"], settings["size"], settings["size"])

    def denoiser(self) -> Denoise:
        return make_denoiser(self.unet, self.schedule, self.header["prediction"], self.device, self.dtype)

    def threshold(self, x0_clamp: str | float) -> Threshold | None:
        """The bound on clean estimates that sampling.x0_clamp asks for."""
        if x0_clamp == "none":
            return None
        return Threshold(*(self.normaliser.range() if x0_clamp == "range" else (-x0_clamp, x0_clamp)))

    def options(self, s: Sampling) -> dict:
        """The keyword arguments of `sampling.sample` that are settings."""
        return s.model_dump(include={"eta", "order", "variance", "spacing", "sigma_max", "clean_steps"})

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> images (B, 3, H, W), about [-1, 1]."""
        with autocast(self.device, self.dtype):
            return self.vae.decode(self.normaliser.denormalise(z)).float()

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> latents (B, C, h, w): posterior means, scaled."""
        with autocast(self.device, self.dtype):
            return self.normaliser.normalise(self.vae.encode(images.to(self.device)).mean)


def check_encodings(config: Config, unet_path: Path, header: dict) -> None:
    """Where the encodings lie beside the U-Net, they must be the ones it was trained on. Raises UserError."""
    path = config.run_dir / "encodings.pt"
    if path.exists() and Encodings.load(path).fingerprint != header["encodings_fingerprint"]:
        raise UserError(f"{unet_path} was trained on other encodings than {path} holds: run train_diffusion.py under a new diffusion.name, "
                        f"or create_encodings.py with the settings of then")  # fmt: skip

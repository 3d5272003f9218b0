"""A trained experiment, ready to draw: its VAE and its U-Net, checked to belong together, and what lies between them."""

from pathlib import Path

import torch
from torch import Tensor

from config import Config, Sampling
from data import Images, load_images
from inference import Forward, Graphed, cast_weights
from lab.artifacts import fingerprint, load_network
from lab.errors import UserError
from latent_cache import Encodings
from models.conditioning import Raw
from models.latents import Normaliser
from models.schedules import PREDICTIONS, make_schedule
from models.unet import UNet
from models.vae import VAE
from sampling import Denoise, Threshold, guided, make_denoiser, spacing_for, timesteps
from training import autocast, compile_networks


class LatentDiffusion:
    """The EMA weights of both networks on a device. Raises UserError for files that are missing, damaged or do not fit.

    header   of unet.safetensors: schedule, prediction, how far it was trained;  fingerprint  of its tensors;  vae_header  of vae.safetensors
    shape    (C, h, w) of a latent;  image_size  pixels
    """

    def __init__(self, config: Config, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        self.path = config.run_dir / config.diffusion_name / "unet.safetensors"
        self.vae, self.vae_header = load_vae(config, device)
        self.unet, self.header, extra = load_network(UNet, self.path, "unet", "train_diffusion.py", device)
        if self.header["vae_fingerprint"] != fingerprint(self.vae.state_dict()):
            raise UserError(
                f"{self.path} was trained on encodings of another VAE ({self.header['vae_fingerprint']}) than {vae_path(config)} holds "
                f"({fingerprint(self.vae.state_dict())}): run create_encodings.py and train_diffusion.py"
            )
        note_if_stopped(self.path, self.header, "train_diffusion.py")
        check_encodings(config, self.path, self.header)
        try:
            self.normaliser = Normaliser.from_state_dict(extra, "normaliser.").to(device)
            self.schedule = make_schedule(self.header["schedule"], self.header["timesteps"])
            if self.header["prediction"] not in PREDICTIONS:
                raise ValueError(f"prediction {self.header['prediction']!r}")
        except (KeyError, ValueError, TypeError) as error:
            raise UserError(f"{self.path} is not as this version writes it ({error!r}): train it again") from None
        self.fingerprint = fingerprint(self.unet.state_dict())
        self.weaker = self._load_weaker(config.sampling)
        # Not by "auto": a grid is drawn before compiling pays, while a graph is captured in a second.
        if config.compile is True:
            compile_networks(True, device, self.unet, self.vae.decoder)
        self._graphs = device.type == "cuda" and config.compile is not False
        self._forward = self._ready(self.unet)
        self._forward_weaker = self._ready(self.weaker) if self.weaker is not None else None
        self.image_size = self.vae_header["image_size"]
        settings = self.header["settings"]
        self.shape = (settings["channels"], settings["size"], settings["size"])

    def denoiser(self, s: Sampling, raw: Raw | None = None) -> Denoise:
        """The network under a raw condition (a row per image of the batch) and the guidance of these settings."""

        def of(forward: Forward, raw: Raw | None) -> Denoise:
            return make_denoiser(
                lambda z_t, t: forward(z_t, t, *(raw or ())),
                self.schedule,
                self.header["prediction"],
                self.device,
                self.dtype,
            )

        cond = of(self._forward, raw)
        if self._forward_weaker is not None:
            away = of(self._forward_weaker, raw)

            def both(z_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
                return cond(z_t, t), away(z_t, t)

        elif raw is not None:
            halves = of(self._forward, tuple(torch.cat(pair) for pair in zip(raw, self.unet.conditioner.null_like(raw))))

            def both(z_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
                return halves(torch.cat([z_t, z_t]), torch.cat([t, t])).chunk(2)

        else:
            return cond
        return guided(cond, both, self.schedule, s.guidance, s.guidance_interval, s.guidance_rescale)

    def _ready(self, net: UNet) -> Forward:
        """(z_t, t, and the tensors of a raw condition) -> prediction, as fast as this device has it."""
        if self.dtype != torch.float32:
            cast_weights(net, self.dtype)

        def forward(z_t: Tensor, t: Tensor, *raw: Tensor) -> Tensor:
            return net(z_t, t, raw or None)

        return Graphed(forward) if self._graphs else forward

    def _load_weaker(self, s: Sampling) -> UNet | None:
        """The network to guide away from, if sampling.autoguidance names one."""
        if s.autoguidance is None:
            if s.guidance != 1 and self.unet.conditioner is None:
                raise UserError(
                    f"sampling.guidance={s.guidance:g}: this model is unconditional and has nothing to be guided by; "
                    f"name a weaker one with sampling.autoguidance (diffusion.snapshot_every keeps them), or set it to 1"
                )
            if s.guidance != 1 and self.header.get("cfg_dropout") == 0 and not self.unet.conditioner.drops_by_itself:
                raise UserError(
                    f"sampling.guidance={s.guidance:g}: {self.path} was trained with diffusion.cfg_dropout=0, and so never with the null "
                    f"condition to guide away from; set it to 1, or train with 0.1"
                )
            return None
        path = Path(s.autoguidance)
        weaker, header, _ = load_network(UNet, path, "unet", "train_diffusion.py with diffusion.snapshot_every", self.device)
        for key in ("encodings_fingerprint", "schedule", "timesteps", "prediction"):
            if header[key] != self.header[key]:
                raise UserError(
                    f"sampling.autoguidance: {path} has {key} {header[key]}, {self.path} {self.header[key]}: they must agree"
                )
        if header["settings"].get("conditioning") != self.header["settings"].get("conditioning"):
            raise UserError(f"sampling.autoguidance: {path} is conditioned otherwise than {self.path}")
        return weaker

    def steps_of(self, s: Sampling, strength: float = 1.0) -> list[int]:
        """The timesteps that these settings visit. Raises UserError for settings that this model's schedule does not allow."""
        try:
            return timesteps(self.schedule, s.steps, self.spacing(s), s.sigma_max, strength)
        except ValueError as error:
            raise UserError(f"sampling: {error}") from None

    def threshold(self, x0_clamp: str | float) -> Threshold | None:
        """The bound on clean estimates that sampling.x0_clamp asks for."""
        if x0_clamp == "none":
            return None
        return Threshold(*(self.normaliser.range() if x0_clamp == "range" else (-x0_clamp, x0_clamp)))

    def spacing(self, s: Sampling) -> str:
        """The spacing of timesteps that these settings mean."""
        return spacing_for(s.sampler, self.schedule) if s.spacing == "auto" else s.spacing

    def options(self, s: Sampling) -> dict:
        """The keyword arguments of `sampling.sample` that are settings."""
        return s.model_dump(include={"eta", "order", "variance", "sigma_max", "clean_steps"}) | {"spacing": self.spacing(s)}

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


def note_if_stopped(path: Path, header: dict, made_by: str) -> None:
    if not header["complete"]:
        print(f"note: {path} stopped at step {header['step']:,} of {header['steps']:,}; {made_by} goes on from there")


def vae_path(config: Config) -> Path:
    return config.run_dir / "vae" / "vae.safetensors"


def load_vae(config: Config, device: torch.device) -> tuple[VAE, dict]:
    """The frozen VAE of this experiment, and the header of its file. Raises UserError."""
    vae, header, _ = load_network(VAE, vae_path(config), "vae", "train_vae.py", device)
    return vae, header


def encodings_by(vae: VAE, config: Config) -> Encodings:
    """The encodings of this experiment, made by this VAE. Raises UserError."""
    path, now = config.run_dir / "encodings.pt", fingerprint(vae.state_dict())
    encodings = Encodings.load(path)
    if encodings.vae_fingerprint != now:
        raise UserError(
            f"{path} was made by another VAE ({encodings.vae_fingerprint}) than {vae_path(config)} holds ({now}): run create_encodings.py"
        )
    return encodings


def images_of(config: Config, vae_header: dict) -> Images:
    """The images that the VAE with this header was trained on: others have no held-out ones. Raises UserError."""
    images = load_images(config)
    if vae_header["data_fingerprint"] != images.fingerprint:
        raise UserError(
            f"{vae_path(config)} was trained on other images ({vae_header['data_fingerprint']}) than data.* describes now ({images.fingerprint}): "
            f"set data.* back, or give this experiment another name and run train_vae.py"
        )
    return images


def check_encodings(config: Config, unet_path: Path, header: dict) -> None:
    """Where the encodings lie beside the U-Net, they must be the ones it was trained on. Raises UserError."""
    path = config.run_dir / "encodings.pt"
    if path.exists() and Encodings.load(path).fingerprint != header["encodings_fingerprint"]:
        raise UserError(f"{unet_path} was trained on other encodings than {path} holds: run train_diffusion.py under a new diffusion.name, "
                        f"or create_encodings.py with the settings of then")  # fmt: skip

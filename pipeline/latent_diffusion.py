"""VAE and U-Net as one generative model: denoising with guidance, sampling and decoding."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from config import Config, SamplingConfig
from models.conditioning import Cond
from models.normalizer import Normalizer
from models.schedules import PREDICTIONS, Schedule, make_schedule
from models.unet import UNet
from models.vae import VAE
from pipeline.cuda_graphs import Forward, GraphedForward, cast_weights
from pipeline.generate import OutputSpec, Samples
from pipeline.init_latents import InitImage, initial_noise
from pipeline.latent_stats import Moments
from pipeline.stage_files import check_encodings_match, load_vae, note_if_unfinished, unet_path, vae_path
from sampling import Denoise, Threshold, default_spacing, guided, make_denoiser, num_evaluations, sample, timesteps
from utils import distributed
from utils.checkpoints import fingerprint, load_network
from utils.device import autocast, compile_networks
from utils.errors import UserError
from utils.images import image_grid, save_png, to_float, to_uint8


@dataclass
class Checkpoint:
    """Files that a model was loaded from."""

    path: Path  # of unet.safetensors
    metadata: dict  # of unet.safetensors: training step, schedule, prediction, fingerprints
    fingerprint: str  # of the U-Net's tensors
    vae_metadata: dict


class LatentDiffusion:
    """VAE, U-Net, latent normalizer, noise schedule and prediction type (eps | v | x0 | velocity).

    dtype         autocast dtype of VAE and U-Net
    guidance_net  weaker U-Net whose estimate replaces the unconditional one in guidance (autoguidance)
    cuda_graphs   replay the U-Net as a CUDA graph
    """

    def __init__(
        self,
        vae: VAE,
        unet: UNet,
        normalizer: Normalizer,
        schedule: Schedule,
        prediction: str,
        *,
        dtype: torch.dtype = torch.float32,
        guidance_net: UNet | None = None,
        cuda_graphs: bool = False,
    ):
        self.vae, self.unet, self.normalizer, self.schedule, self.prediction = vae, unet, normalizer, schedule, prediction
        self.device, self.dtype = normalizer.scale.device, dtype
        height, width = unet.settings["size"]
        self.latent_shape = (unet.settings["in_channels"], height, width)
        self.image_shape = (height * vae.downsampling, width * vae.downsampling, vae.in_channels)
        self.checkpoint: Checkpoint | None = None  # set by load()
        self._forward = _make_forward(unet, cuda_graphs)
        self._guidance_forward = _make_forward(guidance_net, cuda_graphs) if guidance_net is not None else None

    @classmethod
    def load(cls, config: Config, device: torch.device, dtype: torch.dtype) -> "LatentDiffusion":
        """Load the EMA weights of an experiment's VAE and U-Net. Raises UserError if they were not trained together."""
        path = unet_path(config)
        vae, vae_metadata = load_vae(config, device)
        unet, metadata, extra = load_network(UNet, path, "unet", "train_diffusion.py", device)
        vae_fingerprint = fingerprint(vae.state_dict())
        if metadata["vae_fingerprint"] != vae_fingerprint:
            raise UserError(
                f"{path} was trained with another VAE ({metadata['vae_fingerprint']}) than {vae_path(config)} "
                f"({vae_fingerprint}): run create_encodings.py and train_diffusion.py"
            )
        note_if_unfinished(path, metadata, "train_diffusion.py")
        check_encodings_match(config, metadata)
        try:
            normalizer = Normalizer.from_state_dict(extra, "normalizer.").to(device)
            schedule = make_schedule(metadata["schedule"], metadata["timesteps"])
            if metadata["prediction"] not in PREDICTIONS:
                raise ValueError(f"prediction {metadata['prediction']!r}")
        except (KeyError, ValueError, TypeError) as error:
            raise UserError(f"{path} has an unsupported format ({error!r}): remove it and run train_diffusion.py") from None
        checkpoint = Checkpoint(path, metadata, fingerprint(unet.state_dict()), vae_metadata)
        check_guidance(config.sampling, unet, checkpoint)
        guidance_net = load_guidance_net(config.sampling, unet, checkpoint, device)
        # compile=auto uses CUDA graphs only: for one grid, torch.compile takes longer than it saves.
        if config.compile is True:
            compile_networks(True, device, unet, vae.decoder)
        if dtype != torch.float32:
            for net in (unet, guidance_net) if guidance_net is not None else (unet,):
                cast_weights(net, dtype)
        graphs = device.type == "cuda" and config.compile is not False
        model = cls(
            vae, unet, normalizer, schedule, metadata["prediction"],
            dtype=dtype, guidance_net=guidance_net, cuda_graphs=graphs,
        )  # fmt: skip
        model.checkpoint = checkpoint
        return model

    # Sampling settings that depend on the model

    def spacing(self, cfg: SamplingConfig) -> str:
        """Return the timestep spacing. "auto" selects the default for the sampler and schedule."""
        return default_spacing(cfg.sampler, self.schedule) if cfg.spacing == "auto" else cfg.spacing

    def timesteps(self, cfg: SamplingConfig, strength: float = 1.0) -> list[int]:
        """Return the timesteps that sampling visits. Raises UserError if the schedule does not allow the settings."""
        try:
            return timesteps(self.schedule, cfg.steps, self.spacing(cfg), cfg.sigma_max, strength)
        except ValueError as error:
            raise UserError(f"sampling: {error}") from None

    def threshold(self, x0_clamp: str | float) -> Threshold | None:
        """Return the Threshold that clamps clean estimates as sampling.x0_clamp demands; None if x0_clamp is "none"."""
        if x0_clamp == "none":
            return None
        return Threshold(*(self.normalizer.range() if x0_clamp == "range" else (-x0_clamp, x0_clamp)))

    def denoiser(self, cfg: SamplingConfig, cond: Cond = ()) -> Denoise:
        """Return denoise(z_t, t) -> z0_hat with the guidance settings of cfg. `cond` has one row per image of the batch."""

        def make(forward: Forward, cond: Cond) -> Denoise:
            return make_denoiser(
                lambda z_t, t: forward(z_t, t, *cond), self.schedule, self.prediction, self.device, self.dtype
            )

        conditional = make(self._forward, cond)
        if self._guidance_forward is not None:
            weaker = make(self._guidance_forward, cond)

            def denoise_both(z_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
                return conditional(z_t, t), weaker(z_t, t)

        elif cond:
            # Compute the conditional and the unconditional estimates in one batch.
            null = self.unet.conditioner.null_like(cond)
            batched = make(self._forward, tuple(torch.cat(pair) for pair in zip(cond, null)))

            def denoise_both(z_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
                return batched(torch.cat([z_t, z_t]), torch.cat([t, t])).chunk(2)

        else:
            return conditional
        return guided(conditional, denoise_both, self.schedule, cfg.guidance, cfg.guidance_interval, cfg.guidance_rescale)

    # Sampling

    def generate(
        self,
        cfg: SamplingConfig,
        spec: OutputSpec,
        cond: Cond = (),
        init: InitImage | None = None,
        *,
        progress: tqdm | None = None,
        show_progress: bool = True,
    ) -> Samples:
        """Sample images 0 … spec.num_images - 1 in batches, decode them, and return the outputs that `spec` selects.

        cond      conditions, one per row of the grid: image i has row i // cfg.cols, modulo the number of conditions
        init      image and mask of image-to-image or inpainting; None: start from noise
        progress  progress bar, whose unit is one network evaluation of one image; None: create one
        """
        samples, threshold = Samples(Moments(self.latent_shape[0])), self.threshold(cfg.x0_clamp)
        strength = init.strength if init else 1.0
        evaluations = num_evaluations(cfg.sampler, len(self.timesteps(cfg, strength)))
        frames = set(np.linspace(0, evaluations - 1, cfg.trajectory_frames).round().astype(int).tolist())
        init_latents = self.encode(to_float(torch.from_numpy(init.pixels)[None])) if init else None
        latent_mask = init.latent_mask.to(self.device) if init and init.mask is not None else None
        batches = spec.batches(cfg.batch_size)
        total = sum(map(len, batches)) * evaluations
        hidden = not (show_progress and distributed.is_main())
        bar = tqdm(total=total, unit="eval", desc="sampling", disable=hidden) if progress is None else progress
        for indices in batches:

            def callback(evaluation: int, _t: int, z_t: Tensor, z0: Tensor, indices=indices) -> None:
                bar.update(len(z_t))
                if evaluation in frames:
                    for i in set(spec.trajectory) & set(indices):
                        samples.trajectory.setdefault(i, []).append(z0[i - indices[0]].cpu())

            noise, generators = initial_noise(cfg, indices, self.latent_shape, self.device)
            batch_cond = tuple(c[[i // cfg.cols % len(c) for i in indices]] for c in cond)
            z = sample(
                self.denoiser(cfg, batch_cond), noise, self.schedule, cfg.sampler, cfg.steps,
                eta=cfg.eta, order=cfg.order, variance=cfg.variance, spacing=self.spacing(cfg), sigma_max=cfg.sigma_max,
                clean_finish_steps=cfg.clean_finish_steps, x0_range=threshold, strength=strength, mask=latent_mask,
                init_latents=init_latents.expand_as(noise) if init else None, generator=generators, callback=callback,
            )  # fmt: skip
            samples.moments.add(z)
            if spec.keep_latents:
                samples.latents |= dict(zip(indices, z))
            if spec.keep_pixels or spec.save_dir:
                self._add_pixels(samples, spec, indices, z, init)
        if progress is None:
            bar.close()
        if threshold:
            samples.num_clamped, samples.num_values = threshold.counts
        return samples

    def _add_pixels(self, samples: Samples, spec: OutputSpec, indices: range, z: Tensor, init: InitImage | None) -> None:
        images = self.decode(z)
        samples.num_out_of_range += int((images.abs() > 1).sum())
        samples.num_pixel_values += images.numel()
        pixels = to_uint8(images)
        if init:
            pixels = init.restore_unmasked(pixels)
        samples.pixels |= {i: p for i, p in zip(indices, pixels) if i < spec.keep_pixels}
        if spec.save_dir:
            with ThreadPoolExecutor(4) as writers:
                list(
                    writers.map(
                        lambda i, p: save_png(image_grid(p[None], 1), spec.save_dir / f"{i:06d}.png"), indices, pixels
                    )
                )

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Decode normalized latents (B, C, h, w) to images (B, image channels, H, W), approximately in [-1, 1]."""
        with autocast(self.device, self.dtype):
            return self.vae.decode(self.normalizer.denormalize(z)).float()

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Encode images (B, image channels, H, W) in [-1, 1] to normalized posterior means (B, C, h, w)."""
        with autocast(self.device, self.dtype):
            return self.normalizer.normalize(self.vae.encode(images.to(self.device)).mean)


def _make_forward(net: UNet, cuda_graphs: bool) -> Forward:
    """Return a function forward(z_t, t, *cond) that calls net(z_t, t, cond). GraphedForward takes tensors, not tuples."""

    def forward(z_t: Tensor, t: Tensor, *cond: Tensor) -> Tensor:
        return net(z_t, t, cond)

    return GraphedForward(forward) if cuda_graphs else forward


def check_guidance(cfg: SamplingConfig, unet: UNet, checkpoint: Checkpoint, key: str = "sampling.guidance") -> None:
    """Refuse guidance towards a condition for which this U-Net was not trained. `key`: the setting to name in the error."""
    path, metadata, conditioner = checkpoint.path, checkpoint.metadata, unet.conditioner
    if cfg.guidance == 1 or cfg.autoguidance is not None:
        return
    if conditioner is None:
        raise UserError(
            f"{key} must be 1 for an unconditional model (got {cfg.guidance:g}); "
            f"to use guidance, set sampling.autoguidance to a weaker U-Net, such as a file saved by diffusion.snapshot_every"
        )
    if metadata.get("cfg_dropout") == 0 and not conditioner.trains_null_condition:
        raise UserError(
            f"{key} must be 1 (got {cfg.guidance:g}): {path} was trained with diffusion.cfg_dropout=0, so it has "
            f"never seen the null condition; train with diffusion.cfg_dropout=0.1 to use guidance"
        )


def load_guidance_net(cfg: SamplingConfig, unet: UNet, checkpoint: Checkpoint, device: torch.device) -> UNet | None:
    """The network of sampling.autoguidance, or None."""
    path, metadata = checkpoint.path, checkpoint.metadata
    if cfg.autoguidance is None:
        return None
    weaker_path = Path(cfg.autoguidance)
    script = "train_diffusion.py with diffusion.snapshot_every"
    weaker, weaker_metadata, _ = load_network(UNet, weaker_path, "unet", script, device)
    for key in ("encodings_fingerprint", "schedule", "timesteps", "prediction"):
        if weaker_metadata[key] != metadata[key]:
            raise UserError(
                f"sampling.autoguidance: {weaker_path} and {path} must have the same {key} "
                f"(got {weaker_metadata[key]} and {metadata[key]})"
            )
    if weaker.settings["conditioning"] != unet.settings["conditioning"]:
        raise UserError(f"sampling.autoguidance: {weaker_path} has other labels or text settings than {path}")
    return weaker

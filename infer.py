"""Stage 4: noise -> latents -> pixels.

Samples images with the settings of config.sampling, writes a grid to results/ with the settings inside the PNG, and
prints a calibration line: how the spread of the generated latents compares with the training latents'.
"""

import cli

if __name__ == "__main__":
    cli.answer_early(__doc__)

import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from artifacts import fill, fingerprint, load_weights, require_space
from config import Config, Sampling, UserError
from data import to_uint8
from models.latents import Normaliser
from models.schedules import make_schedule
from models.unet import UNet
from models.vae import VAE
from pictures import grid, save_png
from sampling import Threshold, image_generators, make_denoiser, randn, sample, timesteps
from training import autocast, parameters_of, pick_device, pick_precision


def infer(config: Config, dry_run: bool) -> None:
    s, device = config.sampling, pick_device(config.device)
    dtype = pick_precision(s.precision, device)
    vae_path, unet_path = config.run_dir / "vae" / "vae.safetensors", config.run_dir / config.diffusion_name / "unet.safetensors"
    vae_tensors, vae_header = load_weights(vae_path, "vae", "train_vae.py")
    unet_tensors, header = load_weights(unet_path, "unet", "train_diffusion.py")
    if header["vae_fingerprint"] != fingerprint(vae_tensors):
        raise UserError(f"{unet_path} was trained on encodings of another VAE ({header['vae_fingerprint']}) than {vae_path} holds "
                        f"({fingerprint(vae_tensors)}): run create_encodings.py and train_diffusion.py")
    normaliser = Normaliser.from_state_dict(unet_tensors, "normaliser.")
    net_tensors = {name: value for name, value in unet_tensors.items() if not name.startswith("normaliser.")}
    vae = fill(VAE(**vae_header["settings"]), vae_tensors, vae_path).to(device, memory_format=torch.channels_last).eval()
    unet = fill(UNet(**header["settings"]), net_tensors, unet_path).to(device, memory_format=torch.channels_last).eval()
    schedule = make_schedule(header["schedule"], header["timesteps"])
    count = s.images or s.rows * s.cols
    name = f"{config.name}_{config.diffusion_name}_{s.sampler}_{s.rows}x{s.cols}"
    results = Path(config.results_dir)
    image_bytes = 3 * vae_header["image_size"] ** 2
    require_space(results, (s.rows * s.cols + (count if s.single_files else 0)) * image_bytes)
    try:
        walked = len(timesteps(schedule, s.steps, s.spacing, s.sigma_max))
    except ValueError as error:
        raise UserError(f"sampling: {error}") from None

    print(f"U-Net: {parameters_of(unet) / 1e6:.2f}M parameters, step {header['step']:,}; {header['schedule']} schedule, {s.sampler}, "
          f"{walked} steps, x0_clamp {s.x0_clamp}, on {device} in {str(dtype)[6:]}\n"
          f"images: {count:,}\nfiles: {results / name}.png" + (f", {results / name}/000000.png …" if s.single_files else ""))
    if dry_run:
        return

    normaliser = normaliser.to(device)
    threshold = {"range": Threshold(*normaliser.range()), "none": None}.get(s.x0_clamp) if isinstance(s.x0_clamp, str) else Threshold(-s.x0_clamp, s.x0_clamp)
    denoise = make_denoiser(unet, schedule, header["prediction"], device, dtype)
    shape = (header["settings"]["channels"], header["settings"]["size"], header["settings"]["size"])
    moments, out_of_range, shown = Moments(shape[0]), 0, []
    started = time.monotonic()
    with tqdm(total=count * walked, unit="eval", desc="sampling") as bar:
        for start in range(0, count, s.batch_size):
            indices = range(start, min(start + s.batch_size, count))
            generators = image_generators(s.seed, indices, "cpu")  # on the CPU, so that a seed is the same picture on every device
            noise = randn((len(indices), *shape), generators, device)
            z = sample(denoise, noise, schedule, s.sampler, s.steps, eta=s.eta, variance=s.variance, spacing=s.spacing, sigma_max=s.sigma_max,
                       clean_steps=s.clean_steps, x0_range=threshold, generator=generators, callback=lambda *_: bar.update(len(indices)))
            moments.add(z)
            with torch.no_grad(), autocast(device, dtype):
                images = vae.decode(normaliser.denormalise(z))
            out_of_range += int((images.abs() > 1).sum())
            pixels = to_uint8(images)
            if start < s.rows * s.cols:
                shown.append(pixels)
            if s.single_files:
                for i, picture in zip(indices, pixels):
                    save_png(grid(picture[None], 1), results / name / f"{i:06d}.png")
    seconds = time.monotonic() - started

    figures = calibration(moments, normaliser, threshold, out_of_range / (count * image_bytes))
    settings = {"Software": "nanoLDM", "command": "python infer.py " + " ".join(sys.argv[1:]), "sampling": s.model_dump(),
                "model": {k: v for k, v in header.items() if k != "settings"}, "calibration": figures, "seconds": round(seconds, 1)}
    path = results / f"{name}.png"
    save_png(grid(np.concatenate(shown)[: s.rows * s.cols], s.cols), path, settings)
    print(f"calibration: generated/training std {figures['std_ratio']:.3f} overall, {figures['worst_channel_ratio']:.3f} in the worst channel "
          f"({figures['worst_channel']}); {figures['clamped']:.2%} of clean estimates clamped; {figures['out_of_range']:.2%} of pixels out of range")
    for line in advice(figures, s, header):
        print(line)
    print(f"done: {path}, {count:,} images in {seconds:.1f} s")


class Moments:
    """Mean and std per channel of latents that come in batches, in float64."""

    def __init__(self, channels: int):
        self.n = 0
        self.sum, self.squares = torch.zeros(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64)

    def add(self, z: Tensor) -> None:
        z = z.cpu().double()
        self.n += z.numel() // z.shape[1]
        self.sum += z.sum(dim=(0, 2, 3))
        self.squares += z.square().sum(dim=(0, 2, 3))

    def std(self) -> Tensor:
        """(C,)"""
        return (self.squares / self.n - (self.sum / self.n) ** 2).clamp(min=0).sqrt()

    def overall_std(self) -> float:
        """Std of all values, the channels taken together."""
        return float((self.squares.mean() / self.n - (self.sum.mean() / self.n) ** 2).clamp(min=0).sqrt())


def calibration(moments: Moments, normaliser: Normaliser, threshold: Threshold | None, out_of_range: float) -> dict:
    """Generated against training spread; 1 is perfect. The worst channel is the one farthest from 1 by ratio."""
    ratios = moments.std() / normaliser.std.cpu().double().clamp(min=1e-12)
    worst = int(ratios.clamp(min=1e-12).log().abs().argmax())
    return dict(std_ratio=moments.overall_std() / normaliser.overall_std(), worst_channel_ratio=float(ratios[worst]), worst_channel=worst,
                clamped=threshold.share if threshold else 0.0, out_of_range=out_of_range)


def advice(figures: dict, s: Sampling, header: dict) -> list[str]:
    """A warning that names the likely cause where the spread is off by more than a tenth."""
    ratio, worst = figures["std_ratio"], figures["worst_channel_ratio"]
    if 0.9 <= ratio <= 1.1 and 0.9 <= worst <= 1.1:
        return []
    off = worst if 0.9 <= ratio <= 1.1 else ratio
    young = header["step"] * (1 - header["ema"]) < 3
    if off < 0.9 and figures["clamped"] > 0.02:
        cause = f"the clean estimate is clamped too hard (sampling.x0_clamp={s.x0_clamp}): use range"
    elif off < 0.9 and s.steps < 20:
        cause = f"{s.steps} steps are few: use sampling.steps=50"
    elif off > 1.1 and (s.sigma_max > 80 and s.x0_clamp == "none"):
        cause = "errors at the noisy end of the schedule are amplified: use sampling.sigma_max=80 and x0_clamp=range"
    elif young:
        cause = f"the EMA weights of {header['step']} steps are still near their start: train longer, or a smaller diffusion.ema"
    elif off > 1.1 and s.x0_clamp == "none":
        cause = "nothing bounds the clean estimate: use sampling.x0_clamp=range"
    else:
        cause = "the U-Net is not trained enough; look at the held-out loss by timestep bin"
    return [f"warning: generated latents are {'narrower' if off < 1 else 'wider'} than training latents ({off:.2f}); likely cause: {cause}"]


def main(argv: list[str] | None = None) -> int:
    return cli.run(infer, __doc__, argv)


if __name__ == "__main__":
    raise SystemExit(main())

"""evaluation.task=loss: denoising error per bin of log(alpha/sigma), relative to the optimal denoiser for N(0, 1)."""

from typing import NamedTuple

import torch
from torch import Tensor

from config import Config, SamplingConfig
from dataset import evenly_spaced
from dataset.conditions import val_conditions
from dataset.encodings import LatentDataset
from evaluation.reports import markdown_table, print_plan, weights_origin, write_report
from models.conditioning import Cond
from pipeline.latent_diffusion import LatentDiffusion
from pipeline.stage_files import encodings_path
from utils.device import pick_device, pick_precision
from utils.errors import UserError

MAX_BIN_CENTER = 4  # bins of log(alpha/sigma) have width 1 and centers 4, 3, …, -4


def run(config: Config, dry_run: bool) -> None:
    cfg, device = config.evaluation, pick_device(config.device)
    dtype = pick_precision(cfg.precision, device)
    model = LatentDiffusion.load(config, device, dtype)
    encodings = LatentDataset.load(encodings_path(config))
    name = f"{config.name}_{config.diffusion_name}_loss"
    summary = f"denoising error of {model.checkpoint.path} on validation latents"
    print_plan(config, summary, device, dtype, [f"{name}.md"])
    if dry_run:
        return
    val_rows = evenly_spaced(torch.arange(len(encodings.val_mean)), cfg.num_images)
    cond = val_conditions(model.unet.conditioner, encodings, len(val_rows), device)
    z = model.normalizer.normalize(encodings.val_mean[val_rows].to(device))
    bins = denoising_error(model, z, cond, cfg.batch_size)
    rows = [[f"{b.center:+d}", f"{b.first_t} … {b.last_t}", f"{b.error:.4f}", f"{b.relative_error:.3f}"] for b in bins]
    mean_error, mean_relative = (sum(values) / len(bins) for values in zip(*((b.error, b.relative_error) for b in bins)))
    rows.append([f"mean of {bins[0].center:+d} … {bins[-1].center:+d}", "", f"{mean_error:.4f}", f"{mean_relative:.3f}"])
    paragraphs = [
        f"# Denoising error per bin of log(alpha/sigma): {config.name}, {model.schedule.name} schedule, "
        f"predicts {model.prediction}",
        f"Measured on {len(z):,} validation latents. Each row is a bin of width 1 in log(alpha/sigma), which is half the "
        f"log-SNR. The last column divides the squared error of the clean estimate by the expected error of the optimal "
        f"denoiser for N(0, 1) data; 1 means no better than that denoiser. Rows can be compared between schedules and "
        f"prediction types. Means can be compared only if they cover the same bins.",
        markdown_table(
            ["log(alpha/sigma)", "t", "squared error of z0", "relative to the optimal denoiser for N(0, 1)"], rows
        ),
    ]
    origin = weights_origin("U-Net", model.checkpoint.fingerprint, model.checkpoint.metadata)
    write_report(config, name, device, origin, "\n\n".join(paragraphs))


class Bin(NamedTuple):
    center: int  # value of log(alpha/sigma) in the middle of the bin
    first_t: int
    last_t: int
    error: float  # mean squared error of z0_hat
    relative_error: float  # mean of (squared error / expected squared error of the optimal denoiser for z ~ N(0, 1))


@torch.no_grad()
def denoising_error(model: LatentDiffusion, z: Tensor, cond: Cond, batch_size: int) -> list[Bin]:
    """Measure the denoising error of normalized latents z (N, C, h, w), without guidance and with fixed noise.

    The optimal denoiser for z ~ N(0, 1) is alpha/(alpha² + sigma²) · z_t. Its expected squared error is
    sigma²/(alpha² + sigma²). Bins that the schedule does not cover completely are left out.
    """
    schedule, generator, bins = model.schedule, torch.Generator().manual_seed(0), []
    no_guidance = SamplingConfig(guidance=1.0)
    all_t = torch.arange(schedule.timesteps)
    lambdas = (schedule.alpha(all_t) / schedule.sigma(all_t)).log()  # (T,), decreasing in t
    for center in range(MAX_BIN_CENTER, -MAX_BIN_CENTER - 1, -1):
        if lambdas[0] < center + 0.5 or lambdas[-1] > center - 0.5:
            continue
        bin_t = all_t[(lambdas - center).abs() <= 0.5]
        if not len(bin_t):  # possible if the schedule has few timesteps
            continue
        # One timestep per latent, evenly spread over the bin in log(alpha/sigma).
        targets = torch.linspace(center + 0.5, center - 0.5, len(z), dtype=torch.float64)
        t = bin_t[(lambdas[bin_t] - targets[:, None]).abs().argmin(dim=1)].to(z.device)
        eps = torch.randn(z.shape, generator=generator).to(z.device)
        z_t, errors = schedule.add_noise(z, eps, t), []
        for start in range(0, len(z), batch_size):
            batch = slice(start, start + batch_size)
            denoise = model.denoiser(no_guidance, tuple(c[batch] for c in cond))
            errors.append((denoise(z_t[batch], t[batch]) - z[batch]).square().mean(dim=(1, 2, 3)))
        error = torch.cat(errors)  # (N,)
        alpha, sigma = (c.flatten() for c in schedule.coefficients(t))
        optimal = sigma**2 / (alpha**2 + sigma**2)
        bins.append(Bin(center, int(bin_t[0]), int(bin_t[-1]), float(error.mean()), float((error / optimal).mean())))
    if not bins:
        raise UserError(
            f"evaluation.task=loss: the schedule has too few timesteps (T = {schedule.timesteps}) to cover any bin of "
            f"log(alpha/sigma): train with more diffusion.timesteps"
        )
    return bins

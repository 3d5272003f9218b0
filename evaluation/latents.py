"""evaluation.task=latents: statistics of the latents, and a verdict."""

import numpy as np
import torch
from torch import Tensor

from config import Config
from evaluation.reconstruction import psnr_ssim, val_pixels
from evaluation.reports import markdown_table, print_plan, weights_origin, write_report
from models.normalizer import Normalizer
from models.vae import VAE
from pipeline.stage_files import load_encodings, load_images_for, load_vae
from utils.checkpoints import fingerprint
from utils.device import pick_device, pick_precision
from utils.images import to_float, to_uint8

MIN_RELATIVE_STD = 0.1  # of a channel, relative to the largest
MAX_KURTOSIS = 10.0
MIN_PSNR = 24.0  # dB
MAX_STD_RATIO = 4.0  # of the largest to the smallest channel


def run(config: Config, dry_run: bool) -> None:
    cfg, device = config.evaluation, pick_device(config.device)
    pick_precision("float32", device)  # turns off TF32
    vae, metadata = load_vae(config, device)
    encodings = load_encodings(vae, config)
    name = f"{config.name}_latents"
    summary = f"statistics of {len(encodings.mean):,} training latents"
    print_plan(config, summary, device, torch.float32, [f"{name}.md"])
    if dry_run:
        return
    originals = val_pixels(load_images_for(config, metadata), cfg.num_images)
    paragraphs = latent_report(vae, encodings.normalizer.to(device), originals, cfg.batch_size, device)
    text = "\n\n".join([f"# Latents of {config.name}", *paragraphs])
    write_report(config, name, device, weights_origin("VAE", fingerprint(vae.state_dict()), metadata), text)


@torch.no_grad()
def latent_report(
    vae: VAE, normalizer: Normalizer, originals: np.ndarray, batch_size: int, device: torch.device
) -> list[str]:
    """Paragraphs on training latents per channel and on clamping, measured on uint8 images (N, H, W, C)."""
    means, nats = [], []
    for batch in torch.from_numpy(np.ascontiguousarray(originals)).split(batch_size):
        posterior = vae.encode(to_float(batch).to(device))
        means.append(normalizer.normalize(posterior.mean))
        nats.append(posterior.kl().mean(dim=(1, 2, 3)))
    z = torch.cat(means)

    def psnr(z: Tensor) -> float:
        decoded = [to_uint8(vae.decode(normalizer.denormalize(batch))) for batch in z.split(batch_size)]
        return psnr_ssim(np.concatenate(decoded), originals, batch_size)[0]

    best_psnr, n = psnr(z), normalizer
    channels = [
        [f"{c}", f"{n.mean[c]:.3f}", f"{n.std[c]:.3f}", f"{n.kurtosis[c]:.2f}", f"{n.low[c]:.2f} … {n.high[c]:.2f}"]
        for c in range(len(n.std))
    ]
    clamps = []
    for label, low, high in [*((f"±{bound:g}", -bound, bound) for bound in (1.0, 2.0, 3.0)), ("range", *n.range())]:
        clamped = float(((z < low) | (z > high)).float().mean())
        clamps.append([label, f"{clamped:.2%}", f"{psnr(z.clamp(low, high)):.2f} dB"])
    return [
        markdown_table(["channel", "mean", "std", "kurtosis", "range"], channels),
        f"{float(torch.cat(nats).mean()):.2f} nats per latent dimension. Best possible PSNR: {best_psnr:.2f} dB on "
        f"{len(originals):,} validation images.",
        markdown_table(["clamp", "values clamped", "PSNR"], clamps),
        f"**{verdict(normalizer, best_psnr)}**",
    ]


def verdict(normalizer: Normalizer, psnr: float) -> str:
    """GO, or NO-GO with the remedy. `psnr` (dB) is that of reconstructions."""
    std = normalizer.std
    unused = [c for c in range(len(std)) if std[c] < MIN_RELATIVE_STD * float(std.max())]
    if unused:
        return (
            f"NO-GO: channels {unused} are unused (std below {MIN_RELATIVE_STD:g} of the largest): "
            f"use fewer vae.latent_channels, or a smaller vae.kl_weight"
        )
    if psnr < MIN_PSNR:
        return (
            f"NO-GO: the VAE reconstructs at {psnr:.1f} dB, and no sample can be better: "
            f"train it longer, or use more vae.latent_channels"
        )
    heavy = [c for c in range(len(std)) if normalizer.kurtosis[c] > MAX_KURTOSIS]
    if heavy:
        return (
            f"NO-GO: channels {heavy} have heavy tails (kurtosis above {MAX_KURTOSIS:g}), which samplers with few steps "
            f"miss: use a larger vae.kl_weight"
        )
    ratio = float(std.max() / std.min())
    if ratio > MAX_STD_RATIO:
        return (
            f"GO, with a caveat: the largest channel std is {ratio:.1f} times the smallest: "
            f"encodings.normalization=per_channel equalizes them"
        )
    return "GO"

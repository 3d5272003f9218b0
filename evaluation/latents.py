"""evaluation.task=latents: statistics of the latents, iFID, and a verdict whether a U-Net can be trained on them."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from config import Config
from dataset.encodings import LatentDataset
from evaluation.features import Features, frechet, load_features
from evaluation.reconstruction import mean_psnr_ssim, val_pixels
from evaluation.reports import markdown_table, print_plan, weights_origin, write_report
from models.normalizer import Normalizer
from models.vae import VAE
from pipeline.stage_files import load_encodings, load_images_for, load_vae
from sampling import slerp
from utils.checkpoints import fingerprint
from utils.device import pick_device, pick_precision
from utils.images import to_float, to_uint8

# Limits of verdict()
MIN_RELATIVE_STD = 0.1  # std of a channel / largest channel std
MAX_KURTOSIS = 10.0  # excess kurtosis of a channel
MIN_PSNR = 24.0  # PSNR of reconstructions in dB
MAX_STD_RATIO = 4.0  # largest channel std / smallest channel std

CHUNK = 4096  # training latents that nearest_latents() compares at a time


def run(config: Config, dry_run: bool) -> None:
    cfg, device = config.evaluation, pick_device(config.device)
    pick_precision("float32", device)  # turns off TF32
    vae, metadata = load_vae(config, device)
    encodings, networks = load_encodings(vae, config), load_features(cfg, device)
    name = f"{config.name}_latents"
    summary = f"statistics of {len(encodings.mean):,} training latents"
    print_plan(config, summary, device, torch.float32, [f"{name}.md"])
    if dry_run:
        return
    originals = val_pixels(load_images_for(config, metadata), cfg.num_images)
    paragraphs = latent_report(vae, encodings, networks, originals, cfg.batch_size, device)
    text = "\n\n".join([f"# Latents of {config.name}", *paragraphs])
    write_report(config, name, device, weights_origin("VAE", fingerprint(vae.state_dict()), metadata), text)


@torch.no_grad()
def latent_report(
    vae: VAE,
    encodings: LatentDataset,
    networks: list[Features],
    originals: np.ndarray,
    batch_size: int,
    device: torch.device,
) -> list[str]:
    """Return the paragraphs of the report.

    originals: validation images, uint8 (N, H, W, C).
    """
    normalizer, means, nats = encodings.normalizer.to(device), [], []
    for batch in torch.from_numpy(np.ascontiguousarray(originals)).split(batch_size):
        posterior = vae.encode(to_float(batch).to(device))
        means.append(normalizer.normalize(posterior.mean))
        nats.append(posterior.kl().mean(dim=(1, 2, 3)))
    z = torch.cat(means)

    def decode(z: Tensor) -> np.ndarray:
        return np.concatenate([to_uint8(vae.decode(normalizer.denormalize(batch))) for batch in z.split(batch_size)])

    def psnr(pixels: np.ndarray) -> float:
        return mean_psnr_ssim(pixels, originals, batch_size)[0]

    reconstructions = decode(z)
    best_psnr, n = psnr(reconstructions), normalizer
    channels = [
        [f"{c}", f"{n.mean[c]:.3f}", f"{n.std[c]:.3f}", f"{n.kurtosis[c]:.2f}", f"{n.low[c]:.2f} … {n.high[c]:.2f}"]
        for c in range(len(n.std))
    ]
    clamps = []
    for label, low, high in [*((f"±{bound:g}", -bound, bound) for bound in (1.0, 2.0, 3.0)), ("range", *n.range())]:
        clamped = float(((z < low) | (z > high)).float().mean())
        clamps.append([label, f"{clamped:.2%}", f"{psnr(decode(z.clamp(low, high))):.2f} dB"])
    ifid = []
    if networks:
        interpolated = decode(midpoints(z, nearest_latents(z, encodings.mean, normalizer)))
        ifid = ifid_report(networks, originals, reconstructions, interpolated, batch_size)
    return [
        markdown_table(["channel", "mean", "std", "kurtosis", "range"], channels),
        f"KL: {float(torch.cat(nats).mean()):.2f} nats per latent dimension. Best possible PSNR: {best_psnr:.2f} dB, "
        f"measured on reconstructions of {len(originals):,} validation images.",
        markdown_table(["clamp", "values clamped", "PSNR"], clamps),
        *ifid,
        f"**{verdict(normalizer, best_psnr)}**",
    ]


def nearest_latents(z: Tensor, latents: Tensor, normalizer: Normalizer) -> Tensor:
    """Find the training latent with the largest cosine similarity to each normalized z (N, C, h, w).

    `latents` (M, C, h, w) are not normalized; the result (N, C, h, w) is.
    """
    directions = F.normalize(z.flatten(1))  # (N, D)
    best = torch.full((len(z),), -2.0, device=z.device)
    rows = torch.zeros(len(z), dtype=torch.long, device=z.device)
    for i, chunk in enumerate(latents.split(CHUNK)):
        candidates = F.normalize(normalizer.normalize(chunk.to(z.device)).flatten(1))  # (CHUNK, D)
        similarity, index = (directions @ candidates.T).max(dim=1)
        rows = torch.where(similarity > best, index + i * CHUNK, rows)
        best = torch.maximum(similarity, best)
    return normalizer.normalize(latents[rows.cpu()].to(z.device))


def midpoints(z: Tensor, neighbors: Tensor) -> Tensor:
    return torch.stack([slerp(a, b, 0.5) for a, b in zip(z, neighbors)])


def ifid_report(
    networks: list[Features], originals: np.ndarray, reconstructions: np.ndarray, interpolated: np.ndarray, batch_size: int
) -> list[str]:
    """Report rFID and iFID: the Fréchet distances of reconstructions and of interpolated images to the originals.

    All images are uint8 (N, H, W, C). An interpolated image is decoded from the midpoint between a latent and its nearest
    training latent. Source: Xu et al., "Making Reconstruction FID Predictive of Diffusion Generation FID", arXiv 2603.05630.
    As in the authors' code, nearest means largest cosine similarity, and the interpolation is spherical. Their code picks
    one of the ten nearest latents at random. This function uses the nearest one, as the paper's abstract says.
    """
    rows, dims = [], []
    for network in networks:
        real, *others = (network(pixels, batch_size) for pixels in (originals, reconstructions, interpolated))
        rows.append([network.name, f"{real.shape[1]:,}", *(f"{frechet(x, real):.2f}" for x in others)])
        dims.append(real.shape[1])
    bias_note = " Fewer images than features make both distances mostly bias." if len(originals) < max(dims) else ""
    return [
        markdown_table(["network", "features", "rFID", "iFID"], rows),
        f"rFID is the Fréchet distance between the features φ(D(zᵢ)) and φ(xᵢ). iFID is the Fréchet distance between "
        f"φ(D(slerp(zᵢ, nᵢ, ½))) and φ(xᵢ) (Xu et al., arXiv 2603.05630). Here xᵢ are {len(originals):,} validation images, "
        f"zᵢ their latents, nᵢ the training latents with the largest cosine similarity to zᵢ, D is the decoder and φ the "
        f"feature network.{bias_note} In the paper, iFID predicts how well a diffusion model samples the latents; rFID does "
        f"not. Lower is better. Compare VAEs only on the same images and with the same feature network.",
    ]


def verdict(normalizer: Normalizer, psnr: float) -> str:
    """Return GO, or NO-GO with a remedy. `psnr` is the PSNR of reconstructions in dB."""
    std = normalizer.std
    unused = [c for c in range(len(std)) if std[c] < MIN_RELATIVE_STD * float(std.max())]
    if unused:
        return (
            f"NO-GO: channels {unused} are unused (std below {MIN_RELATIVE_STD:g} of the largest): "
            f"use fewer vae.latent_channels, or a smaller vae.kl_weight"
        )
    if psnr < MIN_PSNR:
        return (
            f"NO-GO: the PSNR of reconstructions is only {psnr:.1f} dB, and generated images cannot be better: "
            f"train the VAE longer, or use more vae.latent_channels"
        )
    heavy = [c for c in range(len(std)) if normalizer.kurtosis[c] > MAX_KURTOSIS]
    if heavy:
        return (
            f"NO-GO: channels {heavy} have heavy tails (kurtosis above {MAX_KURTOSIS:g}), which samplers do not reproduce "
            f"in few steps: use a larger vae.kl_weight"
        )
    ratio = float(std.max() / std.min())
    if ratio > MAX_STD_RATIO:
        return (
            f"GO, with a caveat: the largest channel std is {ratio:.1f} times the smallest: "
            f"encodings.normalization=per_channel equalizes them"
        )
    return "GO"

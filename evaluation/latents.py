"""evaluation.task=latents: statistics of the latents, iFID, and a verdict."""

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

MIN_RELATIVE_STD = 0.1  # of a channel, relative to the largest
MAX_KURTOSIS = 10.0
MIN_PSNR = 24.0  # dB
MAX_STD_RATIO = 4.0  # of the largest to the smallest channel
CHUNK = 4096  # training latents per step of the search for neighbors


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
    """Paragraphs on training latents per channel, clamping and iFID, measured on uint8 images (N, H, W, C)."""
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
        f"{float(torch.cat(nats).mean()):.2f} nats per latent dimension. Best possible PSNR: {best_psnr:.2f} dB on "
        f"{len(originals):,} validation images.",
        markdown_table(["clamp", "values clamped", "PSNR"], clamps),
        *ifid,
        f"**{verdict(normalizer, best_psnr)}**",
    ]


def nearest_latents(z: Tensor, latents: Tensor, normalizer: Normalizer) -> Tensor:
    """Return the one of `latents` (M, C, h, w), not normalized, with largest cosine similarity to each z (N, C, h, w)."""
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
    """rFID and iFID: Fréchet distances of decoded latents and of decoded midpoints to the originals, uint8 (N, H, W, C).

    iFID: Xu et al., "Making Reconstruction FID Predictive of Diffusion Generation FID", arXiv 2603.05630. As in the authors'
    code, neighbors are training latents with the largest cosine similarity, and the interpolation is spherical. That code
    takes a random one of the ten nearest latents; this takes the nearest, as in the paper's abstract.
    """
    rows, dims = [], []
    for network in networks:
        real, *others = (network(pixels, batch_size) for pixels in (originals, reconstructions, interpolated))
        rows.append([network.name, f"{real.shape[1]:,}", *(f"{frechet(x, real):.2f}" for x in others)])
        dims.append(real.shape[1])
    few = " They are fewer than the features: both distances are mostly bias." if len(originals) < max(dims) else ""
    return [
        markdown_table(["network", "features", "rFID", "iFID"], rows),
        f"rFID is the Fréchet distance of features φ(D(zᵢ)) to φ(xᵢ), iFID that of φ(D(slerp(zᵢ, nᵢ, ½))) (Xu et al., arXiv "
        f"2603.05630). xᵢ: {len(originals):,} validation images.{few} zᵢ: their latents; nᵢ: the training latent of largest "
        f"cosine similarity to zᵢ; D: decoder; φ: network. In the paper iFID predicts how well a diffusion model samples these "
        f"latents, and rFID does not. Lower is better; compare VAEs on the same images with the same network.",
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

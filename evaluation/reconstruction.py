"""evaluation.task=reconstruction: compare validation images with their reconstructions by the VAE."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from config import Config
from dataset import TEST, VAL, evenly_spaced
from dataset.image_cache import Images
from evaluation.features import frechet, load_features
from evaluation.reports import markdown_table, print_plan, weights_origin, write_report
from models.vae import VAE
from pipeline.stage_files import load_images_for, load_vae
from utils.checkpoints import fingerprint, load_perceptual
from utils.device import autocast, num_params, pick_device, pick_precision
from utils.errors import UserError
from utils.image_metrics import psnr_ssim
from utils.images import comparison_grid, save_png, to_float, to_uint8

MIN_VAL_IMAGES = 8  # must exceed PRC_NEIGHBORS, the number of nearest neighbors in precision and recall
GRID_IMAGES = 32


def run(config: Config, dry_run: bool) -> None:
    cfg, device = config.evaluation, pick_device(config.device)
    dtype = pick_precision(cfg.precision, device)
    vae, metadata = load_vae(config, device)
    networks = load_features(cfg, device)
    perceptual = load_perceptual(config.vae.perceptual, device)
    name = f"{config.name}_reconstruction"
    summary = f"VAE with {num_params(vae) / 1e6:.2f}M parameters at step {metadata['step']:,}, validation images"
    print_plan(config, summary, device, dtype, [f"{name}.md", f"{name}.png"])
    if dry_run:
        return

    originals = val_pixels(load_images_for(config, metadata), cfg.num_images)
    reconstructions = reconstruct(vae, originals, cfg.batch_size, device, dtype)
    psnr, ssim = mean_psnr_ssim(reconstructions, originals, cfg.batch_size)
    rows = [["PSNR", f"{psnr:.2f} dB"], ["SSIM", f"{ssim:.4f}"]]
    if perceptual is not None:
        distance = perceptual_distance(perceptual, originals, reconstructions, cfg.batch_size, device)
        rows.append([perceptual.title, f"{distance:.4f}"])
    for network in networks:
        distance = frechet(*(network(pixels, cfg.batch_size) for pixels in (reconstructions, originals)))
        rows.append([f"Fréchet distance to the originals ({network.name})", f"{distance:.2f}"])
    paragraphs = [
        f"# Reconstructions of {config.name}",
        f"{len(originals):,} validation images at {config.data.size_text} px.",
        markdown_table(["metric", "value"], rows),
    ]
    write_report(
        config, name, device, weights_origin("VAE", fingerprint(vae.state_dict()), metadata), "\n\n".join(paragraphs)
    )
    grid = comparison_grid(originals[:GRID_IMAGES], reconstructions[:GRID_IMAGES])
    save_png(grid, Path(config.results_dir) / f"{name}.png")


def val_pixels(images: Images, at_most: int) -> np.ndarray:
    """Return evenly spaced images of the validation and test splits, uint8 (N, H, W, C)."""
    # Evenly spaced and not the first ones, because files may be sorted by class.
    rows = evenly_spaced(np.concatenate([images.rows(VAL), images.rows(TEST)]), at_most)
    if len(rows) < MIN_VAL_IMAGES:
        raise UserError(
            f"evaluation needs at least {MIN_VAL_IMAGES} validation images (got {len(rows)}): "
            f"use more images or a larger data.val_fraction, and train again"
        )
    return images.pixels[rows]


@torch.no_grad()
def reconstruct(vae: VAE, pixels: np.ndarray, batch_size: int, device: torch.device, dtype: torch.dtype) -> np.ndarray:
    """Encode and decode uint8 images (N, H, W, C), using the posterior mean as the latent."""
    reconstructions = []
    for batch in torch.from_numpy(np.ascontiguousarray(pixels)).split(batch_size):
        with autocast(device, dtype):
            reconstructions.append(to_uint8(vae.decode(vae.encode(to_float(batch).to(device)).mean)))
    return np.concatenate(reconstructions)


def mean_psnr_ssim(pixels: np.ndarray, originals: np.ndarray, batch_size: int) -> tuple[float, float]:
    """PSNR (dB) and SSIM of uint8 images (N, H, W, C) over all channels, averaged over images."""
    sums = np.zeros(2)
    for start in range(0, len(pixels), batch_size):
        batch = slice(start, start + batch_size)
        x, y = (
            torch.from_numpy(np.ascontiguousarray(images[batch])).permute(0, 3, 1, 2).float()
            for images in (originals, pixels)
        )
        sums += len(x) * np.array([float(metric) for metric in psnr_ssim(y, x, data_range=255.0)])
    psnr, ssim = sums / len(pixels)
    return psnr, ssim


@torch.no_grad()
def perceptual_distance(perceptual: nn.Module, a: np.ndarray, b: np.ndarray, batch_size: int, device: torch.device) -> float:
    def batch(pixels: np.ndarray, start: int) -> Tensor:
        return to_float(torch.from_numpy(pixels[start : start + batch_size].copy())).to(device)

    distances = [perceptual(batch(a, start), batch(b, start)) for start in range(0, len(a), batch_size)]
    return float(torch.cat(distances).mean())

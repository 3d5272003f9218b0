"""evaluation.task=generation: metrics between generated and training images, and a memorization check."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from config import Config, SamplingConfig
from dataset import TRAIN, evenly_spaced
from dataset.conditions import val_conditions
from dataset.image_cache import Images
from evaluation.features import Features, frechet, kid, make_features, precision_recall
from evaluation.reconstruction import reconstruct, val_pixels
from evaluation.reports import markdown_table, print_plan, weights_origin, write_report
from models.conditioning import Cond
from pipeline.generate import OutputSpec
from pipeline.latent_diffusion import LatentDiffusion
from pipeline.latent_stats import require_finite
from pipeline.stage_files import load_encodings, load_images_for
from utils.checkpoints import load_tensors, save_tensors
from utils.device import pick_device, pick_precision
from utils.errors import UserError
from utils.images import image_grid, save_png

NEAREST_IMAGES = 12  # generated images in nearest_grid()
NUM_NEIGHBORS = 3  # training images per generated image
NEAR_QUANTILE = 0.01  # of the distances of validation images; see Memorization


def run(config: Config, dry_run: bool) -> None:
    cfg, sampling, device = config.evaluation, config.sampling, pick_device(config.device)
    dtype, num_images = pick_precision(cfg.precision, device), cfg.num_generated or cfg.num_images
    model = LatentDiffusion.load(config, device, dtype)
    model.timesteps(sampling)  # checks the settings
    encodings = load_encodings(model.vae, config) if model.unet.conditioner else None
    features = make_features(cfg.features, cfg.weights, device)
    guidance = f"_w{sampling.guidance:g}" if sampling.guidance != 1 else ""
    name = f"{config.name}_{config.diffusion_name}_{sampling.sampler}{sampling.steps}{guidance}_generation"
    summary = f"{num_images:,} images by {sampling.sampler} with {sampling.steps} steps, features of {features.name}"
    print_plan(config, summary, device, dtype, [f"{name}.md", f"{name}_nearest.png"])
    if dry_run:
        return

    images = load_images_for(config, model.checkpoint.vae_metadata)
    val = val_pixels(images, num_images)
    train_rows = images.rows(TRAIN, cfg.num_reference)
    train_features = training_features(config, images, features, train_rows)
    cond = val_conditions(model.unet.conditioner, encodings, num_images, device)
    generated, stats = generate_images(model, sampling, cond, num_images)
    reconstructed = reconstruct(model.vae, val, cfg.batch_size, device, dtype)
    generated_features, val_features, reconstructed_features = (
        features(pixels, cfg.batch_size) for pixels in (generated, val, reconstructed)
    )
    # The metrics depend on the number of images: compare sets of the same size.
    sets = {
        "generated": evenly_spaced(generated_features, len(val)),
        "validation images": val_features,
        "validation images, reconstructed by the VAE": reconstructed_features,
    }
    if len(generated) > len(val):
        sets["generated, all"] = generated_features
    metrics = [SetMetrics.measure(label, set_features, train_features) for label, set_features in sets.items()]
    if config.data.flip:  # the U-Net has seen mirrored images
        mirrored = training_features(config, images, features, train_rows, mirrored=True)
        train_features = torch.cat([train_features, mirrored])
    # Generated images are compared with reconstructions, because the blur of the VAE alone changes distances.
    memorization = Memorization.measure(generated_features, reconstructed_features, train_features)

    num_train = f"{len(train_rows):,} training images"
    small_set = small_set_note(len(val), train_features.shape[1])
    paragraphs = [
        f"# Generated images of {config.name}, {config.diffusion_name}: {sampling.sampler}, {sampling.steps} steps, "
        f"spacing {model.spacing(sampling)}, guidance {sampling.guidance:g}",
        f"Compared with {len(train_rows):,} of {len(images.rows(TRAIN)):,} training images, not mirrored "
        f"({config.data.source}, crop {config.data.crop_name}, {config.data.size_text} px), "
        f"in features of **{features.name}**.{small_set}",
        f"Conditions of {min(num_images, len(encodings.val_mean)):,} validation images."
        if cond
        else "Unconditional samples.",
        markdown_table(METRICS_HEADER, [row.cells() for row in metrics]),
        f"Latents: generated/training std {stats['std_ratio']:.3f} overall, {stats['worst_channel_ratio']:.3f} in the worst "
        f"channel; {stats['clamped']:.2%} of clean estimates clamped; {stats['out_of_range']:.2%} of pixels out of range.",
        error_budget(*metrics[:3]),
        memorization.describe(num_train + (" and their mirror images" if config.data.flip else "")),
        f"{name}_nearest.png shows the {NEAREST_IMAGES} nearest: the generated image, then its {NUM_NEIGHBORS} nearest "
        f"training images.",
    ]
    origin = weights_origin("U-Net", model.checkpoint.fingerprint, model.checkpoint.metadata)
    write_report(config, name, device, origin, "\n\n".join(paragraphs))
    grid = nearest_grid(memorization, generated, images.pixels, train_rows)
    save_png(grid, Path(config.results_dir) / f"{name}_nearest.png")


def generate_images(model: LatentDiffusion, cfg: SamplingConfig, cond: Cond, n: int) -> tuple[np.ndarray, dict]:
    """Return uint8 (n, H, W, C) and the statistics of their latents. Image i has condition i % len(cond[0])."""
    samples = model.generate(cfg.model_copy(update={"cols": 1}), OutputSpec(n, keep_pixels=n), cond)
    require_finite(samples.moments, cfg)
    return samples.pixel_array(), samples.stats(model.normalizer)


def training_features(
    config: Config, images: Images, features: Features, rows: np.ndarray, mirrored: bool = False
) -> Tensor:
    """Return (len(rows), D), cached by images, network and rows."""
    weights = config.evaluation.weights
    digest = hashlib.sha256(Path(weights).read_bytes()).hexdigest() if weights else "download"
    key = f"{images.fingerprint} {features.name} {digest} {len(rows)} {images.pixels.shape}{' mirrored' if mirrored else ''}"
    path = Path(config.runs_dir) / "cache" / f"features-{hashlib.sha256(key.encode()).hexdigest()[:16]}.pt"
    if not path.exists():
        values = features(images.pixels, config.evaluation.batch_size, rows, mirrored)
        save_tensors(path, {"key": key, "features": values})
    remedy = "remove it and run the same command again"
    content = load_tensors(path, remedy)
    if content.get("key") != key:
        raise UserError(f"{path} does not hold the features of these images: {remedy}")
    return content["features"]


METRICS_HEADER = ("images", "N", "Fréchet distance", "KID · 1000", "precision", "recall")


@dataclass
class SetMetrics:
    """Metrics between a set of images and the training images: one row of the report's table."""

    label: str
    n: int
    frechet: float
    kid: float
    kid_std: float
    precision: float
    recall: float

    @classmethod
    def measure(cls, label: str, features: Tensor, train_features: Tensor) -> "SetMetrics":
        return cls(
            label,
            len(features),
            frechet(features, train_features),
            *kid(features, train_features),
            *precision_recall(features, train_features),
        )

    def cells(self) -> list[str]:
        kid = f"{1000 * self.kid:.2f} ± {1000 * self.kid_std:.2f}"
        return [self.label, f"{self.n:,}", f"{self.frechet:.1f}", kid, f"{self.precision:.3f}", f"{self.recall:.3f}"]


def small_set_note(n: int, dim: int) -> str:
    if n >= dim:
        return ""
    return (
        f" {n:,} images are fewer than the {dim:,} features: most of each Fréchet distance is then bias, the same in all "
        f"rows, which makes their ratio look better than it is. KID has no such bias."
    )


def error_budget(generated: SetMetrics, val: SetMetrics, reconstructed: SetMetrics) -> str:
    if val.frechet <= 0:
        return "No error budget: validation images do not differ from training images."
    return (
        f"Error budget: the Fréchet distance of generated images is {generated.frechet / val.frechet:.2f} times that of "
        f"validation images. Of the difference of {generated.frechet - val.frechet:.1f}, the VAE causes "
        f"{reconstructed.frechet - val.frechet:.1f}, and the U-Net and its sampler "
        f"{generated.frechet - reconstructed.frechet:.1f}."
    )


@dataclass
class Memorization:
    """Feature distances of generated images to their nearest training images."""

    nearest: list[tuple[int, list[int]]]  # (generated, training images), nearest first
    median: float
    val_median: float
    near: float  # fraction of generated images nearer than the NEAR_QUANTILE of validation images

    @classmethod
    def measure(cls, generated: Tensor, val: Tensor, train: Tensor) -> "Memorization":
        """Compute from the features (N, D) of the three sets of images."""

        def neighbors_of(features: Tensor) -> tuple[Tensor, Tensor]:
            parts = [torch.cdist(part, train).topk(NUM_NEIGHBORS, largest=False) for part in features.split(256)]
            return torch.cat([part.values[:, 0] for part in parts]), torch.cat([part.indices for part in parts])

        distances, neighbors = neighbors_of(generated)
        val_distances, _ = neighbors_of(val)
        near = float((distances < val_distances.quantile(NEAR_QUANTILE)).float().mean())
        nearest = [(i, neighbors[i].tolist()) for i in distances.argsort().tolist()]
        return cls(nearest, float(distances.median()), float(val_distances.median()), near)

    def describe(self, training_images: str) -> str:
        return (
            f"Memorization: the median distance to the nearest of {training_images} is {self.median:.2f} for generated "
            f"images and {self.val_median:.2f} for validation images, reconstructed by the VAE. {self.near:.1%} of generated "
            f"images are nearer than {1 - NEAR_QUANTILE:.0%} of the reconstructed validation images; "
            f"{NEAR_QUANTILE:.0%} are expected without memorization."
        )


def nearest_grid(memorization: Memorization, generated: np.ndarray, pixels: np.ndarray, train_rows: np.ndarray) -> Image:
    """Generated images, each with its nearest training images. Neighbors j >= len(train_rows) are mirrored."""
    grid = []
    for i, neighbors in memorization.nearest[:NEAREST_IMAGES]:
        grid.append(generated[i])
        for j in neighbors:
            image = pixels[train_rows[j % len(train_rows)]]
            grid.append(image if j < len(train_rows) else image[:, ::-1])
    return image_grid(np.stack(grid), 3 * (1 + NUM_NEIGHBORS))

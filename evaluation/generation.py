"""evaluation.task=generation: compare generated images with training images, and check for memorization."""

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
from evaluation.features import KID_SUBSETS, MAX_KID_SUBSET, Features, frechet, kid, load_features, precision_recall
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
NUM_NEIGHBORS = 3  # training images shown next to each generated image
# A generated image is "near" if its distance is below this quantile of the distances of reconstructed validation images.
NEAR_QUANTILE = 0.01


def run(config: Config, dry_run: bool) -> None:
    cfg, sampling, device = config.evaluation, config.sampling, pick_device(config.device)
    dtype, num_images = pick_precision(cfg.precision, device), cfg.num_generated or cfg.num_images
    if not cfg.features:
        raise UserError("evaluation.task=generation needs at least one network in evaluation.features (got [])")
    model = LatentDiffusion.load(config, device, dtype)
    model.timesteps(sampling)  # reports wrong sampling settings before the evaluation starts
    encodings = load_encodings(model.vae, config) if model.unet.conditioner else None
    networks = load_features(cfg, device)
    guidance = f"_w{sampling.guidance:g}" if sampling.guidance != 1 else ""
    name = f"{config.name}_{config.diffusion_name}_{sampling.sampler}{sampling.steps}{guidance}_generation"
    titles = ", ".join(network.name for network in networks)
    summary = f"{num_images:,} images by {sampling.sampler} with {sampling.steps} steps, features of {titles}"
    print_plan(config, summary, device, dtype, [f"{name}.md", f"{name}_nearest.png"])
    if dry_run:
        return

    images = load_images_for(config, model.checkpoint.vae_metadata)
    val = val_pixels(images, num_images)
    train_rows = images.rows(TRAIN, cfg.num_reference)
    cond = val_conditions(model.unet.conditioner, encodings, num_images, device)
    generated, stats = generate_images(model, sampling, cond, num_images)
    reconstructed = reconstruct(model.vae, val, cfg.batch_size, device, dtype)
    comparisons = []
    for network in networks:
        sets = [network(pixels, cfg.batch_size) for pixels in (generated, val, reconstructed)]
        train = training_features(config, images, network, train_rows)
        mirrored = training_features(config, images, network, train_rows, mirrored=True) if config.data.flip else None
        comparisons.append(Comparison.measure(network, sets, train, mirrored))

    paragraphs = [
        f"# Generated images of {config.name}, {config.diffusion_name}: {sampling.sampler}, {sampling.steps} steps, "
        f"spacing {model.spacing(sampling)}, guidance {sampling.guidance:g}",
        f"Compared with {len(train_rows):,} of {len(images.rows(TRAIN)):,} training images, not mirrored "
        f"({config.data.source}, crop {config.data.crop_name}, {config.data.size_text} px), "
        f"in features of {', '.join(c.network for c in comparisons)}.{small_set_note(len(val), comparisons)}",
        f"Conditioned on the labels or captions of {min(num_images, len(encodings.val_mean)):,} validation images."
        if cond
        else "Unconditional samples.",
        comparison_table(comparisons),
        f"KID: mean ± std over {KID_SUBSETS} random subsets of at most {MAX_KID_SUBSET:,} images. This std is not a standard "
        f"error.",
        f"Latents: the std of generated latents is {stats['std_ratio']:.3f} times that of training latents, and "
        f"{stats['worst_channel_ratio']:.3f} times in the worst channel. {stats['clamped']:.2%} of the values of clean "
        f"estimates were clamped. {stats['out_of_range']:.2%} of pixel values were outside [-1, 1].",
        "Error budget:\n\n" + "\n".join(f"- {c.name}: {error_budget(*c.distances[:3])}" for c in comparisons),
        f"Memorization: distance to the nearest of {len(train_rows):,} training images"
        f"{' and their mirror images' * config.data.flip}. Without memorization, about {NEAR_QUANTILE:.0%} of generated "
        f"images are nearer to a training image than {1 - NEAR_QUANTILE:.0%} of the reconstructed validation images are.",
        f"{name}_nearest.png shows the {min(NEAREST_IMAGES, num_images)} generated images that are nearest to a training "
        f"image (features of {comparisons[0].name}), each followed by its {NUM_NEIGHBORS} nearest training images.",
    ]
    origin = weights_origin("U-Net", model.checkpoint.fingerprint, model.checkpoint.metadata)
    write_report(config, name, device, origin, "\n\n".join(paragraphs))
    grid = nearest_grid(comparisons[0].memorization, generated, images.pixels, train_rows)
    save_png(grid, Path(config.results_dir) / f"{name}_nearest.png")


def generate_images(model: LatentDiffusion, cfg: SamplingConfig, cond: Cond, n: int) -> tuple[np.ndarray, dict]:
    """Generate images, uint8 (n, H, W, C), and return them with statistics of their latents.

    Image i has condition i % len(cond[0]).
    """
    samples = model.generate(cfg.model_copy(update={"cols": 1}), OutputSpec(n, keep_pixels=n), cond)
    require_finite(samples.moments, cfg)
    return samples.pixel_array(), samples.stats(model.normalizer)


def training_features(
    config: Config, images: Images, features: Features, rows: np.ndarray, mirrored: bool = False
) -> Tensor:
    """Return the features (len(rows), D) of the training images at `rows`, from a cache file if there is one."""
    network = f"{features.name} {features.fingerprint}"
    key = f"{images.fingerprint} {network} {len(rows)} {images.pixels.shape}{' mirrored' if mirrored else ''}"
    path = Path(config.runs_dir) / "cache" / f"features-{hashlib.sha256(key.encode()).hexdigest()[:16]}.pt"
    if not path.exists():
        values = features(images.pixels, config.evaluation.batch_size, rows, mirrored)
        save_tensors(path, {"key": key, "features": values})
    remedy = "remove it and run the same command again"
    content = load_tensors(path, remedy)
    if content.get("key") != key:
        raise UserError(f"{path} does not contain the features of these images: {remedy}")
    return content["features"]


@dataclass
class SetMetrics:
    """Metrics of one set of images compared with the training images."""

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


METRICS = {
    "Fréchet distance": lambda d: f"{d.frechet:.2f}",
    "KID · 1000": lambda d: f"{1000 * d.kid:.2f} ± {1000 * d.kid_std:.2f}",
    "precision": lambda d: f"{d.precision:.3f}",
    "recall": lambda d: f"{d.recall:.3f}",
}


@dataclass
class Comparison:
    """Metrics and memorization check with the features of one network."""

    name: str
    network: str  # description: name, number of features and weights
    dim: int  # number of features
    # The first three entries are for generated, validation and reconstructed images, in equal numbers. If there are more
    # generated images than validation images, a fourth entry is for all generated images.
    distances: list[SetMetrics]
    memorization: "Memorization"

    @classmethod
    def measure(cls, network: Features, sets: list[Tensor], train: Tensor, mirrored: Tensor | None) -> "Comparison":
        """Compute the metrics of all sets of images with one network.

        sets             features of generated, validation and reconstructed images
        train, mirrored  features of the training images and of their mirror images
        """
        generated, val, reconstructed = sets
        # Compare sets of equal size, because the metrics depend on the number of images.
        labelled = {"generated": evenly_spaced(generated, len(val)), "validation images": val, RECONSTRUCTED: reconstructed}
        if len(generated) > len(val):
            labelled["generated, all"] = generated
        distances = [SetMetrics.measure(label, features, train) for label, features in labelled.items()]
        train_and_mirrored = train if mirrored is None else torch.cat([train, mirrored])
        # Use reconstructed validation images: the VAE blurs them like generated images, and blur changes distances.
        memorization = Memorization.measure(generated, reconstructed, train_and_mirrored)
        return cls(network.name, network.description(train.shape[1]), train.shape[1], distances, memorization)


RECONSTRUCTED = "validation images, reconstructed by the VAE"


def comparison_table(comparisons: list[Comparison]) -> str:
    """One row per metric and set of images, one column per network."""
    first, memorizations = comparisons[0], [c.memorization for c in comparisons]
    rows = [
        [metric, first.distances[i].label, f"{first.distances[i].n:,}", *(text(c.distances[i]) for c in comparisons)]
        for metric, text in METRICS.items()
        for i in range(len(first.distances))
    ]
    median = "median distance to the nearest training image"
    near = f"nearer than {1 - NEAR_QUANTILE:.0%} of these reconstructions"
    num_generated = f"{len(first.memorization.nearest):,}"
    rows += [
        [median, "generated", num_generated, *(f"{m.median:.2f}" for m in memorizations)],
        [median, RECONSTRUCTED, f"{first.distances[2].n:,}", *(f"{m.val_median:.2f}" for m in memorizations)],
        [near, "generated", num_generated, *(f"{m.near:.1%}" for m in memorizations)],
    ]
    return markdown_table(["metric", "images", "N", *(c.name for c in comparisons)], rows)


def small_set_note(n: int, comparisons: list[Comparison]) -> str:
    larger = [f"{c.dim:,} features of {c.name}" for c in comparisons if c.dim > n]
    if not larger:
        return ""
    return (
        f" {n:,} images are fewer than the {' and the '.join(larger)}. Most of each Fréchet distance is then a bias that "
        f"all rows share, so ratios of these distances look better than they are. KID has no such bias."
    )


def error_budget(generated: SetMetrics, val: SetMetrics, reconstructed: SetMetrics) -> str:
    if val.frechet <= 0:
        return "not available, because the Fréchet distance of validation images is not above 0."
    return (
        f"the Fréchet distance of generated images is {generated.frechet / val.frechet:.2f} times that of "
        f"validation images. Of the difference of {generated.frechet - val.frechet:.2f}, the VAE causes "
        f"{reconstructed.frechet - val.frechet:.2f}, and the U-Net and its sampler "
        f"{generated.frechet - reconstructed.frechet:.2f}."
    )


@dataclass
class Memorization:
    """Feature distances of generated images to their nearest training images."""

    nearest: list[tuple[int, list[int]]]  # indices (generated image, its nearest training images), sorted by distance
    median: float  # median distance from a generated image to its nearest training image
    val_median: float  # median distance from a reconstructed validation image to its nearest training image
    near: float  # fraction of generated images that are "near", see NEAR_QUANTILE

    @classmethod
    def measure(cls, generated: Tensor, val: Tensor, train: Tensor) -> "Memorization":
        """Compare the features (N, D) of the three sets of images."""

        def neighbors_of(features: Tensor) -> tuple[Tensor, Tensor]:
            parts = [torch.cdist(part, train).topk(NUM_NEIGHBORS, largest=False) for part in features.split(256)]
            return torch.cat([part.values[:, 0] for part in parts]), torch.cat([part.indices for part in parts])

        distances, neighbors = neighbors_of(generated)
        val_distances, _ = neighbors_of(val)
        near = float((distances < val_distances.quantile(NEAR_QUANTILE)).float().mean())
        nearest = [(i, neighbors[i].tolist()) for i in distances.argsort().tolist()]
        return cls(nearest, float(distances.median()), float(val_distances.median()), near)


def nearest_grid(memorization: Memorization, generated: np.ndarray, pixels: np.ndarray, train_rows: np.ndarray) -> Image:
    """Grid of generated images, each followed by its nearest training images.

    A neighbor j >= len(train_rows) is the mirror image of training image j - len(train_rows).
    """
    grid = []
    for i, neighbors in memorization.nearest[:NEAREST_IMAGES]:
        grid.append(generated[i])
        for j in neighbors:
            image = pixels[train_rows[j % len(train_rows)]]
            grid.append(image if j < len(train_rows) else image[:, ::-1])
    return image_grid(np.stack(grid), 3 * (1 + NUM_NEIGHBORS))

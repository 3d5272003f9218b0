"""evaluation.task=condition: whether generated images depend on their condition.

Each image is generated from the caption (or labels) of a validation image. If the condition matters, the generated image is
nearer to this validation image than to those with other captions.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from config import Config
from dataset import VAL, evenly_spaced
from dataset.conditions import titled_val_conditions
from evaluation.features import load_features
from evaluation.generation import generate_images
from evaluation.reconstruction import MIN_VAL_IMAGES, reconstruct
from evaluation.reports import markdown_table, print_plan, weights_origin, write_report
from models.conditioning import LabelEmbedder
from pipeline.latent_diffusion import LatentDiffusion, check_guidance
from pipeline.stage_files import load_encodings, load_images_for
from utils.device import pick_device, pick_precision
from utils.errors import UserError
from utils.images import image_grid, save_png

GRID_ROWS = 12
RECONSTRUCTED = "validation images, reconstructed by the VAE"


def run(config: Config, dry_run: bool) -> None:
    cfg, device = config.evaluation, pick_device(config.device)
    dtype = pick_precision(cfg.precision, device)
    if not cfg.features:
        raise UserError("evaluation.task=condition needs at least one network in evaluation.features (got [])")
    unguided = config.sampling.model_copy(update={"guidance": 1.0})
    settings = [config.sampling.model_copy(update={"guidance": scale}) for scale in cfg.guidance]
    model = LatentDiffusion.load(config.model_copy(update={"sampling": unguided}), device, dtype)
    if model.unet.conditioner is None:
        raise UserError(
            f"evaluation.task=condition: {model.checkpoint.path} is unconditional: train with diffusion.condition=class or text"
        )
    for sampling in settings:
        check_guidance(sampling, model.unet, model.checkpoint)
    model.timesteps(config.sampling)  # checks the settings
    encodings = load_encodings(model.vae, config)
    images = load_images_for(config, model.checkpoint.vae_metadata)
    rows = evenly_spaced(images.rows(VAL), cfg.num_images)
    if len(rows) < MIN_VAL_IMAGES:
        raise UserError(f"evaluation.task=condition needs at least {MIN_VAL_IMAGES} validation images (got {len(rows)})")
    networks = load_features(cfg, device)
    kind = "labels" if isinstance(model.unet.conditioner, LabelEmbedder) else "caption"
    sampler = f"{config.sampling.sampler} with {config.sampling.steps} steps"
    name = f"{config.name}_{config.diffusion_name}_{config.sampling.sampler}{config.sampling.steps}_condition"
    scales = ", ".join(f"{scale:g}" for scale in cfg.guidance)
    summary = f"{len(rows):,} conditions of validation images, {sampler}, guidance {scales}"
    print_plan(config, summary, device, dtype, [f"{name}.md", f"{name}.png"])
    if dry_run:
        return

    val = images.pixels[rows]
    cond, titles = titled_val_conditions(model.unet.conditioner, encodings, len(rows), device)
    sets = {RECONSTRUCTED: reconstruct(model.vae, val, cfg.batch_size, device, dtype)}
    std_ratios = {}
    for sampling in settings:
        label = f"generated, guidance {sampling.guidance:g}"
        sets[label], stats = generate_images(model, sampling, cond, len(rows))
        std_ratios[label] = f"{stats['std_ratio']:.3f}"
    paragraphs = [
        f"# Dependence on the condition: {config.name}, {config.diffusion_name}",
        f"{len(rows):,} images per row, each generated from the {kind} of one validation image ({config.data.source}, "
        f"{config.data.size_text} px): {sampler}, spacing {model.spacing(config.sampling)}. All rows start from the same noise.",
    ]
    for network in networks:
        val_features = network(val, cfg.batch_size)
        table = []
        for label, pixels in sets.items():
            match = Match.measure(network(pixels, cfg.batch_size), val_features, titles)
            table.append([label, *match.cells(), std_ratios.get(label, "–")])
        title = f"**{network.name}** ({val_features.shape[1]:,} features{f', {network.weights}' if network.weights else ''})"
        paragraphs += [title, markdown_table([*HEADER, "latent std ratio"], table)]
    paragraphs.append(
        f"Feature distances of each image, averaged: own, to the validation image with the same {kind}; other, mean over the "
        f"validation images with another {kind}; difference, other - own with its standard error; nearer, the fraction of "
        f"other validation images that are farther away than its own. Images that do not depend on the {kind} have a "
        f"difference of 0 and are nearer to their own in 50 %."
    )
    origin = weights_origin("U-Net", model.checkpoint.fingerprint, model.checkpoint.metadata)
    write_report(config, name, device, origin, "\n\n".join(paragraphs))
    save_png(match_grid(val, list(sets.values()), titles), Path(config.results_dir) / f"{name}.png")


HEADER = ["images", "own", "other", "difference", "nearer to its own"]


@dataclass
class Match:
    """Feature distances from generated images to the validation image of their own condition and of other conditions."""

    own: float  # mean distance to the validation image of the same condition
    other: float  # mean distance to the validation images of other conditions
    difference: float  # mean of other - own
    standard_error: float  # of the difference
    # Fraction of the other validation images that are farther from the generated image than its own validation image.
    # A tie counts as half. The expected value is 0.5 for images that do not depend on the condition.
    nearer: float

    @classmethod
    def measure(cls, generated: Tensor, val: Tensor, titles: list[str]) -> "Match":
        """Compare features (N, D). Image i was generated from the condition titles[i] of validation image i."""
        distances = torch.cdist(generated.double(), val.double(), compute_mode="donot_use_mm_for_euclid_dist")  # (N, N)
        _, ids = np.unique(titles, return_inverse=True)
        is_other = torch.from_numpy(ids[:, None] != ids[None, :])
        if not is_other.any(dim=1).all():
            raise UserError("evaluation.task=condition: all validation images have the same condition")
        own, num_others = distances.diagonal(), is_other.sum(dim=1)
        other = (distances * is_other).sum(dim=1) / num_others
        farther = (distances > own[:, None]).double() + 0.5 * (distances == own[:, None]).double()
        nearer = (farther * is_other).sum(dim=1) / num_others
        difference = other - own
        error = difference.std() / len(own) ** 0.5
        return cls(*(float(x) for x in (own.mean(), other.mean(), difference.mean(), error, nearer.mean())))

    def cells(self) -> list[str]:
        difference = f"{self.difference:.3f} ± {self.standard_error:.3f}"
        return [f"{self.own:.3f}", f"{self.other:.3f}", difference, f"{self.nearer:.1%}"]


def match_grid(val: np.ndarray, sets: list[np.ndarray], titles: list[str]) -> Image:
    """One row per condition: its validation image, then the image of each set."""
    chosen = evenly_spaced(np.arange(len(val)), GRID_ROWS)
    rows = [np.stack([images[i] for images in (val, *sets)]) for i in chosen]
    return image_grid(np.concatenate(rows), 1 + len(sets), titles=[titles[i] for i in chosen])

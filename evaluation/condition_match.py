"""evaluation.task=condition: whether generated images depend on their condition.

Each image is generated from the caption (or labels) of a validation image. If the condition matters, this validation image
is nearer to it than to images generated from other captions.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from config import Config, SamplingConfig
from dataset import VAL, evenly_spaced
from dataset.conditions import titled_val_conditions
from evaluation.features import load_features
from evaluation.generation import RECONSTRUCTED, generate_images
from evaluation.reconstruction import MIN_VAL_IMAGES, reconstruct
from evaluation.reports import markdown_table, print_plan, weights_origin, write_report
from models.conditioning import LabelEmbedder
from pipeline.latent_diffusion import LatentDiffusion, check_guidance
from pipeline.stage_files import load_encodings, load_images_for
from utils.device import pick_device, pick_precision
from utils.errors import UserError
from utils.images import image_grid, save_png

GRID_ROWS = 12
HEADER = ["images", "own", "other", "difference", "nearer", "latent std ratio"]


def run(config: Config, dry_run: bool) -> None:
    cfg, device = config.evaluation, pick_device(config.device)
    dtype = pick_precision(cfg.precision, device)
    if not cfg.features:
        raise UserError("evaluation.task=condition needs at least one network in evaluation.features (got [])")
    if config.sampling.autoguidance is not None:
        raise UserError("evaluation.task=condition compares scales of classifier-free guidance: unset sampling.autoguidance")
    settings = [with_guidance(config.sampling, scale) for scale in cfg.guidance]
    unguided = config.model_copy(update={"sampling": with_guidance(config.sampling, 1.0)})
    model = LatentDiffusion.load(unguided, device, dtype)
    if model.unet.conditioner is None:
        raise UserError(
            f"evaluation.task=condition: {model.checkpoint.path} is unconditional: train with diffusion.condition=class or text"
        )
    for sampling in settings:
        check_guidance(sampling, model.unet, model.checkpoint, key="evaluation.guidance")
    model.timesteps(config.sampling)  # checks the settings
    encodings = load_encodings(model.vae, config)
    images = load_images_for(config, model.checkpoint.vae_metadata)
    rows = evenly_spaced(images.rows(VAL), cfg.num_images)
    if len(rows) < MIN_VAL_IMAGES:
        raise UserError(f"evaluation.task=condition needs at least {MIN_VAL_IMAGES} validation images (got {len(rows)})")
    cond, titles = titled_val_conditions(model.unet.conditioner, encodings, len(rows), device)
    require_different_conditions(titles)
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
        paragraphs += [network.description(val_features.shape[1]), markdown_table(HEADER, table)]
    paragraphs.append(
        f"Mean feature distances of a validation image: *own*, to the image generated from its {kind}; *other*, to images "
        f"generated from another {kind}. *difference*: other - own ± its standard error (jackknife). *nearer*: fraction of images "
        f"from another {kind} that are farther away than the own one. Images that do not depend on the {kind} have a "
        f"difference of 0 and 50 % on average."
    )
    origin = weights_origin("U-Net", model.checkpoint.fingerprint, model.checkpoint.metadata)
    write_report(config, name, device, origin, "\n\n".join(paragraphs))
    save_png(match_grid(val, list(sets.values()), titles), Path(config.results_dir) / f"{name}.png")


def with_guidance(cfg: SamplingConfig, scale: float) -> SamplingConfig:
    """Return settings with this guidance scale. Scale 0 applies to all noise levels: images without a condition."""
    interval = None if scale in (0, 1) else cfg.guidance_interval
    return cfg.model_copy(update={"guidance": scale, "guidance_interval": interval})


@dataclass
class Match:
    """Feature distances between validation images and images generated from their own or from another condition.

    If the generator ignores the condition, `difference` has expectation 0 and `nearer` 0.5, also for unequal classes.
    """

    own: float  # mean distance of a validation image to the image generated from its condition
    other: float  # the same for images generated from other conditions
    difference: float  # other - own
    standard_error: float  # of the difference
    nearer: float  # fraction of images from other conditions that are farther away than the own one; ties count half

    @classmethod
    def measure(cls, generated: Tensor, val: Tensor, titles: list[str]) -> "Match":
        """Compare features (N, D). Image i was generated from titles[i], the condition of validation image i."""
        distances = torch.cdist(val.double(), generated.double(), compute_mode="donot_use_mm_for_euclid_dist")  # (val, gen)
        _, ids = np.unique(titles, return_inverse=True)
        is_other = torch.from_numpy(ids[:, None] != ids[None, :])
        counts, own = is_other.sum(dim=1), distances.diagonal()
        sums = (distances * is_other).sum(dim=1)
        other = sums / counts
        farther = (distances > own[:, None]).double() + 0.5 * (distances == own[:, None]).double()
        nearer = (farther * is_other).sum(dim=1) / counts
        # Jackknife (Tukey 1958): the distances to one generated image depend on each other. Column i: without pair i.
        differences = (sums[:, None] - distances * is_other) / (counts[:, None] - is_other.long()) - own[:, None]
        estimates = differences.fill_diagonal_(0.0).sum(dim=0) / (len(own) - 1)
        estimates = estimates[estimates.isfinite()]  # not finite if pair i is the only one with another condition
        error = estimates.std(correction=0) * (len(estimates) - 1) ** 0.5
        return cls(*(float(x) for x in (own.mean(), other.mean(), other.mean() - own.mean(), error, nearer.mean())))

    def cells(self) -> list[str]:
        difference = f"{self.difference:.3f} ± {self.standard_error:.3f}"
        return [f"{self.own:.3f}", f"{self.other:.3f}", difference, f"{self.nearer:.1%}"]


def require_different_conditions(titles: list[str]) -> None:
    if len(set(titles)) < 2:
        raise UserError("evaluation.task=condition: all validation images have the same condition")


def match_grid(val: np.ndarray, sets: list[np.ndarray], titles: list[str]) -> Image:
    """One row per condition: its validation image, then the image of each set."""
    chosen = evenly_spaced(np.arange(len(val)), GRID_ROWS)
    rows = [np.stack([images[i] for images in (val, *sets)]) for i in chosen]
    return image_grid(np.concatenate(rows), 1 + len(sets), titles=[titles[i] for i in chosen])

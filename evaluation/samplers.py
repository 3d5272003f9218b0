"""evaluation.task=samplers: compare samplers and numbers of steps, all starting from the same noise."""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from config import Config, SamplingConfig
from dataset.conditions import val_conditions
from dataset.encodings import LatentDataset
from evaluation.reports import markdown_table, print_plan, weights_origin, write_report
from models.conditioning import Cond
from pipeline.generate import OutputSpec
from pipeline.latent_diffusion import LatentDiffusion
from pipeline.latent_stats import require_finite
from pipeline.stage_files import encodings_path
from sampling import num_evaluations
from utils.device import num_params, pick_device, pick_precision
from utils.errors import UserError
from utils.files import write_atomically

ODE_SOLVERS = ("ddim", "euler", "heun", "dpmpp_2m", "unipc")  # deterministic solvers of the probability-flow ODE
REFERENCE = "heun"  # solver whose result with the most steps counts as the exact ODE solution
NUM_PROJECTIONS, NUM_QUANTILES = 512, 256  # in sliced_wasserstein()
MAX_DISTANCE_RATIO = 1.05  # largest distance of a recommended sampler, relative to the distance of the best sampler
STD_RANGE = (0.97, 1.03)  # preferred std ratio of a recommended sampler


def run(config: Config, dry_run: bool) -> None:
    cfg, device = config.evaluation, pick_device(config.device)
    dtype = pick_precision(cfg.precision, device)
    model = LatentDiffusion.load(config, device, dtype)
    encodings = LatentDataset.load(encodings_path(config))
    timesteps, schedule = model.schedule.timesteps, model.schedule.name
    if max(cfg.steps) > timesteps:
        raise UserError(
            f"evaluation.steps must be at most {timesteps}, the number of timesteps of the model (got {max(cfg.steps)})"
        )
    for sampler in cfg.samplers:
        model.timesteps(config.sampling.model_copy(update={"sampler": sampler}))  # reports wrong settings before the start
    if cfg.num_images > len(encodings.mean):
        raise UserError(
            f"evaluation.num_images must be at most {len(encodings.mean):,}, the number of training latents to compare "
            f"with (got {cfg.num_images:,})"
        )
    name = f"{config.name}_{config.diffusion_name}_samplers"
    summary = (
        f"U-Net with {num_params(model.unet) / 1e6:.1f}M parameters at step {model.checkpoint.metadata['step']:,}; "
        f"{cfg.num_images:,} images from the same noise, {', '.join(cfg.samplers)} "
        f"with {', '.join(map(str, cfg.steps))} steps"
    )
    print_plan(config, summary, device, dtype, [f"{name}.md", f"{name}.png"])
    if dry_run:
        return

    val_z = model.normalizer.normalize(encodings.val_mean.to(device))
    cond = val_conditions(model.unet.conditioner, encodings, cfg.num_images, device)
    rows = compare_samplers(config, model, val_z, cond)
    baseline = train_baseline(model, encodings, val_z, cfg.num_images)
    cond_note = " Conditioned on the labels or captions of validation images." if cond else ""
    paragraphs = [
        f"# Samplers on {config.name}, {schedule} schedule",
        f"{summary}, in {str(dtype)[6:]}.{cond_note}",
        f"*RMS distance to the ODE solution*: distance to the result of {REFERENCE} with {max(cfg.steps)} steps, in units "
        f"of the latents' std. *std ratio*: std of generated latents divided by that of training latents. *distance*: "
        f"sliced Wasserstein distance to the {len(val_z):,} validation latents; for {cfg.num_images:,} training latents it "
        f"is {baseline:.4f}. *seconds*: time for all images.",
        markdown_table(HEADER, [row.cells() for row in sorted(rows, key=lambda row: row.steps)]),
        f"**{recommend(rows)}**",
    ]
    origin = weights_origin("U-Net", model.checkpoint.fingerprint, model.checkpoint.metadata)
    write_report(config, name, device, origin, "\n\n".join(paragraphs))
    title = f"{config.name}, {schedule} schedule, {cfg.num_images:,} images"
    save_plot(Path(config.results_dir) / f"{name}.png", rows, baseline, title)


HEADER = (
    "sampler",
    "steps",
    "spacing",
    "evaluations",
    "RMS distance to the ODE solution",
    "std ratio",
    "distance",
    "seconds",
)


@dataclass
class SamplerMetrics:
    """Metrics of one sampler with one number of steps: a row of the report."""

    sampler: str
    steps: int
    evaluations: int  # network evaluations per image
    ode_distance: float | None  # RMS distance to the ODE solution; None for samplers that add noise
    std_ratio: float  # std of generated latents / std of training latents
    distance: float  # sliced Wasserstein distance to validation latents
    seconds: float  # time to sample all images
    spacing: str = ""

    def cells(self) -> list[str]:
        ode_distance = "–" if self.ode_distance is None else f"{self.ode_distance:.3f}"
        numbers = [f"{self.std_ratio:.3f}", f"{self.distance:.4f}", f"{self.seconds:.1f}"]
        return [self.sampler, f"{self.steps}", self.spacing, f"{self.evaluations}", ode_distance, *numbers]


def compare_samplers(config: Config, model: LatentDiffusion, val_z: Tensor, cond: Cond) -> list[SamplerMetrics]:
    """Measure every sampler with every number of steps.

    REFERENCE runs first, because the results of all other ODE solvers are compared with its result.
    """
    cfg = config.evaluation
    spec = OutputSpec(cfg.num_images, keep_latents=True)

    def settings(sampler: str, steps: int) -> SamplingConfig:
        changes = dict(sampler=sampler, steps=steps, clean_finish_steps=0, batch_size=cfg.batch_size, cols=1, slerp_to=None)
        return config.sampling.model_copy(update=changes)

    def evaluations(run: SamplingConfig) -> int:
        return num_evaluations(run.sampler, len(model.timesteps(run)))

    reference = (REFERENCE, max(cfg.steps))
    pairs = [(sampler, steps) for steps in sorted(cfg.steps) for sampler in cfg.samplers]
    runs = [settings(*pair) for pair in (reference, *(pair for pair in pairs if pair != reference))]
    rows, ode_solution = [], None
    model.generate(settings("ddim", 1), spec, cond, show_progress=False)  # warm up before timing
    with tqdm(total=cfg.num_images * sum(map(evaluations, runs)), unit="eval", desc="samplers") as bar:
        for run in runs:
            started = time.monotonic()
            samples = model.generate(run, spec, cond, progress=bar)
            require_finite(samples.moments, run)
            seconds = time.monotonic() - started
            z = torch.stack([samples.latents[i] for i in range(cfg.num_images)])
            ode_solution = z if ode_solution is None else ode_solution
            is_ode_solver = run.sampler in ODE_SOLVERS and not (run.sampler == "ddim" and run.eta > 0)
            row = SamplerMetrics(
                run.sampler,
                run.steps,
                evaluations(run),
                ode_distance=float((z - ode_solution).square().mean().sqrt()) if is_ode_solver else None,
                std_ratio=samples.moments.overall_std() / model.normalizer.overall_std(),
                distance=sliced_wasserstein(z, val_z),
                seconds=seconds,
                spacing=model.spacing(run),
            )
            rows.append(row)
            tqdm.write(", ".join(f"{heading} {cell}" for heading, cell in zip(HEADER, row.cells())))
    return rows


def sliced_wasserstein(a: Tensor, b: Tensor) -> float:
    """Sliced 2-Wasserstein distance between latents (N, C, h, w) and (M, C, h, w) (Rabin et al. 2012).

    The latents are projected onto fixed random directions; the result is the RMS of the 1-D distances. Two finite samples
    of one distribution have a distance above 0, which train_baseline() estimates.
    """
    directions = torch.randn(a[0].numel(), NUM_PROJECTIONS, generator=torch.Generator().manual_seed(0))
    directions = directions / directions.norm(dim=0)
    levels = (np.arange(NUM_QUANTILES) + 0.5) / NUM_QUANTILES
    # np.quantile, because torch.quantile is limited to 16 million values
    quantiles = [np.quantile((x.float().cpu().flatten(1) @ directions).numpy(), levels, axis=0) for x in (a, b)]
    return float(np.sqrt(np.square(quantiles[0] - quantiles[1]).mean()))


def train_baseline(model: LatentDiffusion, encodings: LatentDataset, val_z: Tensor, n: int) -> float:
    """Sliced Wasserstein distance of n training latents to the validation latents, averaged over five random choices."""
    subsets = [torch.randperm(len(encodings.mean), generator=torch.Generator().manual_seed(i))[:n] for i in range(5)]
    latents = (model.normalizer.normalize(encodings.mean[rows].to(model.device)) for rows in subsets)
    return sum(sliced_wasserstein(z, val_z) for z in latents) / len(subsets)


def recommend(rows: list[SamplerMetrics]) -> str:
    """Recommend the cheapest sampler whose distance is at most MAX_DISTANCE_RATIO times that of the best one.

    Samplers with a std ratio in STD_RANGE are preferred. The best sampler is ancestral with the most steps or, if ancestral
    was not run, the one with the smallest distance.
    """
    ancestral = [row for row in rows if row.sampler == "ancestral"]
    best = max(ancestral, key=lambda row: row.evaluations) if ancestral else min(rows, key=lambda row: row.distance)
    best_name = f"{best.sampler} with {best.evaluations} evaluations"
    cheaper = [row for row in rows if row is not best and row.evaluations < best.evaluations]
    close = [row for row in cheaper if row.distance <= MAX_DISTANCE_RATIO * best.distance]
    if not close:
        message = f"recommendation: no cheaper sampler has a distance within {MAX_DISTANCE_RATIO - 1:.0%} of {best_name}"
        nearest = min(cheaper, key=lambda row: row.distance, default=None)
        return message + (f"; the closest is {describe(nearest, best)}" if nearest else "")
    right_std = [row for row in close if STD_RANGE[0] <= row.std_ratio <= STD_RANGE[1]]
    chosen = min(right_std or close, key=lambda row: (row.evaluations, row.distance))
    std_range = f"{STD_RANGE[0]} … {STD_RANGE[1]}"
    note = f" (no sampler this close has a std ratio in {std_range}; {best_name} has {best.std_ratio:.3f})"
    return f"recommendation: {describe(chosen, best)}{'' if right_std else note}"


def describe(row: SamplerMetrics, best: SamplerMetrics) -> str:
    difference = row.distance / best.distance - 1
    return (
        f"{row.sampler}, {row.steps} steps: distance {abs(difference):.1%} {'above' if difference > 0 else 'below'} that of "
        f"{best.sampler} with {best.evaluations} evaluations, in {row.seconds / max(best.seconds, 1e-9):.1%} of its time, "
        f"std ratio {row.std_ratio:.3f}"
    )


def save_plot(path: Path, rows: list[SamplerMetrics], baseline: float, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plots = {
        "RMS distance to the ODE solution": lambda row: row.ode_distance,
        "generated/training std": lambda row: row.std_ratio,
        "sliced Wasserstein distance to validation latents": lambda row: row.distance,
    }
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.2))
    for axis, (heading, value) in zip(axes, plots.items()):
        for sampler in dict.fromkeys(row.sampler for row in rows):
            # `and value(row)` also drops the distance 0 of REFERENCE, which a log axis cannot show.
            points = sorted((row.evaluations, value(row)) for row in rows if row.sampler == sampler and value(row))
            x, y = zip(*points) if points else ((), ())
            axis.plot(x, y, marker=".", label=sampler if points else None)
        axis.set(xscale="log", xlabel="network evaluations", title=heading)
    axes[1].axhspan(*STD_RANGE, alpha=0.15)
    axes[1].set_ylim(0.7, 1.3)  # fixed limits, because the std of heun with few steps is far outside them
    axes[2].axhline(baseline, linestyle=":", color="black", label="training latents")
    if any(row.ode_distance for row in rows):
        axes[0].set_yscale("log")
    axes[2].set_yscale("log")
    axes[2].legend()
    figure.suptitle(title)
    figure.tight_layout()
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=80))
    plt.close(figure)

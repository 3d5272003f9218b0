"""Which sampler, and how many steps? Every solver from the same noises, against the ODE's own solution and held-out latents."""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import conditions
from calibration import Moments
from config import Config
from lab.artifacts import write_atomically
from latent_cache import Encodings
from latent_diffusion import LatentDiffusion
from sampling import evaluations, image_generators, randn, sample

DETERMINISTIC = ("ddim", "euler", "heun", "dpmpp_2m", "unipc")  # these solve the probability-flow ODE
REFERENCE = "heun"  # at the most steps: second order, and it corrects every step
DIRECTIONS, QUANTILES = 512, 256  # of the sliced Wasserstein distance
# What counts as good enough: distance over that of the most ancestral steps, std ratio.
CLOSE, STD_RANGE = 1.05, (0.97, 1.03)


@dataclass
class Row:
    sampler: str
    steps: int  # asked for
    calls: int  # network evaluations per image
    to_ode: float | None  # RMS distance to the reference solution from the same noise; none for samplers that add noise
    std_ratio: float
    distance: float  # sliced Wasserstein distance to the held-out latents
    seconds: float  # for all images
    spacing: str = ""  # of its timesteps


def bench(config: Config, model: LatentDiffusion, encodings: Encodings) -> tuple[list[Row], float]:
    """A row per sampler and number of steps, and the distance that as many training latents have: what perfection scores."""
    e, s = config.evaluation, config.sampling
    held_out = model.normaliser.normalise(encodings.held_out.to(model.device))
    shown = conditions.of_held_out(model.unet.conditioner, encodings, e.images, model.device)
    noises = [(start, min(start + e.batch_size, e.images)) for start in range(0, e.images, e.batch_size)]

    def generate(sampler: str, steps: int, bar: tqdm) -> Tensor:
        z, its = [], s.model_copy(update={"sampler": sampler, "steps": steps, "clean_steps": 0})
        for start, stop in noises:
            generators = image_generators(s.seed, range(start, stop), "cpu")
            noise = randn((stop - start, *model.shape), generators, model.device)
            raw = None if shown is None else tuple(r[start:stop] for r in shown)
            z.append(
                sample(
                    model.denoiser(s, raw), noise, model.schedule, sampler, steps, **model.options(its),
                    x0_range=model.threshold(s.x0_clamp), generator=generators, callback=lambda _i, _t, z_t, _z0: bar.update(len(z_t)),
                )
            )  # fmt: skip
        return torch.cat(z)

    def calls(sampler: str, steps: int) -> int:
        return evaluations(sampler, len(model.steps_of(s.model_copy(update={"sampler": sampler, "steps": steps}))))

    def spacing(sampler: str) -> str:
        return model.spacing(s.model_copy(update={"sampler": sampler}))

    asked = [(name, steps) for steps in sorted(e.steps) for name in e.samplers]
    # The reference first: what all others are measured against.
    asked.sort(key=lambda pair: pair != (REFERENCE, max(e.steps)))
    if asked[0] != (REFERENCE, max(e.steps)):
        asked.insert(0, (REFERENCE, max(e.steps)))
    rows, reference = [], None
    generate("ddim", 1, tqdm(disable=True))  # what a device does only once is not the first row's
    with tqdm(total=e.images * sum(calls(*pair) for pair in asked), unit="eval", desc="samplers") as bar:
        for name, steps in asked:
            started = time.monotonic()
            z = generate(name, steps, bar)
            moments = Moments(len(z[0]))
            moments.add(z)  # reads z: the clock stops with the work done
            seconds = time.monotonic() - started
            reference = z if reference is None else reference
            to_ode = (
                float((z - reference).square().mean().sqrt())
                if name in DETERMINISTIC and not (name == "ddim" and s.eta > 0)
                else None
            )
            std_ratio = moments.overall_std() / model.normaliser.overall_std()
            rows.append(
                Row(
                    name,
                    steps,
                    calls(name, steps),
                    to_ode,
                    std_ratio,
                    sliced_wasserstein(z, held_out),
                    seconds,
                    spacing(name),
                )
            )
            tqdm.write(line_of(rows[-1]))
    return rows, floor(encodings, model, held_out, e.images)


def sliced_wasserstein(a: Tensor, b: Tensor) -> float:
    """Distance between two sets of latents (N, C, h, w) and (M, C, h, w): the 2-Wasserstein distance of their projections on
    fixed random directions, root mean square over these (Rabin et al. 2012). Of few latents it is never 0: see `floor`."""
    directions = torch.randn(a[0].numel(), DIRECTIONS, generator=torch.Generator().manual_seed(0))
    directions = directions / directions.norm(dim=0)
    shares = (np.arange(QUANTILES) + 0.5) / QUANTILES
    # numpy's, as torch.quantile refuses more than 16 million values
    quantiles = [np.quantile((x.float().cpu().flatten(1) @ directions).numpy(), shares, axis=0) for x in (a, b)]
    return float(np.sqrt(np.square(quantiles[0] - quantiles[1]).mean()))


def floor(encodings: Encodings, model: LatentDiffusion, held_out: Tensor, n: int) -> float:
    """The same distance for n training latents, the mean of five draws."""
    picks = [torch.randperm(len(encodings.mean), generator=torch.Generator().manual_seed(i))[:n] for i in range(5)]
    latents = (model.normaliser.normalise(encodings.mean[rows].to(model.device)) for rows in picks)
    return sum(sliced_wasserstein(z, held_out) for z in latents) / len(picks)


def advice(rows: list[Row]) -> str:
    """One line: the cheapest that is as good as the most ancestral steps."""
    ancestral = [r for r in rows if r.sampler == "ancestral"]
    best = max(ancestral, key=lambda r: r.calls) if ancestral else min(rows, key=lambda r: r.distance)
    named = f"{best.sampler} with {best.calls} evaluations"
    close = [r for r in rows if r is not best and r.distance <= CLOSE * best.distance and r.calls < best.calls]
    calibrated = [r for r in close if STD_RANGE[0] <= r.std_ratio <= STD_RANGE[1]]
    if not close:
        nearest = min((r for r in rows if r.calls < best.calls), key=lambda r: r.distance, default=None)
        return f"advice: nothing cheaper comes within {CLOSE - 1:.0%} of {named}" + (
            f"; nearest is {say(nearest, best)}" if nearest else ""
        )
    chosen = min(calibrated or close, key=lambda r: (r.calls, r.distance))
    hint = "" if calibrated else f" (no std ratio lies in {STD_RANGE[0]} … {STD_RANGE[1]}: {named} has {best.std_ratio:.3f})"
    return f"advice: {say(chosen, best)}{hint}"


def say(row: Row, best: Row) -> str:
    more = row.distance / best.distance - 1
    return (
        f"{row.sampler}, {row.steps} steps: a distance {abs(more):.1%} {'above' if more > 0 else 'below'} that of {best.sampler} with "
        f"{best.calls} evaluations, in {row.seconds / max(best.seconds, 1e-9):.1%} of its time, std ratio {row.std_ratio:.3f}"
    )


HEADINGS = ("sampler", "steps", "by", "evaluations", "to the ODE", "std ratio", "distance", "seconds")


def cells_of(r: Row) -> list[str]:
    to_ode = "–" if r.to_ode is None else f"{r.to_ode:.3f}"
    return [
        r.sampler,
        f"{r.steps}",
        r.spacing,
        f"{r.calls}",
        to_ode,
        f"{r.std_ratio:.3f}",
        f"{r.distance:.4f}",
        f"{r.seconds:.1f}",
    ]


def line_of(r: Row) -> str:
    return ", ".join(f"{heading} {cell}" for heading, cell in zip(HEADINGS, cells_of(r)))


def save_plot(path: Path, rows: list[Row], lowest: float, title: str) -> None:
    """Distance to the ODE's solution, std ratio and distance to the held-out latents, over network evaluations."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 4.2))
    for name in dict.fromkeys(r.sampler for r in rows):
        mine = sorted((r for r in rows if r.sampler == name), key=lambda r: r.calls)
        for axis, values in zip(axes, ([r.to_ode for r in mine], [r.std_ratio for r in mine], [r.distance for r in mine])):
            shown = [
                (r.calls, v) for r, v in zip(mine, values) if v
            ]  # the reference's distance to itself is no point of a log plot
            axis.plot([c for c, _ in shown], [v for _, v in shown], marker=".", label=name if shown else None)
    axes[1].axhspan(*STD_RANGE, alpha=0.15)
    axes[2].axhline(lowest, linestyle=":", color="black", label="training latents")
    titles = (
        "RMS distance to the ODE's solution",
        "generated/training std",
        "sliced Wasserstein distance to held-out latents",
    )
    for axis, heading in zip(axes, titles):
        axis.set(xscale="log", xlabel="network evaluations", title=heading)
    if any(r.to_ode for r in rows):  # not where the reference alone was asked for
        axes[0].set_yscale("log")
    axes[1].set_ylim(0.7, 1.3)  # heun's first steps, far beyond, would hide everything else
    axes[2].set_yscale("log")
    axes[2].legend()
    figure.suptitle(title)
    figure.tight_layout()
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=80))
    plt.close(figure)

"""Stage 4: noise -> latents -> pixels.

Samples images with the settings of config.sampling, writes a grid to results/ with the settings inside the PNG, and
prints a calibration line: how the spread of the generated latents compares with the training latents'.
"""

import cli

if __name__ == "__main__":
    cli.answer_early(__doc__)

import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import parallel
from artifacts import require_space
from calibration import Moments, advice, calibration
from conditions import Requests, requested
from config import Config, Sampling, UserError
from data import to_uint8
from latent_diffusion import LatentDiffusion
from pictures import grid, save_gif, save_png
from sampling import evaluations, sample, timesteps
from starts import Given, noise_of
from training import hardware, parameters_of, pick_device, pick_precision

STRIP_IMAGES = 8


def infer(config: Config, dry_run: bool) -> None:
    s, device = config.sampling, pick_device(config.device)
    dtype = pick_precision(s.precision, device)
    model = LatentDiffusion(config, device, dtype)
    header, schedule = model.header, model.schedule
    given = Given.load(s, model) if s.image else None
    requests = requested(s, model.unet.conditioner, device)
    rows = len(requests) if requests.titles else s.rows  # a row of pictures for each request
    count = s.images or rows * s.cols
    name = f"{config.name}_{config.diffusion_name}_{s.sampler}_{rows}x{s.cols}{suffix(s)}"
    results = Path(config.results_dir)
    require_space(results, (rows * s.cols + (count if s.single_files else 0)) * 3 * model.image_size**2)
    strength = s.strength if given else 1.0
    try:
        walked = len(timesteps(schedule, s.steps, s.spacing, s.sigma_max, strength))
    except ValueError as error:
        raise UserError(f"sampling: {error}") from None

    print(
        f"U-Net: {parameters_of(model.unet) / 1e6:.2f}M parameters, step {header['step']:,}; {header['schedule']} schedule, {s.sampler}, "
        f"{walked} steps, x0_clamp {s.x0_clamp}, on {device} in {str(dtype)[6:]}\n"
        f"images: {count:,}\nfiles: {results / name}.png"
        + (f", {name}_strip.png and .gif" if s.strip else "")
        + (f", {name}/000000.png …" if s.single_files else "")
    )
    for line in requests.warnings:
        print(line)
    if dry_run:
        return

    started = time.monotonic()
    strip = ([row * s.cols for row in range(rows)] if requests.titles else list(range(STRIP_IMAGES))) if s.strip else []
    wanted = Wanted(count, rows * s.cols, [i for i in strip if i < count], results / name if s.single_files else None)
    drawn = Drawn.joined(parallel.gather(draw(model, s, requests, given, strength, wanted)))
    if drawn is None:
        return
    seconds = time.monotonic() - started
    if s.strip:
        pictures = [to_uint8(model.decode(torch.stack(drawn.frames[i]).to(device))) for i in wanted.strip]
        save_png(grid(np.concatenate(pictures), len(pictures[0]), titles=requests.titles), results / f"{name}_strip.png")
        cols = 1 if requests.titles else len(pictures)
        moving = [grid(np.stack(frame), cols, titles=requests.titles) for frame in zip(*pictures)]
        save_gif(moving, results / f"{name}_strip.gif")

    values = count * 3 * model.image_size**2
    figures = calibration(drawn.moments, model.normaliser, drawn.clamped / max(drawn.seen, 1), drawn.out_of_range / values)
    settings = {
        "Software": "nanoLDM",
        "command": cli.command,
        "commit": commit(),
        "hardware": hardware(device),
        "config": config.model_dump(),
        "asked": requests.titles,
        "model": {k: v for k, v in header.items() if k != "settings"},
        "calibration": figures,
        "seconds": round(seconds, 1),
    }
    path = results / f"{name}.png"
    save_png(grid(np.stack([drawn.pixels[i] for i in sorted(drawn.pixels)]), s.cols, titles=requests.titles), path, settings)
    print(
        f"calibration: generated/training std {figures['std_ratio']:.3f} overall, {figures['worst_channel_ratio']:.3f} in the worst channel "
        f"({figures['worst_channel']}); {figures['clamped']:.2%} of clean estimates clamped; {figures['out_of_range']:.2%} of pixels out of range"
    )
    # Variations of one picture, and guided ones, need not spread like all of them.
    for line in [] if given or s.guidance != 1 else advice(figures, s):
        print(line)
    print(f"done: {path}, {count:,} images in {seconds:.1f} s")


@dataclass
class Wanted:
    """What of the images is kept."""

    count: int  # images in all
    in_grid: int  # the first so many go into the grid
    strip: list[int]  # of these the clean estimates on the way
    folder: Path | None  # every image becomes a file here


@dataclass
class Drawn:
    """What came of some of the images, on the CPU."""

    moments: Moments
    clamped: int = 0  # values of clean estimates, of those seen
    seen: int = 0
    out_of_range: int = 0  # values of pixels
    pixels: dict[int, np.ndarray] = field(default_factory=dict)  # image -> (H, W, 3) uint8, for the grid
    frames: dict[int, list[Tensor]] = field(default_factory=dict)  # image -> its z0_hat (C, h, w), from noise to picture

    @classmethod
    def joined(cls, parts: "list[Drawn] | None") -> "Drawn | None":
        """Of all processes; None in those that are not to go on."""
        if parts is None:
            return None
        whole = parts[0]
        for part in parts[1:]:
            whole.moments.join(part.moments)
            whole.clamped, whole.seen = whole.clamped + part.clamped, whole.seen + part.seen
            whole.out_of_range += part.out_of_range
            whole.pixels |= part.pixels
            whole.frames |= part.frames
        return whole


def draw(
    model: LatentDiffusion, s: Sampling, requests: Requests, given: Given | None, strength: float, wanted: Wanted
) -> Drawn:
    """Sample and decode the batches of images that fall to this process."""
    drawn, threshold = Drawn(Moments(model.shape[0])), model.threshold(s.x0_clamp)
    options = model.options(s) | {"x0_range": threshold, "strength": strength}
    calls = evaluations(s.sampler, len(timesteps(model.schedule, s.steps, s.spacing, s.sigma_max, strength)))
    framed = set(np.linspace(0, calls - 1, s.strip).round().astype(int).tolist())  # evaluations shown in the strip
    starts = range(0, wanted.count, s.batch_size)[parallel.rank() :: parallel.size()]
    batches = [range(start, min(start + s.batch_size, wanted.count)) for start in starts]
    with tqdm(total=sum(map(len, batches)) * calls, unit="eval", desc="sampling") as bar:
        for indices in batches:

            def progress(evaluation: int, _t: int, z_t: Tensor, z0: Tensor, indices=indices) -> None:
                bar.update(len(z_t))
                if evaluation in framed:
                    for i in set(wanted.strip) & set(indices):
                        drawn.frames.setdefault(i, []).append(z0[i - indices[0]].cpu())

            noise, generators = noise_of(s, indices, model.shape, model.device)
            raw = requests.take([i // s.cols % len(requests) for i in indices]) if requests.raw else None
            if given:
                options |= {"start": given.latent.expand_as(noise), "mask": given.latent_mask}
            denoise = model.denoiser(s, raw)
            z = sample(
                denoise, noise, model.schedule, s.sampler, s.steps, **options, generator=generators, callback=progress
            )
            drawn.moments.add(z)
            images = model.decode(z)
            drawn.out_of_range += int((images.abs() > 1).sum())
            pixels = to_uint8(images)
            if given:
                pixels = given.keep(pixels)
            drawn.pixels |= {i: picture for i, picture in zip(indices, pixels) if i < wanted.in_grid}
            if wanted.folder:
                for i, picture in zip(indices, pixels):
                    save_png(grid(picture[None], 1), wanted.folder / f"{i:06d}.png")
    if threshold:
        drawn.clamped, drawn.seen = threshold.counts
    return drawn


def suffix(s: Sampling) -> str:
    """What sets this grid apart in its file name from the plain one of the same model."""
    start = f"_slerp{s.seed}to{s.slerp_to}" if s.slerp_to is not None else ""
    if s.image:
        start = f"_{'inpaint' if s.mask else 'from'}_{Path(s.image).stem}"
    return start + (f"_w{s.guidance:g}" if s.guidance != 1 else "")


def commit() -> str:
    """The commit of this checkout, or nothing where git does not answer."""
    try:
        asked = ["git", "rev-parse", "--short", "HEAD"]
        return subprocess.run(asked, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def main(argv: list[str] | None = None) -> int:
    return cli.run(infer, __doc__, argv)


if __name__ == "__main__":
    raise SystemExit(main())

"""Stage 4: noise -> latents -> pixels.

Samples images with the settings of config.sampling, writes a grid to results/ with the settings inside the PNG, and
prints a calibration line: how the spread of the generated latents compares with the training latents'.
"""

from lab import cli

if __name__ == "__main__":
    cli.answer_early(__doc__)

import json
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from calibration import advice
from conditions import requested
from config import Config, Sampling
from data import to_uint8
from drawing import Drawn, Wanted, draw
from lab import parallel
from lab.artifacts import require_space, set_aside
from lab.errors import UserError
from lab.pictures import grid, save_gif, save_png
from latent_diffusion import LatentDiffusion
from starts import Given
from training import hardware, parameters_of, pick_device, pick_precision

STRIP_IMAGES = 8


def infer(config: Config, dry_run: bool) -> None:
    s, device = config.sampling, pick_device(config.device)
    dtype = pick_precision(s.precision, device)
    model = LatentDiffusion(config, device, dtype)
    header = model.header
    given = Given.load(s, model) if s.image else None
    requests = requested(config, model.unet.conditioner, device)
    rows = len(requests) if requests.titles else s.rows  # a row of pictures for each request
    count = s.images or rows * s.cols
    if count > rows * s.cols and not s.single_files:
        raise UserError(
            f"sampling.images: {count} are more than the grid of {rows}x{s.cols} shows: use sampling.single_files=true, or a larger grid"
        )
    name = f"{config.name}_{config.diffusion_name}_{s.sampler}_{rows}x{s.cols}{suffix(s)}"
    results = Path(config.results_dir)
    require_space(results, (rows * s.cols + (count if s.single_files else 0)) * 3 * model.image_size**2)
    strength = (s.strength or (1.0 if s.mask else 0.6)) if given else 1.0
    walked = len(model.steps_of(s, strength))

    print(
        f"U-Net: {parameters_of(model.unet) / 1e6:.2f}M parameters, step {header['step']:,}; {header['schedule']} schedule, {s.sampler}, "
        f"{walked} steps by {model.spacing(s)}, x0_clamp {s.x0_clamp}, on {device} in {str(dtype)[6:]}\n"
        f"images: {count:,}\nfiles: {results / name}.png"
        + (f", {name}_strip.png and .gif" if s.strip else "")
        + (f", {name}/000000.png …" if s.single_files else "")
    )
    for line in requests.warnings:
        print(line)
    if dry_run:
        return

    if parallel.leads() and of_other_settings(results / f"{name}.png", config, model.spacing(s)):
        set_aside(results, name, (".png", "_strip.png", "_strip.gif", ""))
    parallel.wait()
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

    figures = drawn.calibration(model.normaliser, count * 3 * model.image_size**2)
    settings = {
        "Software": "nanoLDM",
        "command": cli.command,
        "commit": cli.commit(),
        "hardware": hardware(device),
        "config": config.model_dump(),
        "spacing": model.spacing(s),
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


def suffix(s: Sampling) -> str:
    """What sets this grid apart in its file name from the plain one of the same model."""
    start = f"_slerp{s.seed}to{s.slerp_to}" if s.slerp_to is not None else ""
    if s.image:
        start = f"_{'inpaint' if s.mask else 'from'}_{Path(s.image).stem}"
    clamp = s.x0_clamp if isinstance(s.x0_clamp, str) else f"{s.x0_clamp:g}"
    return start + (f"_w{s.guidance:g}" if s.guidance != 1 else "") + (f"_clamp{clamp}" if clamp != "range" else "")


def of_other_settings(path: Path, config: Config, spacing: str) -> bool:
    """Is there a grid of this name that was drawn with other settings of sampling, a seed or a caption, say? Or are there single
    files without one?"""
    now, alike = json.loads(config.sampling.model_dump_json()), {"batch_size": 0, "single_files": 0}
    try:
        with Image.open(path) as image:
            there = json.loads(image.text["config"])["sampling"]
            return there | alike != now | alike or image.text.get("spacing") != spacing
    except FileNotFoundError:
        return path.with_suffix("").exists()
    except (OSError, AttributeError, KeyError, ValueError):
        return True  # not a grid of ours


def main(argv: list[str] | None = None) -> int:
    return cli.run(infer, __doc__, argv)


if __name__ == "__main__":
    raise SystemExit(main())

"""Stage 4 of 4: noise -> latents -> images.

Sample images with the settings of config.sampling and write them as a grid to results/. The metadata of the PNG contain all
settings. Prints the std of the generated latents relative to the std of the training latents.
"""

from utils import cli

if __name__ == "__main__":
    cli.handle_help(__doc__)

import json
import math
import re
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from config import Config, SamplingConfig
from pipeline.generate import OutputSpec, Samples
from pipeline.init_latents import InitImage
from pipeline.latent_diffusion import LatentDiffusion
from pipeline.latent_stats import require_finite, std_warnings
from pipeline.prompts import Prompts, read_prompts
from utils import distributed
from utils.device import hardware_name, num_params, pick_device, pick_precision
from utils.errors import UserError
from utils.files import keep_old_version, require_space
from utils.images import image_grid, save_gif, save_png, to_uint8

MAX_NAME_BYTES = 48  # output file names contain the file name of sampling.image, cut to this length
TRAJECTORY_IMAGES = 8  # images in the trajectory strip if there are no prompts or labels


def infer(config: Config, dry_run: bool) -> None:
    cfg, device = config.sampling, pick_device(config.device)
    dtype = pick_precision(cfg.precision, device)
    model = LatentDiffusion.load(config, device, dtype)
    init = InitImage.load(config, model.image_shape, model.vae.downsampling)
    prompts = read_prompts(config, model.unet.conditioner, device)
    rows = len(prompts.titles) or cfg.rows
    num_images, results = cfg.num_images or rows * cfg.cols, Path(config.results_dir)
    if num_images > rows * cfg.cols and not cfg.save_images:
        raise UserError(
            f"sampling.num_images must be at most {rows * cfg.cols} to fit in the {rows}x{cfg.cols} grid (got {num_images}); "
            f"use sampling.save_images=true, or a larger grid"
        )
    name = f"{config.name}_{config.diffusion_name}_{cfg.sampler}_{rows}x{cfg.cols}{name_suffix(cfg)}"
    require_space(results, (rows * cfg.cols + (num_images if cfg.save_images else 0)) * math.prod(model.image_shape))
    steps = len(model.timesteps(cfg, init.strength if init else 1.0))
    print_plan(cfg, model, results / name, f"{steps} steps", num_images)
    for line in prompts.warnings:
        print(line)
    if dry_run:
        return

    path = results / f"{name}.png"
    if distributed.is_main() and is_of_another_run(path, config, model):
        keep_old_version(results, name, (".png", "_strip.png", "_strip.gif", ""))
    if cfg.save_images:
        distributed.require_shared(results)
    distributed.barrier()
    started = time.monotonic()
    trajectory = [row * cfg.cols for row in range(rows)] if prompts.titles else list(range(TRAJECTORY_IMAGES))
    spec = OutputSpec(
        num_images,
        keep_pixels=rows * cfg.cols,
        trajectory=[i for i in trajectory if i < num_images] if cfg.trajectory_frames else [],
        save_dir=results / name if cfg.save_images else None,
        distributed=True,
    )
    parts = distributed.gather_objects(model.generate(cfg, spec, prompts.cond, init))
    if parts is None:  # not rank 0
        return
    samples, seconds = Samples.merge(parts), time.monotonic() - started
    require_finite(samples.moments, cfg)
    if spec.trajectory:
        save_trajectory(model, samples, prompts, results / name)
    stats = samples.stats(model.normalizer)
    grid = image_grid(samples.pixel_array(), cfg.cols, titles=prompts.titles)
    save_png(grid, path, png_metadata(config, model, prompts, stats, seconds))
    print(
        f"latents: the std of generated latents is {stats['std_ratio']:.3f} times that of training latents "
        f"(1 is ideal, 0.9 to 1.1 is good); worst channel {stats['worst_channel']}: {stats['worst_channel_ratio']:.3f}"
    )
    print(
        f"clamped: {stats['clamped']:.2%} of latent values in clean estimates (sampling.x0_clamp); "
        f"{stats['out_of_range']:.2%} of pixel values, which were outside [-1, 1]"
    )
    # Guided samples and variations of sampling.image may have another std than the training set, so they cause no warning.
    for line in std_warnings(stats, cfg) if init is None and cfg.guidance == 1 else []:
        print(line)
    print(f"done: {num_images:,} images in {seconds:.1f} s, grid in {path}")


def print_plan(cfg: SamplingConfig, model: LatentDiffusion, path: Path, steps: str, num_images: int) -> None:
    metadata = model.checkpoint.metadata
    print("stage 4 of 4: sample images")
    print(
        f"U-Net: {num_params(model.unet) / 1e6:.2f}M parameters, step {metadata['step']:,}, on {model.device} "
        f"in {str(model.dtype)[6:]}"
    )
    print(
        f"sampler: {cfg.sampler}, {steps}, spacing {model.spacing(cfg)}, {model.schedule.name} schedule, x0_clamp {cfg.x0_clamp}"
    )
    print(f"images: {num_images:,}")
    strip = f", {path.name}_strip.png, {path.name}_strip.gif" if cfg.trajectory_frames else ""
    print(f"files: {path}.png{strip}" + (f", {path.name}/000000.png …" if cfg.save_images else ""))


def save_trajectory(model: LatentDiffusion, samples: Samples, prompts: Prompts, path: Path) -> None:
    """Decode the clean estimates recorded during sampling. Save a strip with one row per image, and a GIF."""
    rows = [to_uint8(model.decode(torch.stack(samples.trajectory[i]).to(model.device))) for i in sorted(samples.trajectory)]
    strip = image_grid(np.concatenate(rows), len(rows[0]), titles=prompts.titles)
    save_png(strip, path.with_name(f"{path.name}_strip.png"))
    cols = 1 if prompts.titles else len(rows)
    frames = [image_grid(np.stack(frame), cols, titles=prompts.titles) for frame in zip(*rows)]
    save_gif(frames, path.with_name(f"{path.name}_strip.gif"))


def png_metadata(config: Config, model: LatentDiffusion, prompts: Prompts, stats: dict, seconds: float) -> dict:
    metadata = {key: value for key, value in model.checkpoint.metadata.items() if key != "settings"}
    return {
        "Software": "nanoLDM",
        "command": cli.command,
        "commit": cli.commit(),
        "hardware": hardware_name(model.device),
        "config": config.model_dump(),
        "spacing": model.spacing(config.sampling),
        "prompts": prompts.titles,
        "model": metadata,
        "unet_fingerprint": model.checkpoint.fingerprint,
        "latent_stats": stats,
        "seconds": round(seconds, 1),
    }


def name_suffix(cfg: SamplingConfig) -> str:
    """File name suffix for slerp, initial image, guidance and clamping; settings with their default value are left out."""
    start = f"_slerp{cfg.seed}to{cfg.slerp_to}" if cfg.slerp_to is not None else ""
    if cfg.image:
        start = f"_{'inpaint' if cfg.mask else 'from'}_{short_name(Path(cfg.image).stem)}"
    clamp = cfg.x0_clamp if isinstance(cfg.x0_clamp, str) else f"{cfg.x0_clamp:g}"
    guidance = f"_w{cfg.guidance:g}" if cfg.guidance != 1 else ""
    return start + guidance + (f"_clamp{clamp}" if clamp != "range" else "")


def short_name(name: str) -> str:
    """Replace all characters except letters, digits, "_", "." and "-" by "_". Cut to MAX_NAME_BYTES bytes of UTF-8."""
    return re.sub(r"[^\w.-]+", "_", name).encode()[:MAX_NAME_BYTES].decode(errors="ignore")


def is_of_another_run(path: Path, config: Config, model: LatentDiffusion) -> bool:
    """Return whether there are output files of this name from another U-Net or other settings (e.g. another seed)."""
    ignored_keys = {"batch_size": 0, "save_images": 0}  # they do not change the images
    settings = json.loads(json.dumps(config.sampling.model_dump())) | ignored_keys
    try:
        with Image.open(path) as image:
            old_settings = json.loads(image.text["config"])["sampling"] | ignored_keys
            old_model = image.text["unet_fingerprint"], image.text["spacing"]
            return old_settings != settings or old_model != (model.checkpoint.fingerprint, model.spacing(config.sampling))
    except FileNotFoundError:
        return path.with_suffix("").exists()  # there is no grid, but maybe a folder of single images
    except Exception:  # a damaged PNG or one without our metadata can raise many error types
        return True  # unknown origin: do not overwrite the file


def main(argv: list[str] | None = None) -> int:
    return cli.run(infer, __doc__, argv)


if __name__ == "__main__":
    raise SystemExit(main())

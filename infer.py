"""Stage 4: noise -> latents -> pixels.

Samples images with the settings of config.sampling, writes a grid to results/ with the settings inside the PNG, and
prints a calibration line: how the spread of the generated latents compares with the training latents'.
"""

import cli

if __name__ == "__main__":
    cli.answer_early(__doc__)

import platform
import subprocess
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from artifacts import build, fingerprint, load_weights, require_space
from calibration import Moments, advice, calibration
from config import Config, UserError
from data import Encodings, to_uint8
from models.latents import Normaliser
from models.schedules import make_schedule
from models.unet import UNet
from models.vae import VAE
from pictures import grid, save_gif, save_png
from sampling import Threshold, evaluations, image_generators, make_denoiser, randn, sample, timesteps
from training import autocast, parameters_of, pick_device, pick_precision

STRIP_IMAGES = 8


def infer(config: Config, dry_run: bool) -> None:
    s, device = config.sampling, pick_device(config.device)
    dtype = pick_precision(s.precision, device)
    vae_path = config.run_dir / "vae" / "vae.safetensors"
    unet_path = config.run_dir / config.diffusion_name / "unet.safetensors"
    vae_tensors, vae_header = load_weights(vae_path, "vae", "train_vae.py")
    unet_tensors, header = load_weights(unet_path, "unet", "train_diffusion.py")
    if header["vae_fingerprint"] != fingerprint(vae_tensors):
        raise UserError(
            f"{unet_path} was trained on encodings of another VAE ({header['vae_fingerprint']}) than {vae_path} holds "
            f"({fingerprint(vae_tensors)}): run create_encodings.py and train_diffusion.py"
        )
    if not header["complete"]:
        print(
            f"note: {unet_path} stopped at step {header['step']:,} of {header['steps']:,}; train_diffusion.py goes on from there"
        )
    check_encodings(config, unet_path, header)
    try:
        normaliser = Normaliser.from_state_dict(unet_tensors, "normaliser.")
        schedule = make_schedule(header["schedule"], header["timesteps"])
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{unet_path} is not as this version writes it ({error!r}): train it again") from None
    net_tensors = {name: value for name, value in unet_tensors.items() if not name.startswith("normaliser.")}
    vae = build(VAE, vae_tensors, vae_header, vae_path).to(device, memory_format=torch.channels_last).eval()
    unet = build(UNet, net_tensors, header, unet_path).to(device, memory_format=torch.channels_last).eval()
    count = s.images or s.rows * s.cols
    name = f"{config.name}_{config.diffusion_name}_{s.sampler}_{s.rows}x{s.cols}"
    results = Path(config.results_dir)
    image_bytes = 3 * vae_header["image_size"] ** 2
    require_space(results, (s.rows * s.cols + (count if s.single_files else 0)) * image_bytes)
    try:
        walked = len(timesteps(schedule, s.steps, s.spacing, s.sigma_max))
    except ValueError as error:
        raise UserError(f"sampling: {error}") from None

    print(
        f"U-Net: {parameters_of(unet) / 1e6:.2f}M parameters, step {header['step']:,}; {header['schedule']} schedule, {s.sampler}, "
        f"{walked} steps, x0_clamp {s.x0_clamp}, on {device} in {str(dtype)[6:]}\n"
        f"images: {count:,}\nfiles: {results / name}.png"
        + (f", {name}_strip.png and .gif" if s.strip else "")
        + (f", {name}/000000.png …" if s.single_files else "")
    )
    if dry_run:
        return

    normaliser = normaliser.to(device)
    if s.x0_clamp == "none":
        threshold = None
    else:
        threshold = Threshold(*(normaliser.range() if s.x0_clamp == "range" else (-s.x0_clamp, s.x0_clamp)))
    options = s.model_dump(include={"eta", "order", "variance", "spacing", "sigma_max", "clean_steps"}) | {
        "x0_range": threshold
    }
    denoise = make_denoiser(unet, schedule, header["prediction"], device, dtype)
    shape = (header["settings"]["channels"], header["settings"]["size"], header["settings"]["size"])
    moments, out_of_range, shown = Moments(shape[0]), 0, []
    started = time.monotonic()
    network_calls = evaluations(s.sampler, walked)
    framed = set(np.linspace(0, network_calls - 1, s.strip).round().astype(int).tolist())  # evaluations shown in the strip
    frames: list[Tensor] = []  # z0_hat of the first images, (STRIP_IMAGES, C, h, w) each
    with tqdm(total=count * network_calls, unit="eval", desc="sampling") as bar:

        def progress(i: int, _t: int, z_t: Tensor, z0: Tensor) -> None:
            bar.update(len(z_t))
            if i in framed and len(frames) < len(framed):  # of the first batch only
                frames.append(z0[:STRIP_IMAGES])

        for start in range(0, count, s.batch_size):
            indices = range(start, min(start + s.batch_size, count))
            generators = image_generators(s.seed, indices, "cpu")  # there a seed is the same noise for every device
            noise = randn((len(indices), *shape), generators, device)
            z = sample(denoise, noise, schedule, s.sampler, s.steps, **options, generator=generators, callback=progress)
            moments.add(z)
            with torch.no_grad(), autocast(device, dtype):
                images = vae.decode(normaliser.denormalise(z))
            out_of_range += int((images.abs() > 1).sum())
            pixels = to_uint8(images)
            if start < s.rows * s.cols:
                shown.append(pixels)
            if s.single_files:
                for i, picture in zip(indices, pixels):
                    save_png(grid(picture[None], 1), results / name / f"{i:06d}.png")
    seconds = time.monotonic() - started
    if frames:
        with torch.no_grad(), autocast(device, dtype):
            frames = [torch.from_numpy(to_uint8(vae.decode(normaliser.denormalise(z0)))) for z0 in frames]
        rows = torch.stack(frames, dim=1).flatten(0, 1).numpy()  # image by image, its frames from noise to picture
        save_png(grid(rows, len(frames)), results / f"{name}_strip.png")
        save_gif([grid(frame.numpy(), len(frame)) for frame in frames], results / f"{name}_strip.gif")

    figures = calibration(moments, normaliser, threshold, out_of_range / (count * image_bytes))
    settings = {
        "Software": "nanoLDM",
        "command": cli.command,
        "commit": commit(),
        "hardware": hardware(device),
        "config": config.model_dump(),
        "model": {k: v for k, v in header.items() if k != "settings"},
        "calibration": figures,
        "seconds": round(seconds, 1),
    }
    path = results / f"{name}.png"
    save_png(grid(np.concatenate(shown)[: s.rows * s.cols], s.cols), path, settings)
    print(
        f"calibration: generated/training std {figures['std_ratio']:.3f} overall, {figures['worst_channel_ratio']:.3f} in the worst channel "
        f"({figures['worst_channel']}); {figures['clamped']:.2%} of clean estimates clamped; {figures['out_of_range']:.2%} of pixels out of range"
    )
    for line in advice(figures, s):
        print(line)
    print(f"done: {path}, {count:,} images in {seconds:.1f} s")


def check_encodings(config: Config, unet_path: Path, header: dict) -> None:
    """Where the encodings lie beside the U-Net, they must be the ones it was trained on. Raises UserError."""
    path = config.run_dir / "encodings.pt"
    if path.exists() and Encodings.load(path).fingerprint != header["encodings_fingerprint"]:
        raise UserError(f"{unet_path} was trained on other encodings than {path} holds: run train_diffusion.py under a new diffusion.name, "
                        f"or create_encodings.py with the settings of then")  # fmt: skip


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {device.type}, {torch.get_num_threads()} threads"


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

"""Model card (README.md) of an exported model, made from its settings, reports and grids."""

import shutil
from pathlib import Path

from config import Config
from pipeline.latent_diffusion import LatentDiffusion
from utils import cli
from utils.device import num_params

HEADER = """---
library_name: diffusers
pipeline_tag: unconditional-image-generation
tags: [latent-diffusion, nanoLDM]
---
"""
PIPELINE = """    import torch
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained("FOLDER")
    image = pipe(num_inference_steps=50).images[0]
"""
COMPONENTS = """    import torch
    from diffusers import AutoencoderKL, {scheduler}, UNet2DModel

    vae = AutoencoderKL.from_pretrained("FOLDER", subfolder="vae")
    unet = UNet2DModel.from_pretrained("FOLDER", subfolder="unet")
    scheduler = {scheduler}.from_pretrained("FOLDER", subfolder="scheduler")
{labels}    z = torch.randn(1, {shape})
    scheduler.set_timesteps(50)
    with torch.no_grad():
        for t in scheduler.timesteps:
            z = scheduler.step(unet(z, t{argument}).sample, t, z).prev_sample
        image = vae.decode(z / vae.config.scaling_factor).sample  # in [-1, 1]
"""
LABELS = """    labels = torch.tensor([0])                      # {classes}; {null}: no label
"""


def model_card(config: Config, model: LatentDiffusion, folder: Path, scheduler: str, difference: float) -> str:
    """Text of the card. Copies a sample grid into the folder if results_dir has one for this model."""
    metadata, data = model.checkpoint.metadata, config.data
    channels, height, width = model.latent_shape
    sections = [
        f"{HEADER}\n# {config.name}, {config.diffusion_name}",
        f"Latent diffusion model trained with nanoLDM: a VAE ({num_params(model.vae) / 1e6:.1f}M parameters, images of "
        f"{'x'.join(map(str, model.image_shape))} to latents of {height}x{width}x{channels}) and a U-Net "
        f"({num_params(model.unet) / 1e6:.1f}M parameters).",
        "## Use\n\n" + usage(model, folder, scheduler),
        "## Training\n\n"
        f"- Data: `data.source={data.source}`, crop `{data.crop_name}`, {data.size_text} px, fingerprint "
        f"`{model.checkpoint.vae_metadata['data_fingerprint']}`\n"
        f"- VAE: {model.checkpoint.vae_metadata['step']:,} steps; U-Net: {metadata['step']:,} steps, EMA weights\n"
        f"- {metadata['schedule']} schedule, T = {metadata['timesteps']}, predicts {metadata['prediction']}",
        *sample_section(config, folder),
        *report_sections(config),
        "## Differences from nanoLDM\n\n"
        f"With DDIM, 50 steps and `sampling.x0_clamp=none`, this export gives the same latents (largest difference {difference:.1e}). "
        "Not part of the export: clamping of the clean estimate to the measured range of the latents, log-SNR spacing of the "
        "timesteps, and guidance. Samples can therefore be slightly worse than those of `infer.py`.",
        f"Exported by `{cli.command}`, commit {cli.commit() or 'unknown'}.",
    ]
    return "\n\n".join(sections) + "\n"


def usage(model: LatentDiffusion, folder: Path, scheduler: str) -> str:
    if (folder / "model_index.json").exists():
        return PIPELINE
    labels = argument = ""
    if model.unet.conditioner:
        classes = next(iter(model.unet.conditioner.names.values()))
        listed = ", ".join(f"{i} {name}" for i, name in enumerate(classes[:20])) + (", …" if len(classes) > 20 else "")
        labels, argument = LABELS.format(classes=listed, null=len(classes)), ", class_labels=labels"
    shape = ", ".join(map(str, model.latent_shape))
    return COMPONENTS.format(scheduler=scheduler, labels=labels, argument=argument, shape=shape)


def sample_section(config: Config, folder: Path) -> list[str]:
    grids = sorted(Path(config.results_dir).glob(f"{config.name}_{config.diffusion_name}_*x*.png"))
    grids = [grid for grid in grids if not grid.stem.endswith("_strip")]
    if not grids:
        return []
    shutil.copyfile(grids[0], folder / "samples.png")
    return [f"## Samples\n\n![{grids[0].stem}](samples.png)\n\nBy `infer.py`, with the settings stored in the PNG."]


def report_sections(config: Config) -> list[str]:
    """The evaluation reports of this model, with their headings one level lower."""
    names = (f"{config.name}_{config.diffusion_name}_*_generation.md", f"{config.name}_reconstruction.md")
    files = [file for name in names for file in sorted(Path(config.results_dir).glob(name))]
    return ["#" + file.read_text(encoding="utf-8", errors="replace").strip() for file in files]

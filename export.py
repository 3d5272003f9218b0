"""Export a trained model to a folder that diffusers loads without this project.

Writes runs/<name>/<diffusion.name>/diffusers/ with the VAE, the U-Net, a scheduler and a model card. An unconditional model
of square images becomes an LDMPipeline. Other models become components without a pipeline, because LDMPipeline takes no
labels and makes only square images. The export is loaded again and must reproduce the samples of infer.py. Needs the
package diffusers.
"""

from utils import cli

if __name__ == "__main__":
    cli.handle_help(__doc__)

import importlib.util
import shutil
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from config import Config
from models.normalizer import Normalizer
from models.schedules import Schedule
from pipeline.latent_diffusion import LatentDiffusion
from pipeline.model_card import model_card
from sampling import image_generators, make_denoiser, randn, sample, timesteps
from utils.device import pick_precision
from utils.diffusers_format import to_diffusers, unet_config, unet_modules, vae_config, vae_modules
from utils.errors import UserError
from utils.files import require_space

PREDICTION_TYPES = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
CHECK_STEPS, CHECK_IMAGES = 50, 2  # sampling steps and images in check()
# Largest allowed difference between the outputs of the exported and the original model: latents (std 1) after CHECK_STEPS
# steps, and pixels in [-1, 1].
TOLERANCE = 1e-3


def export(config: Config, dry_run: bool) -> None:
    if importlib.util.find_spec("diffusers") is None:
        raise UserError("export.py needs the package diffusers: pip install diffusers")
    device = torch.device("cpu")
    pick_precision("float32", device)
    model = LatentDiffusion.load(config, device, torch.float32)
    folder = model.checkpoint.path.parent / "diffusers"
    try:
        unet_args = unet_config(model.unet.settings)
        vae_args, vae_state = vae_with_normalizer(model)
        scheduler_name, scheduler_args = scheduler_config(model.schedule, model.prediction, config.sampling.sigma_max)
    except ValueError as error:
        raise UserError(f"{model.checkpoint.path} cannot be exported: {error}") from None
    is_pipeline = not model.unet.conditioner and model.image_shape[0] == model.image_shape[1]
    vae_name = "vqvae" if is_pipeline else "vae"  # LDMPipeline calls every autoencoder vqvae
    num_bytes = 4 * sum(p.numel() for net in (model.vae, model.unet) for p in net.parameters())
    require_space(folder, 2 * num_bytes)
    print(f"export: {model.checkpoint.path}, step {model.checkpoint.metadata['step']:,}, scheduler {scheduler_name}")
    if not is_pipeline:
        print("note: LDMPipeline takes no labels and makes only square images: exporting components without a pipeline")
    print(f"files: {folder}/{vae_name}/, unet/, scheduler/, README.md ({num_bytes / 1e6:,.0f} MB)")
    if dry_run:
        return

    import diffusers

    diffusers.logging.set_verbosity_error()  # LDMPipeline works with AutoencoderKL, but logs that it expected a VQModel
    unet, vae = diffusers.UNet2DModel(**unet_args), diffusers.AutoencoderKL(**vae_args)
    unet.load_state_dict(to_diffusers(model.unet.state_dict(), unet_modules(model.unet.settings)))
    vae.load_state_dict(vae_state)
    scheduler = getattr(diffusers, scheduler_name)(**scheduler_args)
    temporary = folder.with_name(".diffusers.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        if is_pipeline:
            diffusers.LDMPipeline(vae, unet, scheduler).save_pretrained(temporary)
        else:
            for name, part in ((vae_name, vae), ("unet", unet), ("scheduler", scheduler)):
                part.save_pretrained(temporary / name)
        difference = check(model, temporary, vae_name, scheduler_name, config.sampling.sigma_max)
        (temporary / "README.md").write_text(
            model_card(config, model, temporary, scheduler_name, difference), encoding="utf-8"
        )
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"check: after {CHECK_STEPS} DDIM steps, the export's latents differ from the model's by at most {difference:.1e}")
    print(f"done: {folder}")


def vae_with_normalizer(model: LatentDiffusion) -> tuple[dict, dict[str, Tensor]]:
    """Return the arguments and the state dict of an AutoencoderKL that includes the latent normalization.

    A global scale becomes scaling_factor. Per-channel normalization is folded into the quant convolutions, because
    scaling_factor is the only normalization that LDMPipeline applies.
    """
    n, settings, state, size = model.normalizer, dict(model.vae.settings), model.vae.state_dict(), model.image_shape[:2]
    if bool((n.shift == 0).all()) and bool((n.scale == n.scale[0]).all()):
        return vae_config(settings, size, float(n.scale[0])), to_diffusers(state, vae_modules(settings))
    if not settings["quant_conv"]:
        state |= identity_quant_convs(model.vae.latent_channels)
    settings["quant_conv"] = True
    return vae_config(settings, size), to_diffusers(fold_normalizer(state, n), vae_modules(settings))


def identity_quant_convs(channels: int) -> dict[str, Tensor]:
    return {
        "quant_conv.weight": torch.eye(2 * channels)[:, :, None, None],
        "quant_conv.bias": torch.zeros(2 * channels),
        "post_quant_conv.weight": torch.eye(channels)[:, :, None, None],
        "post_quant_conv.bias": torch.zeros(channels),
    }


def fold_normalizer(state: dict[str, Tensor], n: Normalizer) -> dict[str, Tensor]:
    """Fold the normalization z = (latent - shift) · scale into quant_conv, and its inverse into post_quant_conv.

    In the encoder, mean becomes (mean - shift) · scale, and logvar becomes logvar + 2 · log(scale).
    """
    gain = torch.cat([n.scale, torch.ones_like(n.scale)])
    offset = torch.cat([-n.shift * n.scale, 2 * n.scale.log()])
    post = state["post_quant_conv.weight"]
    return state | {
        "quant_conv.weight": state["quant_conv.weight"] * gain[:, None, None, None],
        "quant_conv.bias": state["quant_conv.bias"] * gain + offset,
        "post_quant_conv.weight": post / n.scale[None, :, None, None],
        "post_quant_conv.bias": state["post_quant_conv.bias"] + post[:, :, 0, 0] @ n.shift,
    }


def scheduler_config(schedule: Schedule, prediction: str, sigma_max: float | None) -> tuple[str, dict]:
    """Return class and arguments of the diffusers scheduler that takes the same 50 steps as `ddim` with trailing spacing.

    DDIMScheduler takes these steps only if sampling starts at timestep T-1 and 50 divides T. For all other cases,
    DPM-Solver of order 1 is used. It is equivalent to DDIM with eta = 0. It may round a timestep to the other neighbor.

    Raises ValueError if diffusers has no such scheduler.
    """
    if prediction not in PREDICTION_TYPES:
        raise ValueError(f"diffusion.prediction={prediction} has no counterpart in diffusers' DDIM")
    if schedule.name == "flow":
        raise ValueError("diffusion.schedule=flow has no counterpart in LDMPipeline")
    # Remove the timesteps with sigma/alpha > sigma_max, because diffusers' schedulers always start at the last timestep.
    usable = timesteps(schedule, schedule.timesteps, "trailing", sigma_max)[0] + 1
    steps = min(CHECK_STEPS, usable)
    if len(np.arange(usable, 0, -usable / steps)) != steps:  # computed as in diffusers, with its rounding errors
        raise ValueError(
            f"with {usable} usable timesteps, diffusers' schedulers take {steps + 1} instead of {steps} steps because of "
            f"rounding errors: choose another sampling.sigma_max, which changes the number of usable timesteps"
        )
    alphas_cumprod = torch.cat([torch.ones(1, dtype=torch.float64), schedule.alphas_cumprod[:usable]])
    common = dict(
        num_train_timesteps=usable,
        trained_betas=(1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).tolist(),
        prediction_type=PREDICTION_TYPES[prediction],
        timestep_spacing="trailing",
        steps_offset=0,
        rescale_betas_zero_snr=False,
        thresholding=False,
    )
    if usable == schedule.timesteps and usable % CHECK_STEPS == 0:
        return "DDIMScheduler", common | dict(clip_sample=False, set_alpha_to_one=True)
    return "DPMSolverMultistepScheduler", common | dict(
        solver_order=1, algorithm_type="dpmsolver++", final_sigmas_type="zero"
    )


@torch.no_grad()
def check(model: LatentDiffusion, folder: Path, vae_name: str, scheduler_name: str, sigma_max: float | None) -> float:
    """Load the export and compare its samples with those of `model`. Return the largest difference of latents.

    Raises UserError if a difference exceeds TOLERANCE. This detects wrong arguments that load without an error, such as
    norm_eps.
    """
    import diffusers

    vae = diffusers.AutoencoderKL.from_pretrained(folder, subfolder=vae_name)
    unet = diffusers.UNet2DModel.from_pretrained(folder, subfolder="unet")
    scheduler = getattr(diffusers, scheduler_name).from_pretrained(folder, subfolder="scheduler")
    cond = ()
    if model.unet.conditioner:
        num_rows = model.unet.conditioner.table.num_embeddings
        cond = (torch.tensor([[0], [num_rows - 1]]),)  # the first class and the null label
    noise = randn((CHECK_IMAGES, *model.latent_shape), image_generators(0, range(CHECK_IMAGES), "cpu"), "cpu")
    denoise = make_denoiser(lambda z, t: model.unet(z, t, cond), model.schedule, model.prediction, model.device)
    steps = min(CHECK_STEPS, scheduler.config.num_train_timesteps)
    expected = sample(denoise, noise, model.schedule, "ddim", steps, sigma_max=sigma_max)

    scheduler.set_timesteps(steps)
    z = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        prediction = unet(z, t, class_labels=cond[0][:, 0] if cond else None).sample
        z = scheduler.step(prediction, t, z).prev_sample
    difference = float((z - expected).abs().max()) / max(1.0, float(expected.std()))
    images = vae.decode(expected / vae.config.scaling_factor).sample
    image_difference = float((images - model.decode(expected)).abs().max())
    if not (difference < TOLERANCE and image_difference < TOLERANCE):
        raise UserError(
            f"the export does not reproduce this model: latents differ by {difference:.2g}, images by {image_difference:.2g}; "
            f"nothing was written"
        )
    return difference


def main(argv: list[str] | None = None) -> int:
    return cli.run(export, __doc__, argv)


if __name__ == "__main__":
    raise SystemExit(main())

"""Stage 3 of 4: latents -> U-Net.

Train a diffusion U-Net on the scaled latents of encodings.pt. Writes runs/<name>/<diffusion.name>/unet.safetensors (EMA
weights and the normalizer). Several U-Nets, for example one per noise schedule, can share one VAE and its encodings. Run the
same command again to resume.
"""

from utils import cli

if __name__ == "__main__":
    cli.handle_help(__doc__)

import torch
from PIL.Image import Image
from torch import Tensor

from config import Config, DiffusionConfig, SamplingConfig
from dataset import TRAIN, evenly_spaced
from dataset.conditions import Conditions, conditioning_settings, conditions_for_split, describe, val_conditions
from dataset.encodings import LatentDataset
from dataset.loader import BatchLoader, Shuffle
from models.conditioning import Cond
from models.schedules import Schedule, make_schedule, min_snr_weight, target
from models.unet import UNet
from pipeline.generate import OutputSpec
from pipeline.latent_diffusion import LatentDiffusion
from pipeline.stage_files import encodings_path, load_encodings, load_vae
from training.logger import import_tracker
from training.resume import require_same_run, run_identity
from training.trainer import Trainer
from utils import distributed
from utils.device import (
    STATE_BYTES_PER_PARAM,
    TRAIN_BYTES_PER_PARAM,
    autocast,
    compile_networks,
    num_params,
    pick_device,
    pick_precision,
    require_memory,
)
from utils.errors import UserError
from utils.files import require_space
from utils.images import image_grid
from utils.locks import lock_folder
from utils.pretrained import initialize, load_pretrained

EVAL_LATENTS = 256  # validation latents per evaluation; the loss of every timestep bin uses all of them
PREVIEW_STEPS = 20  # solver steps for the sample grids


def train(config: Config, dry_run: bool) -> None:
    import_tracker(config.logging)  # fails at once if the package is missing
    cfg, device = config.diffusion, pick_device(config.device)
    distributed.require_batch_size("diffusion.batch_size", cfg.batch_size)
    dtype, folder = pick_precision(config.precision, device), config.run_dir / config.diffusion_name
    vae, _ = load_vae(config, device)
    encodings = load_encodings(vae, config)
    if changes := encodings.differences(config):
        raise UserError(
            f"{encodings_path(config)} was made with other settings ({'; '.join(changes)}): run create_encodings.py again, "
            f"or restore the settings"
        )
    n, channels, *size = encodings.mean.shape
    schedule = make_schedule(cfg.schedule, cfg.timesteps)
    conditioning = conditioning_settings(config, encodings)
    torch.manual_seed(config.seed)
    unet = build_unet(cfg, channels, size, conditioning).to(device, memory_format=torch.channels_last)
    require_space(folder, STATE_BYTES_PER_PARAM * num_params(unet))
    require_memory(device, TRAIN_BYTES_PER_PARAM * num_params(unet))
    require_same_run(folder, run_identity(config, "diffusion"), cfg)
    print_plan(config, unet, encodings, f"on {device} in {str(dtype)[6:]}")
    if dry_run:
        return

    lock_folder(folder)
    normalizer = encodings.normalizer.to(device)
    # Rows 0 … n-1 are the training images. If data.flip is on, row n + i is the mirror image of row i, and an epoch contains
    # all 2n rows.
    loader = BatchLoader([x for x in (encodings.mean, encodings.mean_flipped) if x is not None], device)
    shuffle = Shuffle(sum(map(len, loader.parts)), config.seed)
    print(f"latents: {loader}")
    train_cond = None
    if conditioning:
        if conditioning["kind"] == "text":
            print(f"captions: {encodings.text.loader(device)}")
            unet.conditioner.null_tokens.copy_(encodings.text.null())
        train_cond = conditions_for_split(unet.conditioner, encodings, TRAIN, device)
    val_rows = evenly_spaced(torch.arange(len(encodings.val_mean)), EVAL_LATENTS)
    val_z = normalizer.normalize(encodings.val_mean[val_rows].to(device))
    val_cond = val_conditions(unet.conditioner, encodings, len(val_rows), device)
    unet.grad_checkpointing = cfg.grad_checkpointing
    compile_networks(config.compile, device, unet)

    with make_trainer(config, unet, encodings, train_cond, conditioning) as trainer:
        preview = LatentDiffusion(vae, trainer.ema.net, normalizer, schedule, cfg.prediction, dtype=dtype)
        for _ in trainer:
            # Every process generates the random numbers for the whole batch and uses those of its own shard.
            shard = trainer.shard
            rows, next_rows = (
                shuffle.indices(start, cfg.batch_size)
                for start in (trainer.images_seen, trainer.images_seen + cfg.batch_size)
            )
            cond = unet.conditioner.drop(train_cond.gather(rows % n), cfg.cfg_dropout) if train_cond else ()
            cond = tuple(c[shard] for c in cond)
            t = sample_timesteps(cfg, cfg.batch_size, device)[shard]
            eps = torch.randn(cfg.batch_size, channels, *size, device=device)[shard]
            latents = loader.batch(rows[shard], next_rows[shard])  # (B, C, h, w), unscaled

            def forward_backward(micro_batch: slice) -> None:
                z, t_part = normalizer.normalize(latents[micro_batch]), t[micro_batch]
                cond_part = tuple(c[micro_batch] for c in cond)
                with autocast(device, dtype):
                    loss = diffusion_loss(unet, z, eps[micro_batch], t_part, schedule, cfg.prediction, cond_part)  # (B,)
                weight = 1.0
                if cfg.weighting == "min_snr":
                    alpha, sigma = (c.flatten() for c in schedule.coefficients(t_part))
                    weight = min_snr_weight(cfg.prediction, alpha, sigma, cfg.min_snr_gamma)
                trainer.backward(weight * loss, loss, t_part, unweighted_loss=loss)

            trainer.step(forward_backward)
            if trainer.is_main and trainer.due(cfg.eval_every):
                losses = val_losses(trainer, val_z, val_cond, schedule, dtype)
                mean = sum(losses) / len(losses)
                # Compare this value with train/unweighted_loss: train/loss includes the loss weights.
                trainer.log({"val/unweighted_loss": mean} | {f"val/loss_bin{b}": x for b, x in enumerate(losses)})
                bins = " ".join(f"{loss:.3f}" for loss in losses)
                trainer.print(f"unweighted validation loss {mean:.4f}; by timestep, from low to high noise: {bins}")
                grid, stats = sample_preview(preview, cfg, trainer.micro_batch, val_cond)
                trainer.log({f"samples/{name}": stats[name] for name in ("std_ratio", "clamped")})
                trainer.log_image("samples", grid, f"samples/step_{trainer.steps_done:07d}.png")
            if trainer.is_main and cfg.snapshot_every and trainer.due(cfg.snapshot_every):
                trainer.save_snapshot()


def build_unet(cfg: DiffusionConfig, in_channels: int, size: list[int], conditioning: dict | None) -> UNet:
    """Build a U-Net: pretrained if diffusion.init_from is set, else with random weights."""
    try:
        if cfg.init_from is not None:
            return pretrained_unet(cfg, in_channels, size, conditioning)
        return UNet(
            in_channels=in_channels,
            size=size,
            channels=cfg.channels,
            num_res_blocks=cfg.num_res_blocks,
            attn_resolutions=cfg.attn_resolutions,
            head_channels=cfg.head_channels,
            dropout=cfg.dropout,
            conditioning=conditioning,
            cross_attn_resolutions=cfg.cross_attn_resolutions,
            bottleneck=cfg.bottleneck,
            bottleneck_blocks=cfg.bottleneck_blocks,
        )
    except ValueError as error:
        raise UserError(f"diffusion: {error}") from None


def pretrained_unet(cfg: DiffusionConfig, in_channels: int, size: list[int], conditioning: dict | None) -> UNet:
    """Load the U-Net of diffusion.init_from. Conditioner weights that do not fit this dataset are initialized randomly."""
    key, pretrained = "diffusion.init_from", load_pretrained("unet", cfg.init_from, "diffusion.init_from")
    settings, state, metadata = pretrained.settings, pretrained.state, pretrained.metadata
    for name in ("prediction", "schedule"):
        if metadata.get(name, getattr(cfg, name)) != getattr(cfg, name):
            raise UserError(
                f"diffusion.{name} must be {metadata[name]}, because {key}={cfg.init_from} was trained with it "
                f"(got {getattr(cfg, name)})"
            )
    unet = UNet(**settings | dict(conditioning=conditioning, dropout=cfg.dropout))
    expected, actual = [*unet.settings["size"], unet.settings["in_channels"]], [*size, in_channels]
    if expected != actual:
        raise UserError(
            f"{key}: {cfg.init_from} takes latents of {'x'.join(map(str, expected))}, "
            f"but the encodings contain latents of {'x'.join(map(str, actual))}"
        )
    new = unet.state_dict()
    state = {k: v for k, v in state.items() if not k.startswith("conditioner.") or (k in new and v.shape == new[k].shape)}
    reset = [k for k in new if k.startswith("conditioner.") and k not in state]
    if conditioning != settings["conditioning"]:
        print(
            f"note: {key}: {cfg.init_from} was trained with another condition; initialized randomly: "
            f"{', '.join(reset) or 'nothing'}"
        )
    initialize(unet, state | {k: new[k] for k in reset}, key)
    return unet


def print_plan(config: Config, unet: UNet, encodings: LatentDataset, hardware: str) -> None:
    cfg = config.diffusion
    n, channels, height, width = encodings.mean.shape
    mirrored = " and their mirror images" if encodings.mean_flipped is not None else ""
    condition = f", {describe(unet.conditioner)}" if unet.conditioner else ""
    limit = f", at most {cfg.max_minutes:g} minutes" if cfg.max_minutes else ""
    print("stage 3 of 4: train the U-Net")
    if cfg.init_from:
        print(f"initial weights: {cfg.init_from}")
    print(f"U-Net: {num_params(unet) / 1e6:.2f}M parameters, {height}x{width}x{channels} latents, {hardware}")
    print(f"latents: {n:,} for training{mirrored}, {len(encodings.val_mean):,} for validation")
    print(
        f"{cfg.schedule} schedule with T = {cfg.timesteps}, predicts {cfg.prediction}, loss weighting {cfg.weighting}{condition}"
    )
    print(f"steps: {cfg.steps:,} with {cfg.batch_size} latents each{limit}")
    folder = config.run_dir / config.diffusion_name
    print(f"files: {folder}/unet.safetensors, state.pt, metrics.jsonl, curves.png, samples/")
    attn_resolutions = unet.settings["attn_resolutions"]
    if attn_resolutions and not set(attn_resolutions) & set(unet.resolutions):
        print(
            f"note: diffusion.attn_resolutions={attn_resolutions} contains none of the U-Net's resolutions "
            f"({', '.join(map(str, unet.resolutions))}): only the bottleneck has self-attention"
        )


def make_trainer(
    config: Config, unet: UNet, encodings: LatentDataset, train_cond: Conditions | None, conditioning: dict | None
) -> Trainer:
    cfg = config.diffusion
    fingerprints = {"encodings_fingerprint": encodings.fingerprint}
    if train_cond:
        fingerprints |= {"conditions": train_cond.fingerprint, "conditioning": conditioning}
    metadata = dict(
        kind="unet",
        settings=unet.settings,
        schedule=cfg.schedule,
        timesteps=cfg.timesteps,
        prediction=cfg.prediction,
        ema_decay=cfg.ema_decay,
        cfg_dropout=cfg.cfg_dropout,
        vae_fingerprint=encodings.vae_fingerprint,
        encodings_fingerprint=encodings.fingerprint,
    )
    return Trainer(
        config.run_dir / config.diffusion_name,
        unet,
        cfg,
        identity=run_identity(config, "diffusion", **fingerprints),
        seed=config.seed,
        logging=config.logging,
        weights_name="unet.safetensors",
        metadata=metadata,
        extra=encodings.normalizer.state_dict("normalizer."),
    )


def sample_timesteps(cfg: DiffusionConfig, n: int, device: torch.device) -> Tensor:
    """Random training timesteps (n,) int64 in 0 … T-1."""
    if cfg.timestep_sampling == "logit_normal":
        return (torch.randn(n, device=device).sigmoid() * cfg.timesteps).long().clamp(max=cfg.timesteps - 1)
    return torch.randint(0, cfg.timesteps, (n,), device=device)


def diffusion_loss(
    unet: UNet, z: Tensor, eps: Tensor, t: Tensor, schedule: Schedule, prediction: str, cond: Cond = ()
) -> Tensor:
    """Unweighted mean squared error of the network's prediction, one value per latent (B,) (Ho et al. 2020, eq. 14)."""
    z_t = schedule.add_noise(z, eps, t).contiguous(memory_format=torch.channels_last)
    error = unet(z_t, t, cond) - target(prediction, z, eps, *schedule.coefficients(t))
    return error.square().mean(dim=(1, 2, 3))


@torch.no_grad()
def val_losses(trainer: Trainer, z: Tensor, cond: Cond, schedule: Schedule, dtype: torch.dtype) -> list[float]:
    """Unweighted validation loss of each timestep bin. Every call uses the same noise and timesteps."""
    unet, generator, losses = trainer.ema.net, torch.Generator().manual_seed(0), []
    for first, last in schedule.bins():
        t = torch.linspace(first, last, len(z)).round().long().to(z.device)
        eps = torch.randn(z.shape, generator=generator).to(z.device)
        parts = []
        for start in range(0, len(z), trainer.micro_batch):
            part = slice(start, start + trainer.micro_batch)
            part_cond = tuple(c[part] for c in cond)
            with autocast(z.device, dtype):
                parts.append(diffusion_loss(unet, z[part], eps[part], t[part], schedule, trainer.cfg.prediction, part_cond))
        losses.append(float(torch.cat(parts).mean()))
    return losses


def sample_preview(model: LatentDiffusion, cfg: DiffusionConfig, batch_size: int, cond: Cond) -> tuple[Image, dict]:
    """Sample from fixed noise with validation conditions and no guidance. Return an image grid and latent statistics."""
    steps = min(PREVIEW_STEPS, cfg.timesteps)
    settings = SamplingConfig(sampler="unipc", steps=steps, cols=1, batch_size=batch_size)
    spec = OutputSpec(cfg.sample_images, keep_pixels=cfg.sample_images)
    samples = model.generate(settings, spec, cond, show_progress=False)
    return image_grid(samples.pixel_array(), cols=max(1, round(cfg.sample_images**0.5))), samples.stats(model.normalizer)


def main(argv: list[str] | None = None) -> int:
    return cli.run(train, __doc__, argv)


if __name__ == "__main__":
    raise SystemExit(main())

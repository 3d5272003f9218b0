"""Stage 1 of 4: images -> VAE.

Train a VAE on the images of config.data with a reconstruction, perceptual and KL loss, and optionally an adversarial loss.
Writes runs/<name>/vae/vae.safetensors (EMA weights). Run the same command again to resume.
"""

from utils import cli

if __name__ == "__main__":
    cli.handle_help(__doc__)  # --help must not wait for the import of torch, which takes seconds

import math

import torch
from PIL.Image import Image
from torch import Tensor, nn

from config import Config
from dataset import TEST, TRAIN, VAL
from dataset.conditions import check_condition
from dataset.image_cache import DatasetIndex, Images, index_dataset
from dataset.loader import BatchLoader, Shuffle
from evaluation.reconstruction import MIN_VAL_IMAGES
from models.discriminator import PatchDiscriminator, adaptive_weight, discriminator_loss, generator_loss
from models.vae import VAE, reconstruction_error
from pipeline.stage_files import require_no_dependents
from training.logger import import_tracker
from training.resume import require_same_run, run_identity
from training.trainer import Trainer
from utils import distributed
from utils.checkpoints import load_perceptual
from utils.device import (
    STATE_BYTES_PER_PARAM,
    TRAIN_BYTES_PER_PARAM,
    autocast,
    compile_networks,
    copy_to,
    num_params,
    pick_device,
    pick_precision,
    require_memory,
)
from utils.errors import UserError
from utils.files import require_space
from utils.image_metrics import psnr_ssim
from utils.images import comparison_grid, to_float, to_uint8
from utils.locks import lock_folder
from utils.pretrained import initialize, load_pretrained

EVAL_IMAGES = 512  # validation images per evaluation
GRID_IMAGES = 32  # images in reconstructions.png


def train(config: Config, dry_run: bool) -> None:
    import_tracker(config.logging)  # fails at once if the package is missing
    cfg, device = config.vae, pick_device(config.device)
    distributed.require_batch_size("vae.batch_size", cfg.batch_size)
    dtype, folder = pick_precision(config.precision, device), config.run_dir / "vae"
    perceptual = load_perceptual(cfg.perceptual, device) if cfg.perceptual.weight > 0 else None
    index = index_dataset(config)
    captions = index.source.captions
    captions = None if captions is None else [captions[i] for i in index.rows(TRAIN)]
    check_condition(config, index.source.label_names, captions, f"data.source={config.data.source}")
    torch.manual_seed(config.seed)
    vae = build_vae(config).to(device, memory_format=torch.channels_last)
    require_space(folder, STATE_BYTES_PER_PARAM * num_params(vae))
    require_memory(device, TRAIN_BYTES_PER_PARAM * num_params(vae))
    if not require_same_run(folder, run_identity(config, "vae"), cfg) and not cfg.retrain:
        require_no_dependents(config)
    print_plan(config, vae, index, perceptual, f"on {device} in {str(dtype)[6:]}")
    if dry_run:
        return

    lock_folder(folder)
    images = index.load()
    loader = BatchLoader([torch.from_numpy(images.pixels)], device)
    train_rows = torch.from_numpy(images.rows(TRAIN))
    shuffle = Shuffle(len(train_rows), config.seed)
    print(f"pixels: {loader}")
    discriminator = None
    if cfg.adversarial.weight > 0:
        torch.manual_seed(config.seed + 1)
        discriminator = PatchDiscriminator(cfg.adversarial.width, in_channels=vae.in_channels)
        discriminator = discriminator.to(device, memory_format=torch.channels_last)
    vae.grad_checkpointing = cfg.grad_checkpointing
    latent_size = [side // vae.downsampling for side in config.data.size]
    perceptual_mask = evenly_spaced_mask(cfg.batch_size, cfg.perceptual_images)  # the same for any number of processes
    perceptual_scale = cfg.batch_size / cfg.perceptual_images  # so that the mean over the batch is unbiased
    compile_for_training(config.compile, device, vae, perceptual, discriminator)

    with make_trainer(config, vae, discriminator, images) as trainer:
        for step in trainer:
            # Every process generates the random numbers for the whole batch and uses those of its own shard.
            shard = trainer.shard
            rows, next_rows = (
                train_rows[shuffle.indices(start, cfg.batch_size)][shard]
                for start in (trainer.images_seen, trainer.images_seen + cfg.batch_size)
            )
            flip = (torch.rand(cfg.batch_size, 1, 1, 1, device=device) < (0.5 if config.data.flip else 0.0))[shard]
            noise = torch.randn(cfg.batch_size, vae.latent_channels, *latent_size, device=device)[shard]
            pixels = loader.batch(rows, next_rows)  # (B, H, W, C) uint8
            mask = perceptual_mask[shard]
            kl_weight = cfg.kl_weight * min(1.0, (step + 1) / max(1, cfg.kl_warmup))

            def forward_backward(micro_batch: slice) -> None:
                x = to_float(pixels[micro_batch])
                x = torch.where(flip[micro_batch], x.flip(3), x).contiguous(memory_format=torch.channels_last)
                with autocast(device, dtype):
                    y, posterior = vae(x, noise[micro_batch])
                    distance = perceptual_loss(perceptual, x, y, mask[micro_batch], perceptual_scale)
                error = reconstruction_error(cfg.reconstruction, x, y).mean(dim=(1, 2, 3))  # (B,)
                kl = posterior.kl().mean(dim=(1, 2, 3))  # (B,) nats per latent dimension
                loss = error + cfg.perceptual.weight * distance.float() + kl_weight * kl
                metrics = dict(reconstruction=error, perceptual=distance, nats_per_dim=kl)
                if discriminator is None or step < cfg.adversarial.start:
                    trainer.backward(loss, loss, **metrics)
                    return
                discriminator.requires_grad_(False)  # the VAE's backward pass must not leave gradients in the discriminator
                with autocast(device, dtype):
                    g_loss = generator_loss(discriminator(y))  # (B,)
                weight = cfg.adversarial.weight * adaptive_weight(loss.mean(), g_loss.mean(), vae.last_layer)
                metrics |= dict(g_loss=g_loss, adaptive_weight=weight.expand(len(x)))
                trainer.backward(loss + weight * g_loss, loss, **metrics)
                discriminator.requires_grad_(True)
                with autocast(device, dtype):
                    d_loss = discriminator_loss(discriminator(x), discriminator(y.detach()))  # (B,)
                trainer.backward_discriminator(d_loss, d_loss=d_loss)

            trainer.step(forward_backward)
            if trainer.is_main and trainer.due(cfg.eval_every):
                log_evaluation(trainer, loader, images, perceptual, dtype)
        if trainer.is_main and cfg.steps == 0:  # without training, evaluate the pretrained weights
            log_evaluation(trainer, loader, images, perceptual, dtype)


def evenly_spaced_mask(length: int, count: int) -> Tensor:
    """Boolean mask (length,) with `count` evenly spaced ones."""
    i = torch.arange(length + 1) * count // length
    return i[1:] > i[:-1]


def perceptual_loss(perceptual: nn.Module | None, x: Tensor, y: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Return `scale` times the perceptual distances of the images in `mask`, and 0 for the others: (B,)."""
    if perceptual is None or not mask.any():
        return x.new_zeros(len(x))
    if mask.all():
        return scale * perceptual(x, y)
    rows = copy_to(mask.nonzero().flatten(), x.device)
    distance = perceptual(*(z.index_select(0, rows).contiguous(memory_format=torch.channels_last) for z in (x, y)))
    return distance.new_zeros(len(x)).index_add(0, rows, scale * distance)


def build_vae(config: Config) -> VAE:
    """Build a VAE: pretrained if vae.init_from is set, else with random weights."""
    cfg, data = config.vae, config.data
    if cfg.init_from is not None:
        pretrained = load_pretrained("vae", cfg.init_from, "vae.init_from")
        vae = VAE(**pretrained.settings)
        initialize(vae, pretrained.state, "vae.init_from")
        if vae.in_channels != data.channels:
            raise UserError(
                f"data.channels must be {vae.in_channels}, the number of image channels of {cfg.init_from} "
                f"(got {data.channels})"
            )
        if any(side % vae.downsampling for side in data.size):
            raise UserError(
                f"data.image_size must be a multiple of {vae.downsampling}, the downsampling factor of {cfg.init_from} "
                f"(got {data.size_text})"
            )
        return vae
    return VAE(
        in_channels=data.channels,
        channels=cfg.channels,
        num_res_blocks=cfg.num_res_blocks,
        latent_channels=cfg.latent_channels,
        attention=cfg.attention,
        patch_size=cfg.patch_size,
        output_activation=cfg.output_activation,
    )


def print_plan(config: Config, vae: VAE, index: DatasetIndex, perceptual: nn.Module | None, hardware: str) -> None:
    cfg, (height, width), f = config.vae, config.data.size, vae.downsampling
    loss = cfg.reconstruction
    if perceptual:
        loss += f" + {cfg.perceptual.weight:g} {perceptual.title}"
        if cfg.perceptual_images < cfg.batch_size:
            loss += f" of {cfg.perceptual_images} images per batch"
    loss += f" + {cfg.kl_weight:g} KL (nats per latent dimension)"
    if cfg.adversarial.weight > 0:
        loss += f" + {cfg.adversarial.weight:g} adversarial from step {cfg.adversarial.start:,}"
    print("stage 1 of 4: train the VAE")
    if cfg.init_from:
        print(f"initial weights: {cfg.init_from}" + (", used without training" if cfg.steps == 0 else ""))
    print(
        f"VAE: {num_params(vae) / 1e6:.2f}M parameters, {height}x{width}x{vae.in_channels} -> "
        f"{height // f}x{width // f}x{vae.latent_channels}, {hardware}"
    )
    print("\n".join(index.describe()))
    if note := few_val_images(config, index):
        print(note)
    print(f"loss: {loss}")
    limit = f", at most {cfg.max_minutes:g} minutes" if cfg.max_minutes else ""
    print(f"steps: {cfg.steps:,} with {cfg.batch_size} images each{limit}")
    print(f"files: {config.run_dir}/vae/vae.safetensors, state.pt, metrics.jsonl, curves.png, reconstructions.png")


def few_val_images(config: Config, index: DatasetIndex) -> str:
    """Return a note if there are too few validation images for evaluate.py, else "".

    The note comes before training, because the split cannot change afterwards.
    """
    num_images, num_val = len(index.split), index.num_images(VAL)
    if config.diffusion.condition == "none":  # conditional models also need evaluation.task=condition, which uses only VAL
        num_val += index.num_images(TEST)
    if num_val >= MIN_VAL_IMAGES:
        return ""
    fraction = math.ceil(1000 * MIN_VAL_IMAGES / num_images) / 1000
    source_has_val_split = index.source.split is not None and (index.source.split == VAL).any()
    remedy = "add images" if source_has_val_split or fraction >= 0.5 else f"set data.val_fraction={fraction:g}"
    return f"note: evaluate.py needs at least {MIN_VAL_IMAGES} validation images (got {num_val}): {remedy} before training"


def compile_for_training(setting, device, vae: VAE, perceptual: nn.Module | None, discriminator: nn.Module | None) -> None:
    if discriminator is None:
        compile_networks(setting, device, vae, *([perceptual] if perceptual else []))
        return
    # adaptive_weight() computes two gradients at the decoder's last layer. Inside a compiled graph, the first one would run
    # the whole backward pass and free buffers that the second one needs. So the last two layers are not compiled.
    compile_networks(setting, device, *vae.encoder, *vae.decoder[:-2])


def make_trainer(config: Config, vae: VAE, discriminator: nn.Module | None, images: Images) -> Trainer:
    metadata = dict(
        kind="vae",
        settings=vae.settings,
        image_shape=(*config.data.size, config.data.channels),
        data_fingerprint=images.fingerprint,
    )
    return Trainer(
        config.run_dir / "vae",
        vae,
        config.vae,
        identity=run_identity(config, "vae", data_fingerprint=images.fingerprint),
        seed=config.seed,
        logging=config.logging,
        weights_name="vae.safetensors",
        metadata=metadata,
        discriminator=discriminator,
        discriminator_lr=config.vae.adversarial.lr,
        data_verified=images.verified,
    )


def log_evaluation(
    trainer: Trainer, loader: BatchLoader, images: Images, perceptual: nn.Module | None, dtype: torch.dtype
) -> None:
    metrics, grid = evaluate(trainer, loader, images, perceptual, dtype)
    trainer.log({f"val/{name}": value for name, value in metrics.items()})
    trainer.log_image("reconstructions", grid, "reconstructions.png")
    trainer.print("validation: " + "  ".join(f"{name} {value:.4g}" for name, value in metrics.items()))


@torch.no_grad()
def evaluate(
    trainer: Trainer, loader: BatchLoader, images: Images, perceptual: nn.Module | None, dtype: torch.dtype
) -> tuple[dict[str, float], Image]:
    """Reconstruct validation images from posterior means. Return metrics and a grid of originals and reconstructions."""
    vae, cfg, device = trainer.ema.net, trainer.cfg, loader.device
    rows = torch.from_numpy(images.rows(VAL, EVAL_IMAGES))
    totals: dict[str, float] = {}
    originals: list[Tensor] = []
    reconstructions: list[Tensor] = []
    for batch_rows in rows.split(trainer.micro_batch):
        x = to_float(loader.batch(batch_rows))
        with autocast(device, dtype):
            posterior = vae.encode(x)
            y = vae.decode(posterior.mean)
        y = y.clamp(-1, 1)  # as stored in an image file
        psnr, ssim = psnr_ssim((y + 1) / 2, (x + 1) / 2, data_range=1.0)
        metrics = dict(
            psnr=psnr,
            ssim=ssim,
            reconstruction=reconstruction_error(cfg.reconstruction, x, y).mean(),
            nats_per_dim=posterior.kl().mean(),
        )
        if perceptual is not None:
            # perceptual(x, y) may be compiled for training; perceptual.forward(x, y) never is.
            metrics["perceptual"] = perceptual.forward(x, y).mean()
        for name, value in metrics.items():
            totals[name] = totals.get(name, 0.0) + float(value) * len(x)
        if sum(map(len, originals)) < GRID_IMAGES:
            originals.append(torch.from_numpy(to_uint8(x)))
            reconstructions.append(torch.from_numpy(to_uint8(y)))
    grid = comparison_grid(*(torch.cat(parts).numpy()[:GRID_IMAGES] for parts in (originals, reconstructions)))
    return {name: total / len(rows) for name, total in totals.items()}, grid


def main(argv: list[str] | None = None) -> int:
    return cli.run(train, __doc__, argv)


if __name__ == "__main__":
    raise SystemExit(main())

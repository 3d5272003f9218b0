"""Stage 1: pixels -> VAE.

Trains a VAE on the images of config.data with reconstruction + perceptual + KL loss, and writes
runs/<name>/vae/vae.safetensors (EMA weights). The same command resumes.
"""

from lab import cli

if __name__ == "__main__":
    cli.answer_early(__doc__)  # --help and a wrong config need no torch

import torch
from PIL.Image import Image
from torch import Tensor, nn
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

from config import Config, Vae
from data import Shuffle, find_images, to_float, to_uint8
from lab.artifacts import require_space
from lab.experiment import experiment_of, require_same_run
from lab.feed import Feed
from lab.pictures import pairs
from lab.run import Run
from models.adversarial import PatchDiscriminator, adaptive_weight, discriminator_loss, generator_loss
from models.vae import VAE, reconstruction_error
from sources import HELD_OUT, TRAIN
from training import (
    STATE_BYTES,
    TRAINING_BYTES,
    autocast,
    compile_networks,
    load_perceptual,
    parameters_of,
    pick_device,
    pick_precision,
    require_memory,
)

EVAL_IMAGES = 512  # held-out images measured while training
SHEET_IMAGES = 32


def train(config: Config, dry_run: bool) -> None:
    s, device = config.vae, pick_device(config.device)
    dtype = pick_precision(config.precision, device)
    folder = config.run_dir / "vae"
    perceptual = load_perceptual(s.perceptual, device) if s.perceptual.weight > 0 else None
    found = find_images(config)
    torch.manual_seed(config.seed)
    vae = VAE(s.widths, s.blocks, s.latent_channels, s.attention, s.patch, s.output).to(
        device, memory_format=torch.channels_last
    )
    size, latent = config.data.image_size, config.data.image_size // vae.downsampling
    require_space(folder, STATE_BYTES * parameters_of(vae))
    require_memory(device, TRAINING_BYTES * parameters_of(vae))
    require_same_run(folder, experiment_of(config, "vae"), s)

    print(
        f"VAE: {parameters_of(vae) / 1e6:.2f}M parameters, {size}x{size}x3 -> {latent}x{latent}x{s.latent_channels}, on {device} in {str(dtype)[6:]}\n"
        f"images: {found.count(TRAIN):,} for training, {found.count(HELD_OUT):,} held out\n"
        f"loss: {s.reconstruction}"
        + (f" + {s.perceptual.weight:g} {perceptual.title}" if perceptual else "")
        + f" + {s.kl_weight:g} KL (nats per latent dimension)"
        + (f" + {s.adversarial.weight:g} adversarial from step {s.adversarial.start:,}" if s.adversarial.weight > 0 else "")
        + "\n"
        f"steps: {s.steps:,} of {s.batch_size} images"
        + (f", at most {s.max_minutes:g} minutes" if s.max_minutes else "")
        + "\n"
        f"files: {folder}/vae.safetensors, state.pt, metrics.jsonl, curves.png, reconstructions.png"
    )
    if dry_run:
        return

    images = found.load()
    train_rows, held_out = torch.from_numpy(images.rows(TRAIN)), torch.from_numpy(images.rows(HELD_OUT, EVAL_IMAGES))
    pixels = Feed([torch.from_numpy(images.pixels)], device)
    order = Shuffle(len(train_rows), config.seed)
    print(f"pixels: {pixels}")
    discriminator = None
    if s.adversarial.weight > 0:
        torch.manual_seed(config.seed + 1)
        discriminator = PatchDiscriminator(s.adversarial.width).to(device, memory_format=torch.channels_last)
    experiment = experiment_of(config, "vae", data_fingerprint=images.fingerprint)

    header = dict(kind="vae", settings=vae.settings, image_size=size, data_fingerprint=images.fingerprint)

    vae.checkpointing = s.checkpointing
    # The adaptive weight asks for the gradient of the decoder's last layer alone, twice: a decoder compiled whole would go back all
    # the way each time, and what is compiled behind that layer would have thrown away what the second time needs.
    whole = [vae, *([perceptual] if perceptual else [])]
    compile_networks(config.compile, device, *([*vae.encoder, *vae.decoder[:-2]] if discriminator else whole))
    with Run(
        folder,
        vae,
        s,
        experiment,
        config.seed,
        config.logging,
        "vae.safetensors",
        header,
        companion=discriminator,
        companion_lr=s.adversarial.lr,
    ) as run:
        if run.over:
            print(f"{folder}: already trained, {run.step:,} steps in {run.minutes:.1f} minutes")
            return
        while True:
            if run.due(s.log_every):
                run.report()
            if run.due(s.eval_every) and run.leads:
                figures, sheet = evaluate(run.ema.net, pixels, held_out, perceptual, s, run.micro_batch, device, dtype)
                run.log({f"held_out/{name}": value for name, value in figures.items()})
                run.picture("reconstructions", sheet, "reconstructions.png")
                run.say("  ".join(f"{name} {value:.4g}" for name, value in figures.items()))
            if run.save_due():
                run.save()
            if run.over:
                break

            run.seed_step()
            now, then = (
                train_rows[order.take(start, s.batch_size)] for start in (run.images_seen, run.images_seen + s.batch_size)
            )
            # Drawn for the whole batch, so that several processes do what one does; each keeps its share.
            mirrored = (torch.rand(s.batch_size, 1, 1, 1, device=device) < (0.5 if config.data.flip else 0.0))[run.share]
            noise = torch.randn(s.batch_size, s.latent_channels, latent, latent, device=device)[run.share]
            batch = pixels.take(now[run.share], then[run.share])  # (B, H, W, 3) uint8
            kl_weight = s.kl_weight * min(1.0, (run.step + 1) / max(1, s.kl_warmup))

            def backward(part: slice) -> None:
                x = to_float(batch[part])
                x = torch.where(mirrored[part], x.flip(3), x).contiguous(memory_format=torch.channels_last)
                with autocast(device, dtype):
                    y, posterior = vae(x, noise[part])
                    distance = perceptual(x, y) if perceptual else x.new_zeros(len(x))  # (B,)
                error = reconstruction_error(s.reconstruction, x, y).mean(dim=(1, 2, 3))  # (B,)
                kl = posterior.kl().mean(dim=(1, 2, 3))  # (B,) nats per latent dimension
                loss = error + s.perceptual.weight * distance.float() + kl_weight * kl
                if discriminator is None or run.step < s.adversarial.start:
                    run.accumulate(loss, loss, reconstruction=error, perceptual=distance, nats_per_dim=kl)
                    return
                discriminator.requires_grad_(False)  # the VAE's step must leave no gradient in the discriminator
                with autocast(device, dtype):
                    fooling = generator_loss(discriminator(y))  # (B,)
                weight = s.adversarial.weight * adaptive_weight(loss.mean(), fooling.mean(), vae.last_layer)
                run.accumulate(loss + weight * fooling, loss, reconstruction=error, perceptual=distance, nats_per_dim=kl,
                               fooling=fooling, adaptive_weight=weight.expand(len(x)))  # fmt: skip
                discriminator.requires_grad_(True)
                with autocast(device, dtype):
                    told_apart = discriminator_loss(discriminator(x), discriminator(y.detach()))  # (B,)
                run.accumulate_companion(told_apart, discriminator=told_apart)

            run.take_step(backward)
    run.stop_if_told()
    print(f"done: {folder}/vae.safetensors after {run.step:,} steps, {run.minutes:.1f} minutes")


@torch.no_grad()
def evaluate(
    vae: VAE,
    pixels: Feed,
    rows: Tensor,
    perceptual: nn.Module | None,
    s: Vae,
    at_once: int,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[dict[str, float], Image]:
    """Of the images at these rows (N,): figures of the reconstruction from the posterior mean, averaged over images, and a sheet of
    originals over reconstructions."""
    sums: dict[str, float] = {}
    n, shown = len(rows), []
    for part in rows.split(at_once):
        x = to_float(pixels.take(part))
        with autocast(device, dtype):
            posterior = vae.encode(x)
            y = vae.decode(posterior.mean)
        y = y.clamp(-1, 1)  # what a picture file can hold
        y01, x01 = (y + 1) / 2, (x + 1) / 2  # SSIM depends on where black is
        figures = dict(
            psnr=peak_signal_noise_ratio(y, x, data_range=2.0, dim=(1, 2, 3), reduction="elementwise_mean"),
            ssim=structural_similarity_index_measure(y01, x01, data_range=1.0),
            reconstruction=reconstruction_error(s.reconstruction, x, y).mean(),
            nats_per_dim=posterior.kl().mean(),
        )
        if perceptual is not None:
            figures["perceptual"] = perceptual.forward(x, y).mean()  # not what is compiled for training
        for name, value in figures.items():
            sums[name] = sums.get(name, 0.0) + float(value) * len(x)
        if len(shown) * at_once < SHEET_IMAGES:
            shown.append((to_uint8(x), to_uint8(y)))
    above, below = (torch.cat([torch.from_numpy(p[i]) for p in shown]).numpy()[:SHEET_IMAGES] for i in (0, 1))
    return {name: total / n for name, total in sums.items()}, pairs(above, below)


def main(argv: list[str] | None = None) -> int:
    return cli.run(train, __doc__, argv)


if __name__ == "__main__":
    raise SystemExit(main())

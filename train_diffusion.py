"""Stage 3: encodings -> noise-prediction U-Net.

Trains a U-Net on the scaled latents and writes runs/<name>/<diffusion.name>/unet.safetensors (EMA weights and the
normaliser). Two schedules of one experiment live side by side. The same command resumes.
"""

from lab import cli

if __name__ == "__main__":
    cli.answer_early(__doc__)

import torch
from PIL.Image import Image
from torch import Tensor

import conditions
from calibration import Moments
from config import Config, Diffusion
from data import Shuffle, spread, to_uint8
from lab.artifacts import require_space
from lab.errors import UserError
from lab.experiment import experiment_of, require_same_run
from lab.feed import Feed
from lab.pictures import grid
from lab.run import Run
from latent_diffusion import encodings_by, load_vae
from models.conditioning import Raw
from models.latents import Normaliser
from models.schedules import Schedule, make_schedule, min_snr_weight, target
from models.unet import UNet
from models.vae import VAE
from sampling import Threshold, image_generators, make_denoiser, randn, sample, spacing_for
from training import (
    STATE_BYTES,
    TRAINING_BYTES,
    autocast,
    compile_networks,
    parameters_of,
    pick_device,
    pick_precision,
    require_memory,
)

EVAL_LATENTS = 256  # held-out latents measured while training, each once per bin


def train(config: Config, dry_run: bool) -> None:
    s, device = config.diffusion, pick_device(config.device)
    dtype = pick_precision(config.precision, device)
    folder = config.run_dir / config.diffusion_name
    vae, _ = load_vae(config, device)
    encodings = encodings_by(vae, config)
    if encodings.differences(config):
        raise UserError(
            f"{config.run_dir}/encodings.pt: {'; '.join(encodings.differences(config))}: run create_encodings.py, or set it back"
        )
    n, channels, size, _ = encodings.mean.shape
    schedule = make_schedule(s.schedule, s.timesteps)
    conditioning = conditions.settings_for(config, encodings)
    torch.manual_seed(config.seed)
    try:
        unet = UNet(
            channels, size, s.widths, s.blocks, s.attention, s.head_channels, s.dropout,
            conditioning, s.cross_attention, s.bottleneck, s.bottleneck_blocks,
        )  # fmt: skip
    except ValueError as error:
        raise UserError(f"diffusion: {error}") from None
    unet = unet.to(device, memory_format=torch.channels_last)
    require_space(folder, STATE_BYTES * parameters_of(unet))
    require_memory(device, TRAINING_BYTES * parameters_of(unet))
    require_same_run(folder, experiment_of(config, "diffusion"), s)

    print(
        f"U-Net: {parameters_of(unet) / 1e6:.2f}M parameters on {size}x{size}x{channels} latents, on {device} in {str(dtype)[6:]}\n"
        f"latents: {n:,} for training{' and their mirrors' if encodings.mean_flipped is not None else ''}, {len(encodings.held_out):,} held out\n"
        f"{s.schedule} schedule, T = {s.timesteps}, predicts {s.prediction}, weighting {s.weighting}"
        + (f", {conditions.as_text(unet.conditioner)}" if conditioning else "")
        + "\n"
        f"steps: {s.steps:,} of {s.batch_size} latents"
        + (f", at most {s.max_minutes:g} minutes" if s.max_minutes else "")
        + "\n"
        f"files: {folder}/unet.safetensors, state.pt, metrics.jsonl, curves.png, samples/"
    )
    levels = [size >> level for level in range(len(s.widths))]
    if s.attention and not set(s.attention) & set(levels):
        print(
            f"note: diffusion.attention {s.attention} names none of the latent's widths, {', '.join(map(str, levels))}: there is none but in the middle"
        )
    if dry_run:
        return

    normaliser = encodings.normaliser.to(device)
    # Mirrored encodings behind the others: image i is row i or row n + i, and an epoch holds both.
    latents = Feed([encodings.mean] + ([encodings.mean_flipped] if encodings.mean_flipped is not None else []), device)
    order = Shuffle(sum(map(len, latents.parts)), config.seed)
    print(f"latents: {latents}")
    alphas, sigmas = schedule.tables(device)
    shown = spread(torch.arange(len(encodings.held_out)), EVAL_LATENTS)
    held_out = normaliser.normalise(encodings.held_out[shown].to(device))
    of_train, held_out_raw, fingerprints = None, None, {"encodings_fingerprint": encodings.fingerprint}
    if conditioning:
        if conditioning["kind"] == "text":
            print(f"captions: {encodings.text.feed(device)}")
            unet.conditioner.null_tokens.copy_(encodings.text.null())
        of_train, of_held_out = (
            conditions.of_split(unet.conditioner, encodings, held_out, device) for held_out in (False, True)
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the same captions every time
            held_out_raw = of_held_out.take(shown)
        fingerprints |= {"conditions": of_train.fingerprint, "conditioning": conditioning}
    experiment = experiment_of(config, "diffusion", **fingerprints)

    header = dict(
        kind="unet", settings=unet.settings, schedule=s.schedule, timesteps=s.timesteps, prediction=s.prediction,
        ema=s.ema, cfg_dropout=s.cfg_dropout,
        vae_fingerprint=encodings.vae_fingerprint, encodings_fingerprint=encodings.fingerprint,
    )  # fmt: skip
    extra = encodings.normaliser.state_dict("normaliser.")

    unet.checkpointing = s.checkpointing
    compile_networks(config.compile, device, unet)
    with Run(folder, unet, s, experiment, config.seed, config.logging, "unet.safetensors", header, extra) as run:
        if run.over:
            print(f"{folder}: already trained, {run.step:,} steps in {run.minutes:.1f} minutes")
            return
        while True:
            if run.due(s.log_every):
                run.report()
            if run.due(s.eval_every) and run.leads:
                losses = held_out_losses(run.ema.net, held_out, held_out_raw, schedule, s, run.micro_batch, dtype)
                run.log(
                    {
                        "held_out/loss": sum(losses) / len(losses),
                        **{f"held_out/loss_bin{b}": loss for b, loss in enumerate(losses)},
                    }
                )
                run.say(
                    f"held-out loss {sum(losses) / len(losses):.4f}, by timestep bin "
                    + " ".join(f"{loss:.3f}" for loss in losses)
                )
                picture, figures = sample_picture(
                    run.ema.net, held_out_raw, vae, normaliser, schedule, s, run.micro_batch, dtype
                )
                run.log({f"samples/{name}": value for name, value in figures.items()})
                run.picture("samples", picture, f"samples/step_{run.step:07d}.png")
            if s.snapshot_every and run.due(s.snapshot_every) and run.leads:
                run.snapshot()
            if run.save_due():
                run.save()
            if run.over:
                break

            run.seed_step()
            rows, then = (order.take(start, s.batch_size) for start in (run.images_seen, run.images_seen + s.batch_size))
            # Drawn for the whole batch, so that several processes do what one does; each keeps its share.
            raw = unet.conditioner.drop(of_train.take(rows % n), s.cfg_dropout) if of_train else None
            raw = None if raw is None else tuple(r[run.share] for r in raw)
            t = draw_timesteps(s, s.batch_size, device)[run.share]
            eps = torch.randn(s.batch_size, channels, size, size, device=device)[run.share]
            batch = latents.take(rows[run.share], then[run.share])  # (B, C, h, w) as stored

            def backward(part: slice) -> None:
                z, their_t = normaliser.normalise(batch[part]), t[part]  # z (B, C, h, w), unit variance
                their_raw = None if raw is None else tuple(r[part] for r in raw)
                with autocast(device, dtype):
                    loss = diffusion_loss(unet, z, eps[part], their_t, alphas, sigmas, s.prediction, their_raw)  # (B,)
                weight = 1.0
                if s.weighting == "min_snr":
                    weight = min_snr_weight(s.prediction, alphas[their_t], sigmas[their_t], s.min_snr_gamma)
                run.accumulate(weight * loss, loss, their_t, unweighted_loss=loss)

            run.take_step(backward)
    run.stop_if_told()
    print(f"done: {folder}/unet.safetensors after {run.step:,} steps, {run.minutes:.1f} minutes")


def draw_timesteps(s: Diffusion, n: int, device: torch.device) -> Tensor:
    """Timesteps to train on, (n,) int64 in 0 … T-1."""
    if s.timestep_sampling == "logit_normal":
        return (torch.randn(n, device=device).sigmoid() * s.timesteps).long().clamp(max=s.timesteps - 1)
    return torch.randint(0, s.timesteps, (n,), device=device)


def diffusion_loss(
    unet: UNet, z: Tensor, eps: Tensor, t: Tensor, alphas: Tensor, sigmas: Tensor, prediction: str, raw: Raw | None = None
) -> Tensor:
    """Squared error of the prediction, per latent: (B,), unweighted (Ho et al. 2020, eq. 14)."""
    alpha, sigma = alphas[t][:, None, None, None], sigmas[t][:, None, None, None]
    z_t = (alpha * z + sigma * eps).contiguous(memory_format=torch.channels_last)
    return (unet(z_t, t, raw) - target(prediction, z, eps, alpha, sigma)).square().mean(dim=(1, 2, 3))


def split(tensors: tuple[Tensor, ...], raw: Raw | None, size: int):
    """Batches of `size`: (part of each tensor …, the raw conditions that go with them)."""
    for start in range(0, len(tensors[0]), size):
        part = slice(start, start + size)
        yield *(x[part] for x in tensors), [r[part] for r in raw or ()]


@torch.no_grad()
def held_out_losses(
    unet: UNet, z: Tensor, raw: Raw | None, schedule: Schedule, s: Diffusion, at_once: int, dtype: torch.dtype
) -> list[float]:
    """Unweighted loss in each of the schedule's bins of timesteps, at the same noise and timesteps every time."""
    generator = torch.Generator().manual_seed(0)
    alphas, sigmas = schedule.tables(z.device)
    losses = []
    for first, last in schedule.bins():
        t = torch.linspace(first, last, len(z)).round().long().to(z.device)
        eps = torch.randn(z.shape, generator=generator).to(z.device)
        with autocast(z.device, dtype):
            parts = [
                diffusion_loss(unet, *part, alphas, sigmas, s.prediction, tuple(part_raw) or None)
                for *part, part_raw in split((z, eps, t), raw, at_once)
            ]
        losses.append(float(torch.cat(parts).mean()))
    return losses


@torch.no_grad()
def sample_picture(
    unet: UNet,
    raw: Raw | None,
    vae: VAE,
    normaliser: Normaliser,
    schedule: Schedule,
    s: Diffusion,
    at_once: int,
    dtype: torch.dtype,
) -> tuple[Image, dict[str, float]]:
    """A grid of samples from the same noise every time: UniPC, 20 steps, clamped to the measured range; conditioned on
    what held-out images show, unguided. And how their latents spread beside those of training, and what share was clamped."""
    device = normaliser.scale.device
    shape = (unet.settings["channels"], unet.settings["size"], unet.settings["size"])
    images, threshold, moments = [], Threshold(*normaliser.range()), Moments(shape[0])
    for start in range(0, s.sample_images, at_once):
        indices = range(start, min(start + at_once, s.sample_images))
        noise = randn((len(indices), *shape), image_generators(0, indices, "cpu"), device)
        theirs = None if raw is None else tuple(r[[i % len(r) for i in indices]] for r in raw)
        denoise = make_denoiser(lambda z_t, t, raw=theirs: unet(z_t, t, raw), schedule, s.prediction, device, dtype)
        z = sample(
            denoise,
            noise,
            schedule,
            "unipc",
            min(20, s.timesteps),
            spacing=spacing_for("unipc", schedule),
            x0_range=threshold,
        )
        moments.add(z)
        with autocast(device, dtype):
            images.append(torch.from_numpy(to_uint8(vae.decode(normaliser.denormalise(z)))))
    clamped, seen = threshold.counts
    figures = {"std_ratio": moments.overall_std() / normaliser.overall_std(), "clamped": clamped / seen}
    return grid(torch.cat(images).numpy(), cols=max(1, round(s.sample_images**0.5))), figures


def main(argv: list[str] | None = None) -> int:
    return cli.run(train, __doc__, argv)


if __name__ == "__main__":
    raise SystemExit(main())

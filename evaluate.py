"""The judge: is what the models make any good?

evaluation.task=
  generation       generated images against training images: Fréchet distance, KID, precision and recall, beside what held-out
                   images score (perfection) and what reconstructed held-out images score (the VAE's share of the error);
                   and the generated images that lie nearest to a training image, beside it
  reconstruction   the VAE on held-out images: PSNR, SSIM, the perceptual distance of vae.perceptual, distance to the originals
  latents          the latent card: each channel's figures, the ceiling that the VAE sets, what clamps do, GO or NO-GO
  loss             the U-Net's error by signal-to-noise ratio over that of a guess which knows only the variance: comparable between schedules
  samplers         every solver at several numbers of steps from the same noises: distance to the solution of the ODE, spread,
                   distance to the held-out latents, seconds; a table, a plot and a line of advice
Everything is printed and written to results/ with its command, hardware and feature network.
"""

from lab import cli

if __name__ == "__main__":
    cli.answer_early(__doc__)

from pathlib import Path

import numpy as np
import torch

import conditions
from config import Config
from data import spread, to_float
from lab import parallel
from lab.artifacts import fingerprint, require_space, set_aside, write_atomically
from lab.errors import UserError
from lab.pictures import grid, pairs, save_png
from latent_cache import Encodings
from latent_diffusion import LatentDiffusion, encodings_by, images_of, load_vae
from metrics import judging, sampler_bench
from metrics.features import frechet, make_features
from sources import TRAIN
from sources.images import crop_of
from training import hardware, load_perceptual, parameters_of, pick_device, pick_precision


def evaluate(config: Config, dry_run: bool) -> None:
    if parallel.size() > 1:
        raise UserError("evaluate.py works in one process: call it with python, not with torchrun")
    TASKS[config.evaluation.task](config, dry_run)


# Tables


def table_of(headings, rows) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (headings, ["---"] * len(headings), *rows))


def publish(config: Config, name: str, device: torch.device, of: str, text: str) -> None:
    """Print a page and write it to results/<name>.md with the command that made it and the weights it is of; a page of another
    command or of other weights is kept under a number."""
    path, made_by = Path(config.results_dir) / f"{name}.md", f"`{cli.command}`, {of}"
    if path.exists() and made_by not in path.read_text(encoding="utf-8"):
        set_aside(path.parent, name, (".md", ".png", "_nearest.png"))
    page = f"{text}\n\n{made_by}, on {hardware(device)}, commit {cli.commit()}.\n"
    write_atomically(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))
    print(text)
    print(f"done: {path}")


def weights_of(what: str, weights: str, header: dict) -> str:
    """For `publish`: which of the trainings under one name a page is of."""
    return f"{what} of step {header['step']:,} ({weights})"


def plan(config: Config, what: str, device: torch.device, dtype: torch.dtype, files: list[str]) -> None:
    require_space(Path(config.results_dir), 10_000_000)
    print(f"{what}, on {device} in {str(dtype)[6:]}\nfiles: " + ", ".join(f"{config.results_dir}/{file}" for file in files))


# Tasks


def generation(config: Config, dry_run: bool) -> None:
    e, s, device = config.evaluation, config.sampling, pick_device(config.device)
    dtype, count = pick_precision(e.precision, device), e.generated or e.images
    model = LatentDiffusion(config, device, dtype)
    model.steps_of(s)
    encodings = encodings_by(model.vae, config) if model.unet.conditioner else None
    features = make_features(e.features, e.weights, device)
    name = f"{config.name}_{config.diffusion_name}_{s.sampler}{s.steps}" + (f"_w{s.guidance:g}" if s.guidance != 1 else "")
    plan(config, f"{count:,} generated images by {s.sampler}, {s.steps} steps, in features of {features.name}", device, dtype,
         [f"{name}_generation.md", f"{name}_generation_nearest.png"])  # fmt: skip
    if dry_run:
        return
    images = images_of(config, model.vae_header)
    held_out = judging.held_out_pixels(images, count)
    n = len(held_out)  # these distances depend on the number of pictures, so the three that are compared have as many
    rows = images.rows(TRAIN, e.reference)
    training = judging.training_features(config, images, features, rows)
    raw = conditions.of_held_out(model.unet.conditioner, encodings, count, device) if encodings else None
    made, figures = judging.generated(s, model, raw, count)
    reconstructed = judging.through(model.vae, held_out, e.batch_size, device, dtype)
    found, found_held_out, found_reconstructed = (features(p, e.batch_size) for p in (made, held_out, reconstructed))
    sets = {
        "generated": spread(found, n),
        "held-out (perfection)": found_held_out,
        "held-out, reconstructed": found_reconstructed,
        **({"generated, all": found} if len(found) > n else {}),
    }
    generated, perfect, through_vae, *_ = table = [judging.Distance.of(what, f, training) for what, f in sets.items()]
    if config.data.flip:  # mirrored images were trained on too
        training = torch.cat([training, judging.training_features(config, images, features, rows, mirrored=True)])
    # Held-out images through the VAE too: its blur alone moves pictures nearer or farther.
    copies = judging.Memorisation.of(found, found_reconstructed, training)

    few = ""
    if n < found.shape[1]:
        few = (
            f" {n:,} pictures are fewer than the {found.shape[1]:,} features: most of each Fréchet distance is then bias, alike in all "
            f"rows, which makes their ratio flatter. KID has no such bias."
        )
    paragraphs = [
        f"# Generated images of {config.name}, {config.diffusion_name}: {s.sampler}, {s.steps} steps by {model.spacing(s)}, guidance {s.guidance:g}",
        f"Against {len(rows):,} of {len(images.rows(TRAIN)):,} training images, not mirrored ({config.data.source}, crop "
        f"{crop_of(config.data)}, {config.data.image_size} px), in features of **{features.name}**.{few}",
        f"Drawn under what {min(count, len(encodings.held_out)):,} held-out images show."
        if raw
        else "Drawn under no condition.",
        table_of(judging.DISTANCE_HEADINGS, [row.cells() for row in table]),
        f"Latents: generated/training std {figures['std_ratio']:.3f} overall, {figures['worst_channel_ratio']:.3f} in the worst channel; "
        f"{figures['clamped']:.2%} of clean estimates clamped; {figures['out_of_range']:.2%} of pixels out of range.",
        f"Error budget: of the {generated.frechet - perfect.frechet:.1f} that generated images are farther than held-out ones, the VAE "
        f"costs {through_vae.frechet - perfect.frechet:.1f} and the U-Net and its sampler {generated.frechet - through_vae.frechet:.1f}. Generated "
        f"images score {generated.frechet / perfect.frechet:.2f} times what held-out ones score.",
        f"Memorisation, by the nearest of {len(rows):,} training images{' and their mirrors' if config.data.flip else ''}: median "
        f"distance {copies.median:.2f} for generated and {copies.median_held_out:.2f} for reconstructed held-out images; "
        f"{copies.near:.1%} of the generated lie nearer than {1 - judging.NEAR:.0%} of the reconstructed held-out ones do. "
        f"{name}_generation_nearest.png shows the twelve nearest: generated, then its three neighbours.",
    ]
    publish(
        config, f"{name}_generation", device, weights_of("U-Net", model.fingerprint, model.header), "\n\n".join(paragraphs)
    )
    sheet = []
    for i, neighbours in copies.nearest[:12]:
        sheet += [made[i], *(images.pixels[rows[j % len(rows)]][:, :: 1 if j < len(rows) else -1] for j in neighbours)]
    save_png(
        grid(np.stack(sheet), 3 * (1 + judging.SHOWN_NEIGHBOURS)),
        Path(config.results_dir) / f"{name}_generation_nearest.png",
    )


def reconstruction(config: Config, dry_run: bool) -> None:
    e, device = config.evaluation, pick_device(config.device)
    dtype = pick_precision(e.precision, device)
    vae, header = load_vae(config, device)
    features = make_features(e.features, e.weights, device)
    perceptual = load_perceptual(config.vae.perceptual, device)
    name = f"{config.name}_reconstruction"
    plan(config, f"VAE of {parameters_of(vae) / 1e6:.2f}M parameters, step {header['step']:,}, on held-out images", device, dtype,
         [f"{name}.md", f"{name}.png"])  # fmt: skip
    if dry_run:
        return
    images = images_of(config, header)
    originals = judging.held_out_pixels(images, e.images)
    made = judging.through(vae, originals, e.batch_size, device, dtype)
    figures = judging.fidelity(made, originals, e.batch_size)
    rows = [["PSNR", f"{figures['psnr']:.2f} dB"], ["SSIM", f"{figures['ssim']:.4f}"]]
    if perceptual is not None:
        with torch.no_grad():
            distances = [
                perceptual(
                    *(to_float(torch.from_numpy(x[i : i + e.batch_size].copy())).to(device) for x in (originals, made))
                )
                for i in range(0, len(made), e.batch_size)
            ]
        rows.append([perceptual.title, f"{float(torch.cat(distances).mean()):.4f}"])
    distance = frechet(*(features(pixels, e.batch_size) for pixels in (made, originals)))
    rows.append([f"Fréchet distance to the originals ({features.name})", f"{distance:.1f}"])
    paragraphs = [
        f"# Reconstructions of {config.name}",
        f"{len(originals):,} held-out images at {config.data.image_size} px.",
        table_of(["", ""], rows),
    ]
    publish(config, name, device, weights_of("VAE", fingerprint(vae.state_dict()), header), "\n\n".join(paragraphs))
    save_png(pairs(originals[:32], made[:32]), Path(config.results_dir) / f"{name}.png")


def latents(config: Config, dry_run: bool) -> None:
    e, device = config.evaluation, pick_device(config.device)
    pick_precision("float32", device)  # no TF32 either
    vae, header = load_vae(config, device)
    encodings = encodings_by(vae, config)
    name = f"{config.name}_latents"
    plan(config, f"latent card of {len(encodings.mean):,} training latents", device, torch.float32, [f"{name}.md"])
    if dry_run:
        return
    card = judging.latent_card(
        vae,
        encodings.normaliser.to(device),
        judging.held_out_pixels(images_of(config, header), e.images),
        e.batch_size,
        device,
    )
    lines = [f"# Latents of {config.name}", "", *card.lines, "", f"**{card.verdict}**"]
    publish(config, name, device, weights_of("VAE", fingerprint(vae.state_dict()), header), "\n".join(lines))


def loss(config: Config, dry_run: bool) -> None:
    e, device = config.evaluation, pick_device(config.device)
    dtype = pick_precision(e.precision, device)
    model = LatentDiffusion(config, device, dtype)
    encodings = Encodings.load(config.run_dir / "encodings.pt")
    name = f"{config.name}_{config.diffusion_name}_loss"
    plan(config, f"error of {model.path} on held-out latents", device, dtype, [f"{name}.md"])
    if dry_run:
        return
    shown = spread(torch.arange(len(encodings.held_out)), e.images)
    raw = conditions.of_held_out(model.unet.conditioner, encodings, len(shown), device)
    z = model.normaliser.normalise(encodings.held_out[shown].to(device))
    found = judging.loss_by_snr(model, z, raw, e.batch_size)
    rows = [
        [f"{middle:+d}", f"{first} … {last}", f"{error:.4f}", f"{ratio:.3f}"] for middle, first, last, error, ratio in found
    ]
    means = (f"{sum(row[i] for row in found) / len(found):.{digits}f}" for i, digits in ((3, 4), (4, 3)))
    rows.append([f"mean of {found[0][0]:+d} … {found[-1][0]:+d}", "", *means])
    paragraphs = [
        f"# Error by signal-to-noise ratio: {config.name}, {model.header['schedule']}, predicts {model.header['prediction']}",
        f"{len(z):,} held-out latents. Beside the squared error of the clean estimate, its ratio to that of the best guess that knows only "
        f"that latents have unit variance: 1 is no better than that guess. A row is a unit of the signal-to-noise ratio's logarithm, and so "
        f"rows can be compared between schedules and predictions; means only where they are of the same rows.",
        table_of(["log(alpha/sigma)", "t", "squared error of z0", "of the guess's"], rows),
    ]
    publish(config, name, device, weights_of("U-Net", model.fingerprint, model.header), "\n\n".join(paragraphs))


def samplers(config: Config, dry_run: bool) -> None:
    e, device = config.evaluation, pick_device(config.device)
    dtype = pick_precision(e.precision, device)
    model = LatentDiffusion(config, device, dtype)
    encodings = Encodings.load(config.run_dir / "encodings.pt")
    if max(e.steps) > model.schedule.timesteps:
        raise UserError(f"evaluation.steps: {max(e.steps)} is more than the model's T = {model.schedule.timesteps}")
    for sampler in e.samplers:
        model.steps_of(config.sampling.model_copy(update={"sampler": sampler}))
    if e.images > len(encodings.mean):
        raise UserError(
            f"evaluation.images: {e.images} is more than the {len(encodings.mean):,} training latents to compare with"
        )
    name = f"{config.name}_{config.diffusion_name}_samplers"
    what = (
        f"U-Net of {parameters_of(model.unet) / 1e6:.1f}M parameters after {model.header['step']:,} steps; {e.images:,} images from the same noises, "
        f"{', '.join(e.samplers)} at {', '.join(map(str, e.steps))} steps"
    )
    plan(config, what, device, dtype, [f"{name}.md", f"{name}.png"])
    if dry_run:
        return
    rows, lowest = sampler_bench.bench(config, model, encodings)
    verdict = sampler_bench.advice(rows)
    paragraphs = [
        f"# Samplers on {config.name}, {model.header['schedule']} schedule",
        f"{what}, in {str(dtype)[6:]}." + (" Drawn under what held-out images show." if model.unet.conditioner else ""),
        f"*to the ODE*: RMS distance, in units of the latents' std, to {sampler_bench.REFERENCE} at {max(e.steps)} steps. *distance*: sliced "
        f"Wasserstein distance to the {len(encodings.held_out):,} held-out latents; as many training latents score {lowest:.4f}.",
        table_of(sampler_bench.HEADINGS, map(sampler_bench.cells_of, sorted(rows, key=lambda row: row.steps))),
        f"**{verdict}**",
    ]
    publish(config, name, device, weights_of("U-Net", model.fingerprint, model.header), "\n\n".join(paragraphs))
    plot = Path(config.results_dir) / f"{name}.png"
    sampler_bench.save_plot(plot, rows, lowest, f"{config.name}, {model.header['schedule']}, {e.images:,} images")


TASKS = dict(generation=generation, reconstruction=reconstruction, latents=latents, loss=loss, samplers=samplers)


def main(argv: list[str] | None = None) -> int:
    return cli.run(evaluate, __doc__, argv)


if __name__ == "__main__":
    raise SystemExit(main())

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

import cli

if __name__ == "__main__":
    cli.answer_early(__doc__)

from pathlib import Path

import torch

import conditions
import judging
import parallel
import sampler_bench
from artifacts import require_space, set_aside, write_atomically
from config import Config, UserError
from data import spread, to_float
from features import frechet, make_features
from latent_cache import Encodings
from latent_diffusion import LatentDiffusion, encodings_by, images_of, load_vae
from models.losses import make_perceptual, perceptual_weights
from pictures import pairs, save_png
from sources import TRAIN, crop_of
from training import hardware, parameters_of, pick_device, pick_precision


def evaluate(config: Config, dry_run: bool) -> None:
    if parallel.size() > 1:
        raise UserError("evaluate.py works in one process: call it with python, not with torchrun")
    TASKS[config.evaluation.task](config, dry_run)


# Tables


def table_of(headings, rows) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (headings, ["---"] * len(headings), *rows))


def make_room(config: Config, name: str) -> None:
    """A page that another command made is kept under another name."""
    path = Path(config.results_dir) / f"{name}.md"
    if path.exists() and f"`{cli.command}`" not in path.read_text(encoding="utf-8"):
        set_aside(path.parent, name, (".md", ".png", "_nearest.png"))


def publish(config: Config, name: str, device: torch.device, text: str) -> None:
    """Print a page and write it to results/<name>.md with the command that made it."""
    path = Path(config.results_dir) / f"{name}.md"
    make_room(config, name)
    page = f"{text}\n\n`{cli.command}` on {hardware(device)}.\n"
    write_atomically(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))
    print(text)
    print(f"done: {path}")


def plan(config: Config, what: str, device: torch.device, dtype: torch.dtype, files: list[str]) -> None:
    require_space(Path(config.results_dir), 10_000_000)
    print(f"{what}, on {device} in {str(dtype)[6:]}\nfiles: " + ", ".join(f"{config.results_dir}/{file}" for file in files))


# Tasks


def generation(config: Config, dry_run: bool) -> None:
    e, s, device = config.evaluation, config.sampling, pick_device(config.device)
    dtype = pick_precision(e.precision, device)
    model = LatentDiffusion(config, device, dtype)
    model.steps_of(s)
    encodings = encodings_by(model.vae, config) if model.unet.conditioner else None
    features = make_features(e.features, e.weights, device)
    name = f"{config.name}_{config.diffusion_name}_{s.sampler}{s.steps}" + (f"_w{s.guidance:g}" if s.guidance != 1 else "")
    plan(config, f"{e.images:,} generated images by {s.sampler}, {s.steps} steps, in features of {features.name}", device, dtype,
         [f"{name}_generation.md", f"{name}_generation_nearest.png"])  # fmt: skip
    if dry_run:
        return
    images = images_of(config, model.vae_header)
    held_out = judging.held_out_pixels(images, e.images)
    n = len(held_out)  # as many of each: these distances depend on the number
    training = judging.training_features(config, images, features, e.reference)
    raw = None
    if encodings:
        raw = conditions.of_held_out(model.unet.conditioner, encodings, n, device)
    made, figures = judging.generated(s, model, raw, n)
    sets = {"generated": made, "held-out (perfection)": held_out, "held-out, reconstructed": judging.through(model.vae, held_out, e.batch_size, device, dtype)}  # fmt: skip
    found = {what: features(pixels, e.batch_size) for what, pixels in sets.items()}
    rows = [judging.Distance.of(what, found[what], training) for what in sets]
    sheet, near, near_held_out = judging.memorisation(
        made, found["generated"], found["held-out (perfection)"], images, images.rows(TRAIN, e.reference), training
    )
    by = {row.what: row.frechet for row in rows}
    perfect, vae = by["held-out (perfection)"], by["held-out, reconstructed"]
    publish(config, f"{name}_generation", device, "\n\n".join([
        f"# Generated images of {config.name}, {config.diffusion_name}: {s.sampler}, {s.steps} steps, guidance {s.guidance:g}",
        f"Against {len(training):,} training images ({config.data.source}, crop {crop_of(config.data)}, {config.data.image_size} px), in features of **{features.name}**.",
        f"Drawn under what {min(n, len(encodings.held_out)):,} held-out images show." if raw else "Drawn under no condition.",
        table_of(judging.DISTANCE_HEADINGS, [row.cells() for row in rows]),
        f"Latents: generated/training std {figures['std_ratio']:.3f} overall, {figures['worst_channel_ratio']:.3f} in the worst channel; "
        f"{figures['clamped']:.2%} of clean estimates clamped; {figures['out_of_range']:.2%} of pixels out of range.",
        f"Error budget: of the {by['generated'] - perfect:.1f} that generated images are farther than held-out ones, the VAE costs {vae - perfect:.1f} and the "
        f"U-Net and its sampler {by['generated'] - vae:.1f}. Generated images score {by['generated'] / perfect:.2f} times what held-out ones score.",
        f"Memorisation: the median distance to the nearest training image is {near:.2f} for generated and {near_held_out:.2f} for held-out images "
        f"({name}_generation_nearest.png shows the twelve nearest: generated, then its three neighbours).",
    ]))  # fmt: skip
    save_png(sheet, Path(config.results_dir) / f"{name}_generation_nearest.png")


def reconstruction(config: Config, dry_run: bool) -> None:
    e, p, device = config.evaluation, config.vae.perceptual, pick_device(config.device)
    dtype = pick_precision(e.precision, device)
    vae, header = load_vae(config, device)
    features = make_features(e.features, e.weights, device)
    try:
        perceptual = make_perceptual(p.net, perceptual_weights(p.net, p.weights)).to(device) if p.net != "none" else None
    except (FileNotFoundError, ValueError) as error:
        raise UserError(str(error)) from None
    name = f"{config.name}_reconstruction"
    plan(config, f"VAE of {parameters_of(vae) / 1e6:.2f}M parameters, step {header['step']:,}, on held-out images", device, dtype,
         [f"{name}.md", f"{name}.png"])  # fmt: skip
    if dry_run:
        return
    images = images_of(config, header)
    originals = judging.held_out_pixels(images, e.images)
    made = judging.through(vae, originals, e.batch_size, device, dtype)
    figures = judging.fidelity(made, originals)
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
    rows.append(
        [f"Fréchet distance to the originals ({features.name})", f"{frechet(features(made), features(originals)):.1f}"]
    )
    publish(config, name, device, f"# Reconstructions of {config.name}\n\n{len(originals):,} held-out images at {config.data.image_size} px.\n\n" + table_of(["", ""], rows))  # fmt: skip
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
    publish(config, name, device, "\n".join([f"# Latents of {config.name}", "", *card.lines, "", f"**{card.verdict}**"]))


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
    rows.append(["mean", "", *(f"{sum(row[i] for row in found) / len(found):.{digits}f}" for i, digits in ((3, 4), (4, 3)))])
    publish(config, name, device, "\n\n".join([
        f"# Error by signal-to-noise ratio: {config.name}, {model.header['schedule']}, predicts {model.header['prediction']}",
        f"{len(z):,} held-out latents. Beside the squared error of the clean estimate, its ratio to that of the best guess that knows only that latents "
        f"have unit variance: 1 is no better than that guess. A row is a unit of the signal-to-noise ratio's logarithm, and so rows can be compared between "
        f"schedules and predictions.",
        table_of(["log(alpha/sigma)", "t", "squared error of z0", "of the guess's"], rows),
    ]))  # fmt: skip


def samplers(config: Config, dry_run: bool) -> None:
    e, device = config.evaluation, pick_device(config.device)
    dtype = pick_precision(e.precision, device)
    model = LatentDiffusion(config, device, dtype)
    encodings = Encodings.load(config.run_dir / "encodings.pt")
    if max(e.steps) > model.schedule.timesteps:
        raise UserError(f"evaluation.steps: {max(e.steps)} is more than the model's T = {model.schedule.timesteps}")
    model.steps_of(config.sampling)
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
    publish(config, name, device, "\n\n".join([
        f"# Samplers on {config.name}, {model.header['schedule']} schedule",
        f"{what}, in {str(dtype)[6:]}." + (" Drawn under what held-out images show." if model.unet.conditioner else ""),
        f"*to the ODE*: RMS distance, in units of the latents' std, to {sampler_bench.REFERENCE} at {max(e.steps)} steps. *distance*: sliced Wasserstein "
        f"distance to the {len(encodings.held_out):,} held-out latents; as many training latents score {lowest:.4f}.",
        table_of(sampler_bench.HEADINGS, map(sampler_bench.cells_of, sorted(rows, key=lambda row: row.steps))),
        f"**{verdict}**",
    ]))  # fmt: skip
    plot = Path(config.results_dir) / f"{name}.png"
    sampler_bench.save_plot(plot, rows, lowest, f"{config.name}, {model.header['schedule']}, {e.images:,} images")


TASKS = dict(generation=generation, reconstruction=reconstruction, latents=latents, loss=loss, samplers=samplers)


def main(argv: list[str] | None = None) -> int:
    return cli.run(evaluate, __doc__, argv)


if __name__ == "__main__":
    raise SystemExit(main())

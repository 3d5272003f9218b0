"""The judge: is what the models make any good?

evaluation.task=samplers   every solver at several numbers of steps, from the same noises: distance to the solution of the
                           probability-flow ODE, spread, distance to the held-out latents, seconds. A table and a plot in
                           results/, and one line of advice.
"""

import cli

if __name__ == "__main__":
    cli.answer_early(__doc__)

from pathlib import Path

import parallel
import sampler_bench
from artifacts import require_space
from config import Config, UserError
from latent_cache import Encodings
from latent_diffusion import LatentDiffusion
from training import hardware, parameters_of, pick_device, pick_precision


def evaluate(config: Config, dry_run: bool) -> None:
    TASKS[config.evaluation.task](config, dry_run)


def samplers(config: Config, dry_run: bool) -> None:
    e, device = config.evaluation, pick_device(config.device)
    dtype = pick_precision(e.precision, device)
    model = LatentDiffusion(config, device, dtype)
    encodings = Encodings.load(config.run_dir / "encodings.pt")
    if max(e.steps) > model.schedule.timesteps:
        raise UserError(f"evaluation.steps: {max(e.steps)} is more than the model's T = {model.schedule.timesteps}")
    if e.images > len(encodings.mean):
        raise UserError(
            f"evaluation.images: {e.images} is more than the {len(encodings.mean):,} training latents to compare with"
        )
    name = f"{config.name}_{config.diffusion_name}_samplers"
    table, plot = Path(config.results_dir) / f"{name}.md", Path(config.results_dir) / f"{name}.png"
    require_space(table.parent, 1_000_000)
    print(
        f"U-Net: {parameters_of(model.unet) / 1e6:.2f}M parameters, step {model.header['step']:,}; {e.images:,} noises, "
        f"{', '.join(e.samplers)} at {', '.join(map(str, e.steps))} steps, on {device} in {str(dtype)[6:]}\nfiles: {table}, {plot}"
    )
    if dry_run or not parallel.leads():  # the bench is of one device
        return
    rows, lowest = sampler_bench.bench(config, model, encodings)
    verdict = sampler_bench.advice(rows)
    notes = [
        f"# Samplers on {config.name}, {model.header['schedule']} schedule",
        f"`{cli.command}` on {hardware(device)}, {str(dtype)[6:]}. {e.images:,} images from the same noises; U-Net of "
        f"{parameters_of(model.unet) / 1e6:.1f}M parameters after {model.header['step']:,} steps.",
        f"*to the ODE*: RMS distance, in units of the latents' std, to {sampler_bench.REFERENCE} at {max(e.steps)} steps. *distance*: sliced Wasserstein "
        f"distance to the {len(encodings.held_out):,} held-out latents; as many training latents score {lowest:.4f}.",
        f"**{verdict}**",
    ]
    sampler_bench.save_table(table, rows, notes)
    sampler_bench.save_plot(plot, rows, lowest, f"{config.name}, {model.header['schedule']}, {e.images:,} images")
    print(verdict)
    print(f"done: {table}, {plot}")


TASKS = {"samplers": samplers}


def main(argv: list[str] | None = None) -> int:
    return cli.run(evaluate, __doc__, argv)


if __name__ == "__main__":
    raise SystemExit(main())

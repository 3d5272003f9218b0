"""Evaluate trained models: print a report and write it to results/.

evaluation.task=
  generation       generated images compared with training images: Fréchet distance, KID, precision, recall, nearest
                   training images; the same metrics for validation images and their reconstructions
  condition        images generated from the captions or labels of validation images, compared with these images and with
                   others: feature distance, fraction of the others that are farther away, effect of the guidance scale
  reconstruction   VAE on validation images: PSNR, SSIM, the perceptual distance set by vae.perceptual, Fréchet
                   distance
  latents          statistics per latent channel, best possible PSNR, effect of clamping, rFID and iFID (explained in
                   docs/evaluation.md); verdict whether a U-Net can be trained on these latents (GO or NO-GO)
  loss             denoising error per bin of log(alpha/sigma), relative to the optimal denoiser for N(0, 1); can be
                   compared between noise schedules and prediction types
  samplers         every sampler at several step counts: distance to the ODE solution, std ratio, distance to validation
                   latents, seconds
"""

from utils import cli

if __name__ == "__main__":
    cli.handle_help(__doc__)

from config import Config
from evaluation import condition_match, denoising, generation, latents, reconstruction, samplers
from utils import distributed
from utils.errors import UserError

TASKS = {
    "generation": generation.run,
    "condition": condition_match.run,
    "reconstruction": reconstruction.run,
    "latents": latents.run,
    "loss": denoising.run,
    "samplers": samplers.run,
}


def evaluate(config: Config, dry_run: bool) -> None:
    if distributed.world_size() > 1:
        raise UserError("evaluate.py runs in one process: start it with python, not with torchrun")
    TASKS[config.evaluation.task](config, dry_run)


def main(argv: list[str] | None = None) -> int:
    return cli.run(evaluate, __doc__, argv)


if __name__ == "__main__":
    raise SystemExit(main())

"""What evaluate.py measures of pictures and latents: reconstruction, generation, the latent card, loss by signal-to-noise ratio, memorisation."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from conditions import Requests
from config import Config, Sampling
from data import Images, spread, to_float, to_uint8
from drawing import Wanted, draw
from lab.artifacts import load_plain, save_plain
from lab.errors import UserError
from latent_diffusion import LatentDiffusion
from metrics.features import Features, frechet, kid, precision_recall
from models.conditioning import Raw
from models.latents import Normaliser
from models.vae import VAE
from sampling import make_denoiser
from sources import HELD_OUT, TEST
from training import autocast

DEAD_STD, TAIL_KURTOSIS, ENOUGH_PSNR = 0.1, 10.0, 24.0  # what makes the latent card say NO-GO
SHOWN_NEIGHBOURS = 3  # training images shown beside a generated one
NEAR = 0.01  # of held-out pictures: nearer to a training image than the others


# Pictures


def held_out_pixels(images: Images, at_most: int) -> np.ndarray:
    """uint8 (N, H, W, 3), spread evenly over the held-out split and the test split behind it, as class folders come sorted. Raises
    UserError where they are too few to judge by."""
    rows = spread(np.concatenate([images.rows(HELD_OUT), images.rows(TEST)]), at_most)
    if len(rows) < 2 * SHOWN_NEIGHBOURS + 2:
        raise UserError(
            f"{len(rows)} held-out images are too few to judge by; at least {2 * SHOWN_NEIGHBOURS + 2} are needed"
        )
    return images.pixels[rows]


@torch.no_grad()
def through(vae: VAE, pixels: np.ndarray, batch_size: int, device: torch.device, dtype: torch.dtype) -> np.ndarray:
    """uint8 (N, H, W, 3) through the VAE and back, from the posterior mean."""
    made = []
    for part in torch.from_numpy(np.ascontiguousarray(pixels)).split(batch_size):
        with autocast(device, dtype):
            made.append(to_uint8(vae.decode(vae.encode(to_float(part).to(device)).mean)))
    return np.concatenate(made)


def generated(s: Sampling, model: LatentDiffusion, raw: Raw | None, n: int) -> tuple[np.ndarray, dict]:
    """uint8 (n, H, W, 3), and the calibration of their latents; of a conditional model each under the next of the raw conditions."""
    drawn = draw(model, s.model_copy(update={"cols": 1}), Requests([], raw), None, 1.0, Wanted(n, n, [], None))
    pixels = np.stack([drawn.pixels[i] for i in range(n)])
    return pixels, drawn.calibration(model.normaliser, pixels.size)


def training_features(
    config: Config, images: Images, features: Features, rows: np.ndarray, mirrored: bool = False
) -> Tensor:
    """(len(rows), D), kept beside the image cache by fingerprint and network."""
    weights = config.evaluation.weights
    digest = hashlib.sha256(Path(weights).read_bytes()).hexdigest() if weights else "download"
    what = (
        f"{images.fingerprint} {features.name} {digest} {len(rows)} {images.pixels.shape}{' mirrored' if mirrored else ''}"
    )
    path = Path(config.runs_dir) / "cache" / f"features-{hashlib.sha256(what.encode()).hexdigest()[:16]}.pt"
    if not path.exists():
        save_plain(path, {"features": features(images.pixels, config.evaluation.batch_size, rows, mirrored)})
    return load_plain(path, f"remove {path}")["features"]


def fidelity(pixels: np.ndarray, original: np.ndarray, batch_size: int) -> dict[str, float]:
    """PSNR (dB) and SSIM of reconstructions (N, H, W, 3) uint8, averaged over images."""
    sums = {"psnr": 0.0, "ssim": 0.0}
    for start in range(0, len(pixels), batch_size):
        part = slice(start, start + batch_size)
        x, y = (torch.from_numpy(np.ascontiguousarray(p[part])).permute(0, 3, 1, 2).float() for p in (original, pixels))
        psnr = peak_signal_noise_ratio(y, x, data_range=255.0, dim=(1, 2, 3), reduction="sum")
        sums["psnr"] += float(psnr)
        sums["ssim"] += float(structural_similarity_index_measure(y, x, data_range=255.0)) * len(x)
    return {name: total / len(pixels) for name, total in sums.items()}


@dataclass
class Distance:
    """One row of the table: a set of pictures against the training images, in one network's features."""

    what: str
    n: int
    frechet: float
    kid: float
    kid_std: float
    precision: float
    recall: float

    @classmethod
    def of(cls, what: str, found: Tensor, training: Tensor) -> "Distance":
        return cls(what, len(found), frechet(found, training), *kid(found, training), *precision_recall(found, training))

    def cells(self) -> list[str]:
        kid = f"{1000 * self.kid:.2f} ± {1000 * self.kid_std:.2f}"
        return [self.what, f"{self.n:,}", f"{self.frechet:.1f}", kid, f"{self.precision:.3f}", f"{self.recall:.3f}"]


DISTANCE_HEADINGS = ("pictures", "N", "Fréchet distance", "KID · 1000", "precision", "recall")


@dataclass
class Memorisation:
    """How near generated pictures lie to training images, in features."""

    # Generated pictures, those nearest to a training image first, each with its SHOWN_NEIGHBOURS.
    nearest: list[tuple[int, list[int]]]
    median: float
    median_held_out: float
    near: float  # share of generated pictures nearer than all but NEAR of held-out ones: NEAR where nothing is copied

    @classmethod
    def of(cls, found: Tensor, held_out: Tensor, training: Tensor) -> "Memorisation":
        """From features (N, D), (M, D) and (T, D)."""

        def to_training(features: Tensor) -> tuple[Tensor, Tensor]:
            parts = [torch.cdist(part, training).topk(SHOWN_NEIGHBOURS, largest=False) for part in features.split(256)]
            return torch.cat([p.values[:, 0] for p in parts]), torch.cat([p.indices for p in parts])

        distances, neighbours = to_training(found)
        distances_held_out, _ = to_training(held_out)
        near = float((distances < distances_held_out.quantile(NEAR)).float().mean())
        order = distances.argsort().tolist()
        medians = (float(d.median()) for d in (distances, distances_held_out))
        return cls([(i, neighbours[i].tolist()) for i in order], *medians, near)


# Latents


@dataclass
class LatentCard:
    lines: list[str]
    verdict: str


def latent_card(
    vae: VAE, normaliser: Normaliser, originals: np.ndarray, batch_size: int, device: torch.device
) -> LatentCard:
    """What a U-Net is about to learn: each channel's figures, the ceiling that the VAE sets, what clamps would do, and a verdict."""
    n = normaliser
    pixels = torch.from_numpy(np.ascontiguousarray(originals))

    @torch.no_grad()
    def encode() -> tuple[Tensor, float]:
        means, nats = [], []
        for part in pixels.split(batch_size):
            posterior = vae.encode(to_float(part).to(device))
            means.append(n.normalise(posterior.mean))
            nats.append(posterior.kl().mean(dim=(1, 2, 3)))
        return torch.cat(means), float(torch.cat(nats).mean())

    @torch.no_grad()
    def psnr_of(z: Tensor) -> float:
        decoded = [to_uint8(vae.decode(n.denormalise(part))) for part in z.split(batch_size)]
        return fidelity(np.concatenate(decoded), originals, batch_size)["psnr"]

    z, nats = encode()
    ceiling = psnr_of(z)
    lines = ["| channel | mean | std | kurtosis | range |", "|---|---|---|---|---|"]
    for c in range(len(n.std)):
        lines.append(f"| {c} | {n.mean[c]:.3f} | {n.std[c]:.3f} | {n.kurtosis[c]:.2f} | {n.low[c]:.2f} … {n.high[c]:.2f} |")
    lines += [
        "",
        f"{nats:.2f} nats per latent dimension. Reconstruction ceiling: {ceiling:.2f} dB on {len(originals):,} held-out images.",
        "",
    ]
    lines += ["| clamp | values beyond it | reconstruction |", "|---|---|---|"]
    for bound in (1.0, 2.0, 3.0):
        beyond = float((z.abs() > bound).float().mean())
        lines.append(f"| ±{bound:g} | {beyond:.2%} | {psnr_of(z.clamp(-bound, bound)):.2f} dB |")
    low, high = n.range()
    lines.append(f"| range | {float(((z < low) | (z > high)).float().mean()):.2%} | {psnr_of(z.clamp(low, high)):.2f} dB |")
    return LatentCard(lines, verdict(n, ceiling))


def verdict(n: Normaliser, ceiling: float) -> str:
    """GO, or NO-GO with the remedy."""
    dead = [c for c in range(len(n.std)) if n.std[c] < DEAD_STD * float(n.std.max())]
    if dead:
        return f"NO-GO: channels {dead} carry nothing (std below {DEAD_STD:g} of the widest): use fewer vae.latent_channels, or less vae.kl_weight"
    if ceiling < ENOUGH_PSNR:
        return f"NO-GO: the VAE reconstructs at {ceiling:.1f} dB, and no sample can be better: train it longer, or use more vae.latent_channels"
    heavy = [c for c in range(len(n.kurtosis)) if n.kurtosis[c] > TAIL_KURTOSIS]
    if heavy:
        return f"NO-GO: channels {heavy} have heavy tails (kurtosis above {TAIL_KURTOSIS:g}), which few steps miss: use more vae.kl_weight"
    spread = float(n.std.max() / n.std.min())
    if spread > 4:
        return f"GO, with care: the widest channel has {spread:.1f} times the std of the narrowest: encodings.normalise=per_channel evens them"
    return "GO"


# Loss


@torch.no_grad()
def loss_by_snr(
    model: LatentDiffusion, z: Tensor, raw: Raw | None, batch_size: int
) -> list[tuple[int, int, int, float, float]]:
    """A row for each unit of lambda = log(alpha/sigma) from -4.5 to 4.5: (its middle, the first and the last t in it, mean squared
    error of z0_hat, the same over that of the best guess which knows only that z ~ N(0, 1)); none of what the schedule does not span.

    The guess is alpha/(alpha² + sigma²) z_t, its error sigma²/(alpha² + sigma²). At one lambda that ratio is the same whatever the
    schedule and whatever is predicted, and so these can be compared. Noise and timesteps are the same every time.
    """
    schedule, generator = model.schedule, torch.Generator().manual_seed(0)
    net, prediction = model.unet, model.header["prediction"]
    every = torch.arange(schedule.timesteps)
    lambdas, rows = (schedule.alpha(every) / schedule.sigma(every)).log(), []  # falling with t
    for middle in range(4, -5, -1):
        if lambdas[0] < middle + 0.5 or lambdas[-1] > middle - 0.5:
            continue
        inside = every[(lambdas - middle).abs() <= 0.5]
        if not len(inside):  # few timesteps
            continue
        wanted = torch.linspace(middle + 0.5, middle - 0.5, len(z), dtype=torch.float64)
        t = inside[(lambdas[inside] - wanted[:, None]).abs().argmin(dim=1)]
        eps = torch.randn(z.shape, generator=generator).to(z.device)
        alpha, sigma = (f(t).float().to(z.device)[:, None, None, None] for f in (schedule.alpha, schedule.sigma))
        z_t, errors = alpha * z + sigma * eps, []
        for start in range(0, len(z), batch_size):
            part = slice(start, start + batch_size)
            theirs = None if raw is None else tuple(r[part] for r in raw)
            denoise = make_denoiser(
                lambda z_t, t, raw=theirs: net(z_t, t, raw), schedule, prediction, model.device, model.dtype
            )
            errors.append((denoise(z_t[part], t[part].to(z.device)) - z[part]).square().mean(dim=(1, 2, 3)))
        guess = (sigma**2 / (alpha**2 + sigma**2)).flatten()
        error = torch.cat(errors)
        rows.append((middle, int(inside[0]), int(inside[-1]), float(error.mean()), float((error / guess).mean())))
    if not rows:
        raise UserError(f"a schedule of {schedule.timesteps} timesteps has none in any unit of log(alpha/sigma)")
    return rows

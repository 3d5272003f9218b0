"""Sampling and decoding the images of a grid, in batches and by several processes."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch import Tensor
from tqdm import tqdm

from calibration import Moments, calibration
from conditions import Requests
from config import Sampling
from data import to_uint8
from lab import parallel
from lab.pictures import grid, save_png
from latent_diffusion import LatentDiffusion
from models.latents import Normaliser
from sampling import evaluations, sample
from starts import Given, noise_of


@dataclass
class Wanted:
    """What of the images is kept."""

    count: int  # images in all
    in_grid: int  # the first so many go into the grid
    strip: list[int]  # of these the clean estimates on the way
    folder: Path | None  # every image becomes a file here


@dataclass
class Drawn:
    """What came of some of the images, on the CPU."""

    moments: Moments
    clamped: int = 0  # values of clean estimates, of those seen
    seen: int = 0
    out_of_range: int = 0  # values of pixels
    pixels: dict[int, np.ndarray] = field(default_factory=dict)  # image -> (H, W, 3) uint8, for the grid
    frames: dict[int, list[Tensor]] = field(default_factory=dict)  # image -> its z0_hat (C, h, w), from noise to picture

    def calibration(self, normaliser: Normaliser, values: int) -> dict:
        """The figures of the calibration line; `values` is how many values the decoded pictures have in all."""
        return calibration(self.moments, normaliser, self.clamped / max(self.seen, 1), self.out_of_range / values)

    @classmethod
    def joined(cls, parts: "list[Drawn] | None") -> "Drawn | None":
        """Of all processes; None in those that are not to go on."""
        if parts is None:
            return None
        whole = parts[0]
        for part in parts[1:]:
            whole.moments.join(part.moments)
            whole.clamped, whole.seen = whole.clamped + part.clamped, whole.seen + part.seen
            whole.out_of_range += part.out_of_range
            whole.pixels |= part.pixels
            whole.frames |= part.frames
        return whole


def draw(
    model: LatentDiffusion, s: Sampling, requests: Requests, given: Given | None, strength: float, wanted: Wanted
) -> Drawn:
    """Sample and decode the batches of images that fall to this process."""
    drawn, threshold = Drawn(Moments(model.shape[0])), model.threshold(s.x0_clamp)
    options = model.options(s) | {"x0_range": threshold, "strength": strength}
    calls = evaluations(s.sampler, len(model.steps_of(s, strength)))
    framed = set(np.linspace(0, calls - 1, s.strip).round().astype(int).tolist())  # evaluations shown in the strip
    at_once = min(s.batch_size, -(-wanted.count // parallel.size()))  # shared by all processes
    starts = range(0, wanted.count, at_once)[parallel.rank() :: parallel.size()]
    batches = [range(start, min(start + at_once, wanted.count)) for start in starts]
    with ThreadPoolExecutor(4) as writers, tqdm(total=sum(map(len, batches)) * calls, unit="eval", desc="sampling") as bar:
        for indices in batches:

            def progress(evaluation: int, _t: int, z_t: Tensor, z0: Tensor, indices=indices) -> None:
                bar.update(len(z_t))
                if evaluation in framed:
                    for i in set(wanted.strip) & set(indices):
                        drawn.frames.setdefault(i, []).append(z0[i - indices[0]].cpu())

            noise, generators = noise_of(s, indices, model.shape, model.device)
            raw = requests.take([i // s.cols % len(requests) for i in indices]) if requests.raw else None
            if given:
                options |= {"start": given.latent.expand_as(noise), "mask": given.latent_mask}
            denoise = model.denoiser(s, raw)
            z = sample(
                denoise, noise, model.schedule, s.sampler, s.steps, **options, generator=generators, callback=progress
            )
            drawn.moments.add(z)
            images = model.decode(z)
            drawn.out_of_range += int((images.abs() > 1).sum())
            pixels = to_uint8(images)
            if given:
                pixels = given.keep(pixels)
            drawn.pixels |= {i: picture for i, picture in zip(indices, pixels) if i < wanted.in_grid}
            if wanted.folder:
                list(writers.map(lambda i, p: save_png(grid(p[None], 1), wanted.folder / f"{i:06d}.png"), indices, pixels))
    if threshold:
        drawn.clamped, drawn.seen = threshold.counts
    return drawn

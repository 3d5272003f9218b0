"""Samplers: from noise to clean latents, given only denoise(z_t, t) -> z0_hat. Pure functions, no networks, no files.

A sampler walks explicit pairs (t, s) of descending timesteps, s = -1 being clean data: the last pair returns z0_hat
itself, so no noise is left in. What the network predicts, conditioning, guidance and precision live in the closure
that builds `denoise`; thresholding is applied to z0_hat here, and eps is re-derived from it.
"""

import itertools
import math
from typing import Callable, Sequence

import torch
from torch import Tensor

from models.schedules import Schedule, to_z0
from solvers import SAMPLERS, SECOND_ORDER

# z_t (B, C, h, w), t (B,) int64 on the CPU or beside z_t -> z0_hat (B, C, h, w)
Denoise = Callable[[Tensor, Tensor], Tensor]
Generators = torch.Generator | Sequence[torch.Generator] | None


def sample(
    denoise: Denoise,
    noise: Tensor,
    schedule: Schedule,
    sampler: str = "ddim",
    steps: int = 50,
    *,
    eta: float = 0.0,
    order: int = 2,
    variance: str = "posterior",
    spacing: str = "trailing",
    sigma_max: float | None = None,
    clean_steps: int = 0,
    x0_range=None,
    start: Tensor | None = None,
    strength: float = 1.0,
    mask: Tensor | None = None,
    generator: Generators = None,
    callback: Callable[[int, int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Noise (B, C, h, w) ~ N(0, 1) -> clean latents of the same shape, float32.

    steps        of the solver, 1 … T; fewer are made where sigma_max leaves fewer timesteps. One network evaluation each,
                 heun two in all but the last
    sigma_max    start where sigma/alpha is at most this; None: the schedule's own (80 for cosine)
    clean_steps  the last K steps are deterministic
    order        of unipc: 1 … 3
    start        clean latents of noise's shape to begin from: image-to-image, by the last `strength` share of the steps
                 (SDEdit: Meng et al. 2022); strength 1 begins from noise alone
    mask         1 where to draw, 0 where `start` is kept, broadcastable to noise: its estimate is replaced there, and so
                 every solver leads it to `start` through the right noise levels (Song et al. 2021b, App. I.2)
    x0_range     bound on z0_hat: None, a number (±), a pair (low, high) broadcastable to z, or a Threshold
    generator    for samplers that add noise: one, or one per image (then image i is the same in any batch)
    callback     called as callback(i, t, z_t, z0_hat) after network evaluation i = 0, 1, …
    Raises ValueError for a sampler, spacing or variance that does not exist, numbers out of range, and shapes that differ.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler {sampler!r} does not exist; there are: {', '.join(SAMPLERS)}")
    if variance not in ("posterior", "beta"):
        raise ValueError(f"variance {variance!r} does not exist; there are: posterior, beta")
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta is between 0 and 1, not {eta}")
    if order not in (1, 2, 3):
        raise ValueError(f"order is 1, 2 or 3, not {order}")
    if not 0 <= clean_steps <= steps:
        raise ValueError(f"clean_steps is between 0 and steps = {steps}, not {clean_steps}")
    if (mask is not None or strength != 1) and start is None:
        raise ValueError("a mask or a strength needs clean latents to start from")
    if start is not None and start.shape != noise.shape:
        raise ValueError(f"latents to start from are {tuple(start.shape)}, noise is {tuple(noise.shape)}")
    if mask is not None and any(m not in (1, n) for m, n in zip(mask.shape[::-1], noise.shape[::-1])):
        raise ValueError(f"a mask {tuple(mask.shape)} does not broadcast to latents {tuple(noise.shape)}")
    times = timesteps(schedule, steps, spacing, sigma_max, strength)
    pairs = list(zip(times, times[1:] + [-1]))  # (t_i, t_{i+1}), i = 0 … N-1
    threshold = as_threshold(x0_range)
    alpha, sigma = float(schedule.alpha(times[0])), float(schedule.sigma(times[0]))
    # Noise alone has the spread of z_t when z has unit variance: 1 for every schedule but flow.
    z = noise.float() * math.hypot(alpha, sigma)
    if start is not None:
        noised = alpha * start + sigma * noise
        z = noised if strength < 1 else z
        z = z if mask is None else mask * z + (1 - mask) * noised

    evaluations = itertools.count()

    def predict(z: Tensor, t: int) -> Tensor:
        z0 = threshold(denoise(z, torch.full((len(z),), t, dtype=torch.int64)))
        if mask is not None:
            z0 = mask * z0 + (1 - mask) * start
        if callback is not None:
            callback(next(evaluations), t, z, z0)
        return z0

    def draw() -> Tensor:
        return randn(noise.shape, generator, noise.device)

    first_clean = len(pairs) - clean_steps  # steps i >= first_clean add no noise
    return SAMPLERS[sampler](
        predict,
        z,
        schedule,
        pairs,
        draw,
        eta=eta,
        order=order,
        variance=variance,
        first_clean=first_clean,
    )


def evaluations(sampler: str, steps: int) -> int:
    """Network evaluations of that many solver steps, the last of which ends at clean data."""
    return 2 * steps - 1 if sampler == "heun" else steps


# Which timesteps are visited


SPACINGS = ("trailing", "leading", "linspace", "logsnr", "karras")
RHO = 7.0  # Karras et al. 2022, eq. 5


def spacing_for(sampler: str, schedule: Schedule) -> str:
    """What suits a solver, by measurement (results/README.md): the second-order ones are better with even steps in log(alpha/sigma), where
    even steps in t pass over the little noise that narrow directions of the data are decided in; those of first order with even steps
    in t. On `flow` nothing was measured; there too even steps in t."""
    return "logsnr" if sampler in SECOND_ORDER and schedule.name != "flow" else "trailing"


def timesteps(
    schedule: Schedule, steps: int, spacing: str = "trailing", sigma_max: float | None = None, strength: float = 1.0
) -> list[int]:
    """`steps` descending timesteps among those with sigma/alpha <= sigma_max (None: the schedule's own).

    trailing  T-1, then down in equal strides (Lin et al. 2024, Table 2)      leading   0, T//N, …, reversed (DDIM)
    linspace  equal strides with both T-1 and 0 among them
    logsnr    equal strides of log(alpha/sigma) (Lu et al. 2022a, §3.4)       karras    of (sigma/alpha)^(1/7)
    With a `strength` that share of the steps is made, from that share of the timesteps on. There are fewer where few are
    usable, and in the last two spacings
    where neighbours fall on the same timestep. The last cosine steps have sigma/alpha of 80 … 20000; there an error in eps
    is multiplied by up to that much.
    """
    if not 1 <= steps <= schedule.timesteps:
        raise ValueError(f"steps is between 1 and T = {schedule.timesteps}, not {steps}")
    if not 0 < strength <= 1:
        raise ValueError(f"strength is more than 0 and at most 1, not {strength}")
    if spacing not in SPACINGS:
        raise ValueError(f"spacing {spacing!r} does not exist; there are: {', '.join(SPACINGS)}")
    sigma_max = schedule.sigma_max if sigma_max is None else sigma_max
    every = torch.arange(schedule.timesteps)
    levels = schedule.sigma(every) / schedule.alpha(every)  # rising with t
    usable = int((levels <= sigma_max).sum())
    if usable < 1:
        raise ValueError(f"no timestep has sigma/alpha <= sigma_max = {sigma_max}")
    steps = min(steps, usable)
    made = max(1, round(strength * steps))
    begin = made * usable / steps  # so that a strength is the same noise level, whatever the spacing
    i = torch.arange(made, dtype=torch.float64)
    if spacing == "trailing":
        times = (begin - i * begin / made).round().long() - 1
    elif spacing == "leading":
        times = (i.long() * (usable // steps)).flip(0)
    elif spacing == "linspace":
        times = torch.linspace(round(begin) - 1, 0, made, dtype=torch.float64).round().long()
    else:
        high, low = float(levels[round(begin) - 1]), float(levels[0])
        if spacing == "logsnr":
            wanted = torch.linspace(math.log(high), math.log(low), made, dtype=torch.float64)
        else:
            wanted = RHO * torch.linspace(high ** (1 / RHO), low ** (1 / RHO), made, dtype=torch.float64).log()
        times = (levels[:usable].log() - wanted[:, None]).abs().argmin(dim=1).unique_consecutive()
    return times.tolist()


# The closure: everything about a network that a sampler need not know


def make_denoiser(
    net: Callable[[Tensor, Tensor], Tensor],
    schedule: Schedule,
    prediction: str,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Denoise:
    """Wrap net(z_t, t) -> prediction (eps | v | x0 | velocity) as denoise(z_t, t) -> z0_hat; the network runs under autocast to dtype."""
    alphas, sigmas = schedule.tables(device)

    @torch.no_grad()
    def denoise(z_t: Tensor, t: Tensor) -> Tensor:
        t = t.to(z_t.device, non_blocking=True)
        # No weight is used twice in a call, and a CUDA graph must not read casts that are cached and freed outside of it.
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False):
            output = net(z_t.contiguous(memory_format=torch.channels_last), t).float()
        return to_z0(prediction, output, z_t, alphas[t][:, None, None, None], sigmas[t][:, None, None, None])

    return denoise


def guided(
    cond: Denoise,
    both: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    schedule: Schedule,
    scale: float,
    interval: tuple[float, float] | None = None,
    rescale: float = 0.0,
) -> Denoise:
    """Classifier-free guidance (Ho & Salimans 2021): uncond + scale (cond - uncond), on the clean estimates.

    For a given z_t the clean estimate is linear in eps and in v, so this is the same as guiding those.
    cond      denoise(z_t, t) -> z0_hat, all that is evaluated where guidance is off
    both      (z_t, t) -> the conditional and the unconditional z0_hat, from one batch of two halves (or two networks)
    scale     1 is off, 0 unconditional
    interval  guide only where sigma/alpha lies between these two (Kynkäänniemi et al. 2024)
    rescale   0 … 1: draw the spread of each image back to the conditional estimate's (Lin et al. 2024, eq. 15 and 16)
    """
    if not 0 <= rescale <= 1:
        raise ValueError(f"rescale is between 0 and 1, not {rescale}")
    if interval is not None and not 0 <= interval[0] < interval[1]:
        raise ValueError(f"the interval of guidance goes from a lower to a higher sigma/alpha, not {tuple(interval)}")

    def is_off(t: Tensor) -> bool:
        if scale == 1 or interval is None:
            return scale == 1
        now = int(t[0])
        return not interval[0] <= float(schedule.sigma(now) / schedule.alpha(now)) <= interval[1]

    def denoise(z_t: Tensor, t: Tensor) -> Tensor:
        if is_off(t):
            return cond(z_t, t)
        z0_cond, z0_uncond = both(z_t, t)
        z0 = z0_uncond + scale * (z0_cond - z0_uncond)
        if rescale:
            spread = z0_cond.std(dim=(1, 2, 3), keepdim=True) / z0.std(dim=(1, 2, 3), keepdim=True)
            z0 = rescale * spread * z0 + (1 - rescale) * z0
        return z0

    return denoise


# Thresholding and noise


class Threshold:
    """Clamp z0_hat to [low, high] (two numbers, or two tensors on z0's device, broadcastable to it) and count what was clamped, without a host sync.

    Never divides by the bound: dynamic thresholding as in Imagen shrinks latents.
    """

    def __init__(self, low, high):
        self.low, self.high = low, high
        self._clamped, self._seen = 0, 0

    def __call__(self, z0: Tensor) -> Tensor:
        bounded = torch.clamp(z0, self.low, self.high)
        self._clamped = self._clamped + (bounded != z0).sum()
        self._seen += z0.numel()
        return bounded

    @property
    def counts(self) -> tuple[int, int]:
        """How many values were clamped, and how many were seen."""
        return int(self._clamped), self._seen


def as_threshold(x0_range) -> Callable[[Tensor], Tensor]:
    """None, a number (±), a pair (low, high) or a Threshold -> a function that bounds z0_hat."""
    if x0_range is None:
        return lambda z0: z0
    if isinstance(x0_range, Threshold):
        return x0_range
    if isinstance(x0_range, (int, float)):
        return Threshold(-float(x0_range), float(x0_range))
    return Threshold(*x0_range)


def image_generators(seed: int, indices: Sequence[int], device) -> list[torch.Generator]:
    """One generator per image, from seed and index alone, whatever the batch or the number of processes."""
    # 2654435761 (Knuth) spreads consecutive seeds, so that image 1 of seed 0 is not image 0 of seed 1.
    return [torch.Generator(device).manual_seed((seed * 2654435761 + i) % 2**63) for i in indices]


def randn(shape, generator: Generators, device) -> Tensor:
    """Standard normal noise (B, C, h, w); with a sequence of generators image i draws from generator i."""
    if generator is None or isinstance(generator, torch.Generator):
        return torch.randn(shape, generator=generator, device=device)
    if len(generator) != shape[0]:
        raise ValueError(f"{len(generator)} generators for {shape[0]} images")
    noise = torch.stack([torch.randn(shape[1:], generator=g, device=g.device) for g in generator])
    if torch.device(device).type == "cuda" and not noise.is_cuda:
        noise = noise.pin_memory()  # or the copy would wait for all that the device has still to do
    return noise.to(device, non_blocking=True)


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Spherical interpolation between two noises (C, h, w): 0 is a, 1 is b, and what lies between is as long as they are
    (Shoemake 1985), which a straight line's middle is not."""
    cosine = (a * b).sum() / (a.norm() * b.norm())
    angle = torch.arccos(cosine.clamp(-1, 1))
    if float(angle) < 1e-4:
        return torch.lerp(a, b, share)
    return (torch.sin((1 - share) * angle) * a + torch.sin(share * angle) * b) / torch.sin(angle)

"""Samplers: from noise to clean latents, given only denoise(z_t, t) -> z0_hat. Pure functions, no networks, no files.

A sampler walks explicit pairs (t, s) of descending timesteps, s = -1 being clean data: the last pair returns z0_hat
itself, so no noise is left in. What the network predicts, conditioning, guidance and precision live in the closure
that builds `denoise`; thresholding is applied to z0_hat here, and eps is re-derived from it.
"""

from typing import Callable, Sequence

import torch
from torch import Tensor

from models.schedules import Schedule, to_z0

Denoise = Callable[[Tensor, Tensor], Tensor]  # z_t (B, C, h, w), t (B,) int64 -> z0_hat (B, C, h, w)
Generators = torch.Generator | Sequence[torch.Generator] | None


def sample(
    denoise: Denoise,
    noise: Tensor,
    schedule: Schedule,
    sampler: str = "ddim",
    steps: int = 50,
    *,
    eta: float = 0.0,
    variance: str = "posterior",
    spacing: str = "trailing",
    sigma_max: float | None = None,
    clean_steps: int = 0,
    x0_range=None,
    generator: Generators = None,
    callback: Callable[[int, int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Noise (B, C, h, w) ~ N(0, 1) -> clean latents of the same shape, float32.

    steps        network evaluations, 1 … T; fewer are made where sigma_max leaves fewer timesteps
    sigma_max    start where sigma/alpha is at most this; None: the schedule's own (80 for cosine)
    clean_steps  the last K steps are deterministic
    x0_range     bound on z0_hat: None, a number (±), a pair (low, high) broadcastable to z, or a Threshold
    generator    for samplers that add noise: one, or one per image (then image i is the same in any batch)
    callback     called as callback(i, t, z_t, z0_hat) for i = 0 … N-1
    Raises ValueError for a sampler, spacing or variance that does not exist, and numbers out of range.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler {sampler!r} does not exist; there are: {', '.join(SAMPLERS)}")
    if variance not in ("posterior", "beta"):
        raise ValueError(f"variance {variance!r} does not exist; there are: posterior, beta")
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta is between 0 and 1, not {eta}")
    if not 0 <= clean_steps <= steps:
        raise ValueError(f"clean_steps is between 0 and steps = {steps}, not {clean_steps}")
    times = timesteps(schedule, steps, spacing, sigma_max)
    pairs = list(zip(times, times[1:] + [-1]))  # (t_i, t_{i+1}), i = 0 … N-1
    threshold = as_threshold(x0_range)

    def predict(i: int, z: Tensor) -> Tensor:
        t = pairs[i][0]
        z0 = threshold(denoise(z, torch.full((len(z),), t, dtype=torch.int64, device=z.device)))
        if callback is not None:
            callback(i, t, z, z0)
        return z0

    def draw() -> Tensor:
        return randn(noise.shape, generator, noise.device)

    first_clean = len(pairs) - clean_steps  # steps i >= first_clean add no noise
    return SAMPLERS[sampler](
        predict, noise.float(), schedule, pairs, draw, eta=eta, variance=variance, first_clean=first_clean
    )


# Samplers: (predict(i, z_t) -> z0_hat, z, schedule, pairs, draw() -> noise, options) -> z0


def sample_ddim(predict, z, schedule, pairs, draw, *, eta, first_clean, **_):
    """DDIM (Song et al. 2021, eq. 12 and 16): eta 0 is deterministic, eta 1 has the posterior's variance."""
    for i, (t, s) in enumerate(pairs):  # i = 0 … N-1
        z0 = predict(i, z)
        noise_std = eta * posterior_std(schedule, t, s) if i < first_clean else 0.0
        z = step_from(z, z0, schedule, t, s, noise_std)
        if noise_std > 0:
            z = z + noise_std * draw()
    return z


def sample_ancestral(predict, z, schedule, pairs, draw, *, variance, first_clean, **_):
    """Ancestral sampling (Ho et al. 2020, Algorithm 2) over any pairs of timesteps.

    The mean is the posterior's, eq. 7, which is DDIM's with eta = 1. The variance of a step is the posterior's or the
    larger beta (§3.2); the clean steps are DDIM's with eta = 0.
    """
    for i, (t, s) in enumerate(pairs):  # i = 0 … N-1
        z0 = predict(i, z)
        if i >= first_clean:
            z = step_from(z, z0, schedule, t, s, 0.0)
            continue
        z = step_from(z, z0, schedule, t, s, posterior_std(schedule, t, s))
        noise_std = posterior_std(schedule, t, s) if variance == "posterior" else beta_std(schedule, t, s)
        if s >= 0:
            z = z + noise_std * draw()
    return z


SAMPLERS: dict[str, Callable] = {"ancestral": sample_ancestral, "ddim": sample_ddim}


# One step


def step_from(z_t: Tensor, z0: Tensor, schedule: Schedule, t: int, s: int, noise_std: float) -> Tensor:
    """The mean of z_s given z_t and z0: alpha_s z0 + sqrt(sigma_s² - noise_std²) eps, eps re-derived from z0 (DDIM eq. 12)."""
    if s < 0:
        return z0  # clean data: exactly the estimate
    alpha_t, sigma_t = float(schedule.alpha(t)), float(schedule.sigma(t))
    alpha_s, sigma_s = float(schedule.alpha(s)), float(schedule.sigma(s))
    eps = (z_t - alpha_t * z0) / sigma_t
    return alpha_s * z0 + max(sigma_s**2 - noise_std**2, 0.0) ** 0.5 * eps


def beta_std(schedule: Schedule, t: int, s: int) -> float:
    """Std of q(z_t | z_s): sigma²_{t|s} = sigma_t² - (alpha_t/alpha_s)² sigma_s²; with s = t-1 this is sqrt(beta_t)."""
    ratio = float(schedule.alpha(t) / schedule.alpha(s))
    return max(float(schedule.sigma(t)) ** 2 - (ratio * float(schedule.sigma(s))) ** 2, 0.0) ** 0.5


def posterior_std(schedule: Schedule, t: int, s: int) -> float:
    """Std of q(z_s | z_t, z0): sigma_s/sigma_t · sigma_{t|s} (Ho et al. 2020, eq. 7; DDIM eq. 16)."""
    return float(schedule.sigma(s) / schedule.sigma(t)) * beta_std(schedule, t, s)


# Which timesteps are visited


def timesteps(schedule: Schedule, steps: int, spacing: str = "trailing", sigma_max: float | None = None) -> list[int]:
    """`steps` descending timesteps among those with sigma/alpha <= sigma_max (fewer if there are fewer; None: the schedule's own).

    trailing  T-1, then down in equal strides (Lin et al. 2024, Table 2)      leading   0, T//N, …, reversed (DDIM)
    linspace  equal strides with both T-1 and 0 among them
    The last cosine steps have sigma/alpha of 80 … 20000; there an error in eps is multiplied by up to that much.
    """
    if not 1 <= steps <= schedule.timesteps:
        raise ValueError(f"steps is between 1 and T = {schedule.timesteps}, not {steps}")
    sigma_max = schedule.sigma_max if sigma_max is None else sigma_max
    every = torch.arange(schedule.timesteps)
    usable = int((schedule.sigma(every) / schedule.alpha(every) <= sigma_max).sum())
    if usable < 1:
        raise ValueError(f"no timestep has sigma/alpha <= sigma_max = {sigma_max}")
    steps = min(steps, usable)
    i = torch.arange(steps, dtype=torch.float64)
    if spacing == "trailing":
        return (usable - i * usable / steps).round().long().sub(1).tolist()
    if spacing == "leading":
        return (i.long() * (usable // steps)).flip(0).tolist()
    if spacing == "linspace":
        return torch.linspace(usable - 1, 0, steps, dtype=torch.float64).round().long().tolist()
    raise ValueError(f"spacing {spacing!r} does not exist; there are: trailing, leading, linspace")


# The closure: everything about a network that a sampler need not know


def make_denoiser(
    net: Callable[[Tensor, Tensor], Tensor],
    schedule: Schedule,
    prediction: str,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Denoise:
    """Wrap net(z_t, t) -> prediction (eps | v | x0) as denoise(z_t, t) -> z0_hat; the network runs under autocast to dtype."""
    alphas, sigmas = schedule.tables(device)

    @torch.no_grad()
    def denoise(z_t: Tensor, t: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            output = net(z_t.contiguous(memory_format=torch.channels_last), t).float()
        return to_z0(prediction, output, z_t, alphas[t][:, None, None, None], sigmas[t][:, None, None, None])

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
    def share(self) -> float:
        """Share of the values seen so far that were clamped, 0 … 1."""
        return float(self._clamped) / max(self._seen, 1)


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
    return torch.stack([torch.randn(shape[1:], generator=g, device=g.device) for g in generator]).to(device)

"""Sampling: noise -> clean latents, given only denoise(z_t, t) -> z0_hat. Pure functions: no networks, no files.

`denoise` hides prediction type, conditioning, guidance and precision; make_denoiser() and guided() build it. sample() clamps
z0_hat, and the solvers compute eps from the clamped z0_hat.
"""

import itertools
import math
from typing import Callable, Sequence

import torch
from torch import Tensor

from models.schedules import Schedule, to_z0
from solvers import SAMPLERS, SECOND_ORDER, SolverOptions

# z_t (B, C, h, w), t (B,) int64 on any device -> z0_hat (B, C, h, w)
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
    clean_finish_steps: int = 0,
    x0_range=None,
    init_latents: Tensor | None = None,
    strength: float = 1.0,
    mask: Tensor | None = None,
    generator: Generators = None,
    callback: Callable[[int, int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Noise (B, C, h, w) ~ N(0, 1) -> clean latents of the same shape, float32.

    steps         number of solver steps, 1 … T; timesteps() may return fewer. Each step evaluates the network once; heun
                  evaluates it twice, except in the last step
    spacing       timestep spacing, see timesteps()
    eta           ddim: 0 adds no noise, 1 adds noise with the posterior variance
    order         unipc: order of the solver, 1 … 3
    variance      ancestral: variance of the added noise, "posterior" or "beta"
    sigma_max     start at the noisiest timestep with sigma/alpha <= sigma_max; None: the schedule's default
    clean_finish_steps  number of last steps in which stochastic samplers add no noise
    x0_range      limits of z0_hat: None, a number c for [-c, c], a pair (low, high) broadcastable to z, or a Threshold
    init_latents  clean latents to start image-to-image from, in the shape of noise (SDEdit, Meng et al. 2022)
    strength      fraction of the steps to run from noised init_latents; 1 starts from pure noise
    mask          inpainting, broadcastable to noise: 1 to generate, 0 to keep init_latents. Where it is 0, every z0_hat is
                  replaced by init_latents, to which the solver adds noise of the current level (Song et al. 2021b, App. I.2)
    generator     source of the noise that stochastic samplers add: one generator, or one per image. With one per image,
                  an image does not depend on the other images of its batch
    callback      called as callback(i, t, z_t, z0_hat) after network evaluation i = 0, 1, …
    Raises ValueError for unknown names, values out of range and shapes that do not match.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)} (got {sampler!r})")
    if variance not in ("posterior", "beta"):
        raise ValueError(f"variance must be posterior or beta (got {variance!r})")
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta must be in [0, 1] (got {eta})")
    if order not in (1, 2, 3):
        raise ValueError(f"order must be 1, 2 or 3 (got {order})")
    if not 0 <= clean_finish_steps <= steps:
        raise ValueError(f"clean_finish_steps must be between 0 and steps = {steps} (got {clean_finish_steps})")
    _check_init(noise, init_latents, strength, mask)
    visited = timesteps(schedule, steps, spacing, sigma_max, strength)
    pairs = list(zip(visited, visited[1:] + [-1]))  # (t_i, t_{i+1}), i = 0 … N-1
    threshold = as_threshold(x0_range)
    alpha, sigma = float(schedule.alpha(visited[0])), float(schedule.sigma(visited[0]))
    # Scale the noise to the std of z_t for unit-variance z. The factor is 1 for every schedule except flow.
    z = noise.float() * math.hypot(alpha, sigma)
    if init_latents is not None:
        noised_init = alpha * init_latents + sigma * noise
        z = noised_init if strength < 1 else z
        z = z if mask is None else mask * z + (1 - mask) * noised_init

    evaluation = itertools.count()

    def predict(z: Tensor, t: int) -> Tensor:
        z0 = threshold(denoise(z, torch.full((len(z),), t, dtype=torch.int64)))
        if mask is not None:
            z0 = mask * z0 + (1 - mask) * init_latents
        if callback is not None:
            callback(next(evaluation), t, z, z0)
        return z0

    options = SolverOptions(
        randn=lambda: randn(noise.shape, generator, noise.device),
        num_noisy_steps=len(pairs) - clean_finish_steps,
        eta=eta,
        order=order,
        variance=variance,
    )
    return SAMPLERS[sampler](predict, z, schedule, pairs, options)


def _check_init(noise: Tensor, init_latents: Tensor | None, strength: float, mask: Tensor | None) -> None:
    if (mask is not None or strength != 1) and init_latents is None:
        raise ValueError("mask and strength < 1 need init_latents")
    if init_latents is not None and init_latents.shape != noise.shape:
        raise ValueError(
            f"init_latents must have the shape of noise, {tuple(noise.shape)} (got {tuple(init_latents.shape)})"
        )
    if mask is not None and any(m not in (1, n) for m, n in zip(mask.shape[::-1], noise.shape[::-1])):
        raise ValueError(f"mask must be broadcastable to latents {tuple(noise.shape)} (got {tuple(mask.shape)})")


def num_evaluations(sampler: str, steps: int) -> int:
    """Number of network evaluations in `steps` solver steps. heun needs two per step, but one in the last step."""
    return 2 * steps - 1 if sampler == "heun" else steps


# Timestep spacing


SPACINGS = ("trailing", "leading", "linspace", "logsnr", "karras")
RHO = 7.0  # Karras et al. 2022, eq. 5


def default_spacing(sampler: str, schedule: Schedule) -> str:
    """Return the spacing with the best measured results (docs/sampling.md): logsnr for second-order solvers, else trailing.

    Low noise levels determine the low-variance directions of the data. logsnr visits these levels; equal strides in t skip
    them. Spacings were not measured for the flow schedule, whose default is trailing.
    """
    return "logsnr" if sampler in SECOND_ORDER and schedule.name != "flow" else "trailing"


def timesteps(
    schedule: Schedule, steps: int, spacing: str = "trailing", sigma_max: float | None = None, strength: float = 1.0
) -> list[int]:
    """Return `steps` descending timesteps with sigma/alpha <= sigma_max (None: the schedule's default).

    trailing  T-1, then down in equal strides (Lin et al. 2024, Table 2)
    leading   floor(i T/N), i = N-1 … 0 (Song et al. 2021, App. D.2); starts one stride below T, not at pure noise
    linspace  equal strides that include T-1 and 0
    logsnr    uniform in log(alpha/sigma) (Lu et al. 2022a, §3.4)
    karras    uniform in (sigma/alpha)^(1/7)

    strength < 1 (image-to-image): start at this fraction of the timesteps and run this fraction of the steps.
    Fewer than `steps` timesteps are returned if sigma_max leaves fewer, or if logsnr or karras rounds two to the same one.
    sigma_max matters for the cosine schedule: z0_hat multiplies an error in eps by sigma/alpha, which is 20,000 at T-1.
    """
    if not 1 <= steps <= schedule.timesteps:
        raise ValueError(f"steps must be between 1 and T = {schedule.timesteps} (got {steps})")
    if not 0 < strength <= 1:
        raise ValueError(f"strength must be in (0, 1] (got {strength})")
    if spacing not in SPACINGS:
        raise ValueError(f"spacing must be one of {', '.join(SPACINGS)} (got {spacing!r})")
    sigma_max = schedule.sigma_max if sigma_max is None else sigma_max
    t = torch.arange(schedule.timesteps)
    noise_levels = schedule.sigma(t) / schedule.alpha(t)  # ascending in t
    usable = int((noise_levels <= sigma_max).sum())
    if usable < 1:
        raise ValueError(
            f"sigma_max = {sigma_max} excludes every timestep; sigma/alpha starts at {float(noise_levels[0]):.3g}"
        )
    steps = min(steps, usable)
    n = max(1, round(strength * steps))
    start = n * usable / steps  # sampling starts at timestep round(start) - 1; "leading" may start at a lower one
    i = torch.arange(n, dtype=torch.float64)
    if spacing == "trailing":
        visited = (start - i * start / n).round().long() - 1
    elif spacing == "leading":
        # Unlike diffusers, do not round the stride: 500 steps over 990 timesteps would have stride 1 and start at t = 499.
        visited = (i.long() * usable // steps).flip(0)
    elif spacing == "linspace":
        visited = torch.linspace(round(start) - 1, 0, n, dtype=torch.float64).round().long()
    else:
        high, low = float(noise_levels[round(start) - 1]), float(noise_levels[0])
        if spacing == "logsnr":
            log_levels = torch.linspace(math.log(high), math.log(low), n, dtype=torch.float64)
        else:
            log_levels = RHO * torch.linspace(high ** (1 / RHO), low ** (1 / RHO), n, dtype=torch.float64).log()
        visited = (noise_levels[:usable].log() - log_levels[:, None]).abs().argmin(dim=1).unique_consecutive()
    return visited.tolist()


# Denoisers: adapters from a network to denoise(z_t, t) -> z0_hat


def make_denoiser(
    net: Callable[[Tensor, Tensor], Tensor],
    schedule: Schedule,
    prediction: str,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Denoise:
    """Wrap net(z_t, t) -> prediction (eps, v, x0 or velocity) as denoise(z_t, t) -> z0_hat, with autocast to dtype."""

    @torch.no_grad()
    def denoise(z_t: Tensor, t: Tensor) -> Tensor:
        t = t.to(z_t.device, non_blocking=True)
        # Autocast frees its cached weight copies when the context ends, but a CUDA graph would read them later. Disabling
        # the cache costs nothing, because each weight is used once per call.
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False):
            output = net(z_t.contiguous(memory_format=torch.channels_last), t).float()
        return to_z0(prediction, output, z_t, *schedule.coefficients(t))

    return denoise


def guided(
    denoise_cond: Denoise,
    denoise_both: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    schedule: Schedule,
    scale: float,
    interval: tuple[float, float] | None = None,
    rescale: float = 0.0,
) -> Denoise:
    """Classifier-free guidance (Ho & Salimans 2021) of clean estimates: uncond + scale · (cond - uncond).

    For a given z_t, the clean estimate is linear in eps and in v. So guiding z0_hat is the same as guiding eps or v.

    denoise_cond  (z_t, t) -> conditional z0_hat, used where guidance is off
    denoise_both  (z_t, t) -> (conditional z0_hat, unconditional z0_hat), for example from one pass on a doubled batch
    scale         1 is off, 0 is unconditional
    interval      guide only while sigma/alpha is in this range (Kynkäänniemi et al. 2024)
    rescale       0: keep the guided estimate; 1: scale it per image to the std of the conditional estimate; values between
                  0 and 1 interpolate (Lin et al. 2024, eq. 15 and 16)
    """
    if not 0 <= rescale <= 1:
        raise ValueError(f"rescale must be in [0, 1] (got {rescale})")
    if interval is not None and not 0 <= interval[0] < interval[1]:
        raise ValueError(f"interval must be (low, high) with 0 <= low < high (got {tuple(interval)})")

    def is_off(t: Tensor) -> bool:
        if scale == 1 or interval is None:
            return scale == 1
        step = int(t[0])
        return not interval[0] <= float(schedule.sigma(step) / schedule.alpha(step)) <= interval[1]

    def denoise(z_t: Tensor, t: Tensor) -> Tensor:
        if is_off(t):
            return denoise_cond(z_t, t)
        z0_cond, z0_uncond = denoise_both(z_t, t)
        z0 = z0_uncond + scale * (z0_cond - z0_uncond)
        if rescale:
            std_ratio = z0_cond.std(dim=(1, 2, 3), keepdim=True) / z0.std(dim=(1, 2, 3), keepdim=True)
            z0 = rescale * std_ratio * z0 + (1 - rescale) * z0
        return z0

    return denoise


# Thresholding and noise


class Threshold:
    """Clamp z0_hat to [low, high] and count the clamped values without a host sync.

    low and high are numbers, or tensors broadcastable to z0_hat on its device. Values inside the range do not change;
    dynamic thresholding (Imagen) would divide all values by the bound and so shrink the latents.
    """

    def __init__(self, low, high):
        self.low, self.high = low, high
        self._num_clamped, self._num_values = 0, 0

    def __call__(self, z0: Tensor) -> Tensor:
        clamped = torch.clamp(z0, self.low, self.high)
        self._num_clamped = self._num_clamped + (clamped != z0).sum()
        self._num_values += z0.numel()
        return clamped

    @property
    def counts(self) -> tuple[int, int]:
        """(number of clamped values, number of values)."""
        return int(self._num_clamped), self._num_values


def as_threshold(x0_range) -> Callable[[Tensor], Tensor]:
    """Return a function that clamps z0_hat to x0_range: None, a number c for [-c, c], a pair (low, high) or a Threshold."""
    if x0_range is None:
        return lambda z0: z0
    if isinstance(x0_range, Threshold):
        return x0_range
    if isinstance(x0_range, (int, float)):
        return Threshold(-float(x0_range), float(x0_range))
    return Threshold(*x0_range)


def image_generators(seed: int, indices: Sequence[int], device) -> list[torch.Generator]:
    """Return one generator per image, seeded only by `seed` and the image index, for any batch size and process count."""
    # The factor (Knuth's hash multiplier) separates consecutive seeds: image 1 of seed 0 must differ from image 0 of seed 1.
    return [torch.Generator(device).manual_seed((seed * 2654435761 + i) % 2**63) for i in indices]


def randn(shape, generator: Generators, device) -> Tensor:
    """Standard normal noise (B, C, h, w). With a sequence of generators, image i uses generator i."""
    if generator is None or isinstance(generator, torch.Generator):
        return torch.randn(shape, generator=generator, device=device)
    if len(generator) != shape[0]:
        raise ValueError(f"the number of generators must equal the batch size {shape[0]} (got {len(generator)})")
    noise = torch.stack([torch.randn(shape[1:], generator=g, device=g.device) for g in generator])
    if torch.device(device).type == "cuda" and not noise.is_cuda:
        noise = noise.pin_memory()  # only copies from pinned memory are asynchronous
    return noise.to(device, non_blocking=True)


def slerp(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """Spherical interpolation of two noise tensors (C, h, w): weight 0 is a, 1 is b (Shoemake 1985).

    The result has about the norm of Gaussian noise; linear interpolation would reduce the norm.
    """
    cosine = (a * b).sum() / (a.norm() * b.norm())
    angle = torch.arccos(cosine.clamp(-1, 1))
    if float(angle) < 1e-4:
        return torch.lerp(a, b, weight)
    return (torch.sin((1 - weight) * angle) * a + torch.sin(weight * angle) * b) / torch.sin(angle)

"""Noise schedules: how much signal and how much noise there is at timestep t.

    images   float in [-1, 1], NCHW; uint8 on disk
    z        clean scaled latent, about unit variance;  z_t = alpha_t z + sigma_t eps,  eps ~ N(0, 1)
    t        0 … T-1, larger is noisier; t = -1 stands for clean data (alpha = 1, sigma = 0)
    alphas_cumprod[t] = alpha_t² ("alpha bar" in the papers);  snr(t) = alpha_t² / sigma_t²
    sigma_t² = 1 - alpha_t² (variance preserving), but for `flow`, where sigma_t = 1 - alpha_t

Tables are float64 and are cast at the edge, where they meet a network's tensors.
"""

import math

import torch
from torch import Tensor

SCHEDULES = ("linear", "cosine", "scaled_linear", "flow")
MAX_BETA = 0.999  # Nichol & Dhariwal 2021, §3.2: keeps the last cosine steps from becoming singular
# Sampling starts where sigma/alpha is at most this. Beyond, the cosine schedule goes to 20000 and flow to infinity, and an
# error in eps is multiplied by as much.
COSINE_SIGMA_MAX, FLOW_SIGMA_MAX = 80.0, 1000.0


class Schedule:
    """Tables of alpha and sigma (T,) and what follows from them. `t` is an int or an integer tensor, -1 meaning clean data.

    `sigma_max` is the largest sigma/alpha at which sampling should start.
    """

    def __init__(self, name: str, alphas: Tensor, sigmas: Tensor, sigma_max: float = math.inf):
        self.name, self.sigma_max = name, sigma_max
        self.timesteps = len(alphas)  # T
        self.alphas_cumprod = alphas.double() ** 2  # (T,)
        # One more entry at the end, so that index -1 is clean data.
        self._alpha = torch.cat([alphas.double(), torch.ones(1, dtype=torch.float64)])
        self._sigma = torch.cat([sigmas.double(), torch.zeros(1, dtype=torch.float64)])

    @classmethod
    def from_betas(cls, name: str, betas: Tensor, sigma_max: float = math.inf) -> "Schedule":
        """Variance preserving, alphas_cumprod = prod (1 - beta) (Ho et al. 2020, eq. 4)."""
        alphas_cumprod = torch.cumprod(1 - betas.double(), dim=0)
        return cls(name, alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt(), sigma_max)

    def alpha(self, t) -> Tensor:
        """Signal level alpha_t, float64, of the shape of t."""
        return self._look_up(self._alpha, t)

    def sigma(self, t) -> Tensor:
        """Noise level sigma_t, float64, of the shape of t."""
        return self._look_up(self._sigma, t)

    def snr(self, t) -> Tensor:
        """Signal-to-noise ratio alpha_t² / sigma_t², float64; infinite at t = -1."""
        return (self.alpha(t) / self.sigma(t)) ** 2

    def tables(self, device) -> tuple[Tensor, Tensor]:
        """alpha and sigma of t = 0 … T-1 as float32 (T,) on a device, for look-ups by tensors of timesteps there."""
        return self._alpha[:-1].float().to(device), self._sigma[:-1].float().to(device)

    def bins(self, count: int = 10) -> list[tuple[int, int]]:
        """Equal ranges of timesteps as (first, last): where a loss is reported apart."""
        edges = [b * self.timesteps // count for b in range(count + 1)]
        return [(low, max(low, high - 1)) for low, high in zip(edges, edges[1:])]

    def _look_up(self, table: Tensor, t) -> Tensor:
        if not isinstance(t, Tensor) and not -1 <= t < self.timesteps:
            raise IndexError(f"timestep {t} is outside -1 … {self.timesteps - 1}")
        return table[t]


def make_schedule(name: str, timesteps: int = 1000) -> Schedule:
    """Build a schedule by name. Raises ValueError for a name that does not exist or timesteps < 2.

    linear         beta from 1e-4 to 0.02 (Ho et al. 2020, §4), rescaled by 1000/T for other T
    scaled_linear  sqrt(beta) linear from sqrt(0.00085) to sqrt(0.012) (Rombach et al. 2022, LDM)
    cosine         alpha bar = cos²((t/T + s)/(1 + s) · pi/2), s = 0.008 (Nichol & Dhariwal 2021, eq. 17)
    flow           alpha = 1 - (t+1)/T, sigma = (t+1)/T: rectified flow (Liu et al. 2023; Esser et al. 2024, eq. 13)
    """
    if timesteps < 2:
        raise ValueError(f"a schedule has at least 2 timesteps, not {timesteps}")
    if name == "linear":
        scale = 1000 / timesteps
        betas = torch.linspace(scale * 1e-4, scale * 0.02, timesteps, dtype=torch.float64)
        return Schedule.from_betas(name, betas.clamp(max=MAX_BETA))
    if name == "scaled_linear":
        scale = math.sqrt(1000 / timesteps)
        roots = torch.linspace(scale * math.sqrt(0.00085), scale * math.sqrt(0.012), timesteps, dtype=torch.float64)
        return Schedule.from_betas(name, (roots**2).clamp(max=MAX_BETA))
    if name == "cosine":
        s = 0.008
        edges = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps  # t/T at the T+1 edges
        alpha_bar = torch.cos((edges + s) / (1 + s) * math.pi / 2) ** 2
        return Schedule.from_betas(name, (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=MAX_BETA), COSINE_SIGMA_MAX)
    if name == "flow":
        sigmas = torch.arange(1, timesteps + 1, dtype=torch.float64) / timesteps
        return Schedule(name, 1 - sigmas, sigmas, FLOW_SIGMA_MAX)
    raise ValueError(f"schedule {name!r} does not exist; there are: {', '.join(SCHEDULES)}")


# What a network predicts, and back. z0, eps, v and the velocity are views of the same thing once z_t is known.
# alpha and sigma are broadcastable to z_t.

PREDICTIONS = ("eps", "v", "x0", "velocity")


def target(kind: str, z: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """What the network is asked for: eps; v = alpha eps - sigma z (Salimans & Ho 2022); z itself (x0); or the velocity
    eps - z of rectified flow."""
    if kind == "eps":
        return eps
    if kind == "v":
        return alpha * eps - sigma * z
    if kind == "velocity":
        return eps - z
    if kind == "x0":
        return z
    raise _unknown(kind)


def to_z0(kind: str, prediction: Tensor, z_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The clean estimate z0_hat from a prediction, by z_t = alpha z + sigma eps."""
    if kind == "eps":
        return (z_t - sigma * prediction) / alpha
    if kind == "v":
        return (alpha * z_t - sigma * prediction) / (alpha**2 + sigma**2)  # variance preserving: the divisor is 1
    if kind == "velocity":
        return (z_t - sigma * prediction) / (alpha + sigma)
    if kind == "x0":
        return prediction
    raise _unknown(kind)


def min_snr_weight(kind: str, alpha: Tensor, sigma: Tensor, gamma: float) -> Tensor:
    """Min-SNR-gamma loss weights (Hang et al. 2023, §3.4): min(snr, gamma) on the squared error of z0, carried over to the
    squared error of what is predicted. eps: min(snr, gamma)/snr; v: min(snr, gamma)/(snr + 1)."""
    on_z0 = (alpha**2 / sigma**2).clamp(max=gamma)
    if kind == "eps":
        return (gamma * sigma**2 / alpha**2).clamp(max=1.0)  # min(snr, gamma)/snr, and 1 where alpha is 0
    if kind == "v":
        return on_z0 * sigma**2 / (alpha**2 + sigma**2) ** 2
    if kind == "velocity":
        return on_z0 * sigma**2 / (alpha + sigma) ** 2
    if kind == "x0":
        return on_z0
    raise _unknown(kind)


def _unknown(kind: str) -> ValueError:
    return ValueError(f"prediction {kind!r} does not exist; there are: {', '.join(PREDICTIONS)}")

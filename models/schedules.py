"""Noise schedules: signal level alpha_t and noise level sigma_t of each timestep.

    z_t = alpha_t z + sigma_t eps    z: clean scaled latent, about unit variance; eps ~ N(0, 1)
    t = 0 … T-1                      larger is noisier; t = -1 is clean data
    alphas_cumprod[t] = alpha_t²     "alpha bar" in the papers
    sigma_t² = 1 - alpha_t²          for variance-preserving schedules; flow has sigma_t = 1 - alpha_t

Tables are float64; `coefficients` returns float32.
"""

import math

import torch
from torch import Tensor

SCHEDULES = ("linear", "cosine", "scaled_linear", "flow")
MAX_BETA = 0.999  # Nichol & Dhariwal 2021, §3.2: avoids a singularity in the last cosine steps
# Default upper limits of sigma/alpha in sampling, which starts at the noisiest timestep within the limit. z0_hat multiplies
# errors in eps by sigma/alpha, which reaches 20,000 for cosine and infinity for flow.
COSINE_SIGMA_MAX, FLOW_SIGMA_MAX = 70.0, 1000.0


class Schedule:
    """Tables of alpha and sigma, (T,) each. sigma_max is the default limit of sigma/alpha at the start of sampling."""

    def __init__(self, name: str, alphas: Tensor, sigmas: Tensor, sigma_max: float = math.inf):
        self.name, self.sigma_max = name, sigma_max
        self.timesteps = len(alphas)  # T
        self.alphas_cumprod = alphas.double() ** 2  # (T,)
        # (T + 1,): clean data comes last, at index -1.
        self._alpha = torch.cat([alphas.double(), torch.ones(1, dtype=torch.float64)])
        self._sigma = torch.cat([sigmas.double(), torch.zeros(1, dtype=torch.float64)])
        self._float32_tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @classmethod
    def from_betas(cls, name: str, betas: Tensor, sigma_max: float = math.inf) -> "Schedule":
        """Variance-preserving schedule with alphas_cumprod = cumprod(1 - beta) (Ho et al. 2020, eq. 4)."""
        alphas_cumprod = torch.cumprod(1 - betas.double(), dim=0)
        return cls(name, alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt(), sigma_max)

    def alpha(self, t: int | Tensor) -> Tensor:
        """Signal level alpha_t, float64, in the shape of t."""
        return self._look_up(self._alpha, t)

    def sigma(self, t: int | Tensor) -> Tensor:
        """Noise level sigma_t, float64, in the shape of t."""
        return self._look_up(self._sigma, t)

    def snr(self, t: int | Tensor) -> Tensor:
        """Signal-to-noise ratio alpha_t² / sigma_t², float64; infinite at t = -1."""
        return (self.alpha(t) / self.sigma(t)) ** 2

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t for timesteps (B,): float32 (B, 1, 1, 1) on t's device."""
        if t.device not in self._float32_tables:  # cached, because a copy to the device in every step would force a sync
            self._float32_tables[t.device] = self._alpha.float().to(t.device), self._sigma.float().to(t.device)
        alpha, sigma = (table[t][:, None, None, None] for table in self._float32_tables[t.device])
        return alpha, sigma

    def add_noise(self, z: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return z_t for z and eps (B, C, h, w) and timesteps (B,)."""
        alpha, sigma = self.coefficients(t)
        return alpha * z + sigma * eps

    def bins(self, count: int = 10) -> list[tuple[int, int]]:
        """Split the timesteps into equal ranges (first, last), inclusive, to report losses by noise level."""
        edges = [b * self.timesteps // count for b in range(count + 1)]
        return [(low, max(low, high - 1)) for low, high in zip(edges, edges[1:])]

    def _look_up(self, table: Tensor, t: int | Tensor) -> Tensor:
        if not isinstance(t, Tensor) and not -1 <= t < self.timesteps:
            raise IndexError(f"t must be in -1 … {self.timesteps - 1} (got {t})")
        return table[t]


def make_schedule(name: str, timesteps: int = 1000) -> Schedule:
    """Build a schedule by name.

    linear         beta from 1e-4 to 0.02, multiplied by 1000/T (Ho et al. 2020, §4, with T = 1000)
    scaled_linear  sqrt(beta) from sqrt(0.00085) to sqrt(0.012), beta multiplied by 1000/T (Rombach et al. 2022, LDM)
    cosine         alpha bar = f((t+1)/T) / f(0), f(x) = cos²((x + s)/(1 + s) · pi/2), s = 0.008, beta at most 0.999
                   (Nichol & Dhariwal 2021, eq. 17)
    flow           alpha = 1 - (t+1)/T, sigma = (t+1)/T: rectified flow (Liu et al. 2023; Esser et al. 2024, eq. 13)
    """
    if timesteps < 2:
        raise ValueError(f"timesteps must be at least 2 (got {timesteps})")
    if name == "linear":
        scale = 1000 / timesteps
        betas = torch.linspace(scale * 1e-4, scale * 0.02, timesteps, dtype=torch.float64)
        return Schedule.from_betas(name, betas.clamp(max=MAX_BETA))
    if name == "scaled_linear":
        scale = math.sqrt(1000 / timesteps)
        sqrt_betas = torch.linspace(scale * math.sqrt(0.00085), scale * math.sqrt(0.012), timesteps, dtype=torch.float64)
        return Schedule.from_betas(name, (sqrt_betas**2).clamp(max=MAX_BETA))
    if name == "cosine":
        s = 0.008
        edges = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps  # t/T for t = 0 … T
        alpha_bar = torch.cos((edges + s) / (1 + s) * math.pi / 2) ** 2
        return Schedule.from_betas(name, (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=MAX_BETA), COSINE_SIGMA_MAX)
    if name == "flow":
        sigmas = torch.arange(1, timesteps + 1, dtype=torch.float64) / timesteps
        return Schedule(name, 1 - sigmas, sigmas, FLOW_SIGMA_MAX)
    raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)} (got {name!r})")


# Prediction types. Given z_t, any of them can be converted to any other. alpha and sigma are broadcastable to z_t.

PREDICTIONS = ("eps", "v", "x0", "velocity")


def target(kind: str, z: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Regression target of the network."""
    if kind == "eps":
        return eps
    if kind == "v":  # Salimans & Ho 2022
        return alpha * eps - sigma * z
    if kind == "velocity":  # rectified flow (Liu et al. 2023)
        return eps - z
    if kind == "x0":
        return z
    raise _unknown(kind)


def to_z0(kind: str, prediction: Tensor, z_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Convert a prediction to the clean estimate z0_hat."""
    if kind == "eps":
        return (z_t - sigma * prediction) / alpha
    if kind == "v":
        return (alpha * z_t - sigma * prediction) / (alpha**2 + sigma**2)  # divisor: 1 if variance preserving
    if kind == "velocity":
        return (z_t - sigma * prediction) / (alpha + sigma)
    if kind == "x0":
        return prediction
    raise _unknown(kind)


def min_snr_weight(kind: str, alpha: Tensor, sigma: Tensor, gamma: float) -> Tensor:
    """Min-SNR-gamma loss weight (Hang et al. 2023, §3.4).

    The weight of the squared error of z0_hat is min(snr, gamma). It is converted to a weight for the squared error of the
    prediction `kind`.
    """
    x0_weight = (alpha**2 / sigma**2).clamp(max=gamma)
    if kind == "eps":
        return (gamma * sigma**2 / alpha**2).clamp(max=1.0)  # min(snr, gamma)/snr; 1 if alpha = 0
    if kind == "v":
        return x0_weight * sigma**2 / (alpha**2 + sigma**2) ** 2
    if kind == "velocity":
        return x0_weight * sigma**2 / (alpha + sigma) ** 2
    if kind == "x0":
        return x0_weight
    raise _unknown(kind)


def _unknown(kind: str) -> ValueError:
    return ValueError(f"prediction must be one of {', '.join(PREDICTIONS)} (got {kind!r})")

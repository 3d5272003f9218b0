"""Solvers for the reverse process: from noise z to clean latents z0.

    solver(predict, z, schedule, pairs, options) -> z0

`predict(z_t, t) -> z0_hat` is the network with conditioning, guidance and thresholding applied. `pairs` lists one pair
(t, s) per step, which goes from timestep t to the less noisy s. The last pair has s = -1, which stands for clean data.
`sampling.sample` builds the arguments. Each solver follows the notation of its paper.
"""

import math
from dataclasses import dataclass
from typing import Callable

import torch
from torch import Tensor

from models.schedules import Schedule


@dataclass(frozen=True)
class SolverOptions:
    """Options of all solvers; a solver ignores the options of other solvers."""

    randn: Callable[[], Tensor]  # returns new standard normal noise in the shape of z
    num_noisy_steps: int  # only the first num_noisy_steps steps may add noise
    eta: float = 0.0  # ddim: 0 adds no noise, 1 adds noise with the posterior variance
    order: int = 2  # unipc: order of the solver, 1 to 3
    variance: str = "posterior"  # ancestral: variance of the added noise, "posterior" or "beta"


def sample_ddim(predict, z, schedule, pairs, options: SolverOptions):
    """DDIM (Song et al. 2021, eq. 12 and 16)."""
    for i, (t, s) in enumerate(pairs):  # i = 0 … N-1
        z0 = predict(z, t)
        noise_std = options.eta * posterior_std(schedule, t, s) if i < options.num_noisy_steps else 0.0
        z = ddim_mean(z, z0, schedule, t, s, noise_std)
        if noise_std > 0:
            z = z + noise_std * options.randn()
    return z


def sample_ancestral(predict, z, schedule, pairs, options: SolverOptions):
    """Ancestral sampling (Ho et al. 2020, Algorithm 2) over arbitrary timestep pairs.

    The mean of a step is the posterior mean (eq. 7), which equals the mean of DDIM with eta = 1. The variance is the
    posterior variance or beta (§3.2). The steps after num_noisy_steps are DDIM steps with eta = 0.
    """
    for i, (t, s) in enumerate(pairs):  # i = 0 … N-1
        z0 = predict(z, t)
        if i >= options.num_noisy_steps:
            z = ddim_mean(z, z0, schedule, t, s, 0.0)
            continue
        noise_std = posterior_std(schedule, t, s)
        z = ddim_mean(z, z0, schedule, t, s, noise_std)
        noise_std = noise_std if options.variance == "posterior" else beta_std(schedule, t, s)
        if s >= 0:
            z = z + noise_std * options.randn()
    return z


def sample_euler(predict, z, schedule, pairs, options: SolverOptions):
    """Euler's method on the probability-flow ODE in x = z/alpha and sigma' = sigma/alpha: dx/dsigma' = (x - z0)/sigma'
    (Karras et al. 2022, eq. 1 and 3). Equals DDIM with eta = 0 in exact arithmetic."""
    for t, s in pairs:
        z = euler_step(z, predict(z, t), schedule, t, s)
    return z


def sample_heun(predict, z, schedule, pairs, options: SolverOptions):
    """Heun's method on the ODE of sample_euler (Karras et al. 2022, Algorithm 1): two network evaluations per
    step, one in the last step."""
    for t, s in pairs:  # t_i, t_{i+1}
        z0 = predict(z, t)
        z_euler = euler_step(z, z0, schedule, t, s)
        if s < 0:
            return z_euler
        d = derivative(z, z0, schedule, t)  # d_i
        d_next = derivative(z_euler, predict(z_euler, s), schedule, s)  # d'_i
        x = z / float(schedule.alpha(t)) + (noise_level(schedule, s) - noise_level(schedule, t)) * (d + d_next) / 2
        z = float(schedule.alpha(s)) * x
    return z


def sample_dpmpp_2m(predict, z, schedule, pairs, options: SolverOptions):
    """DPM-Solver++(2M) (Lu et al. 2022b, Algorithm 2): second order from the last two clean estimates."""
    previous = None  # (z0, h) of the previous step
    for t, s in pairs:
        z0 = predict(z, t)
        if s < 0:
            return z0
        h = half_log_snr(schedule, s) - half_log_snr(schedule, t)
        d = extrapolate(z0, previous, h)  # D_i
        z = float(schedule.sigma(s) / schedule.sigma(t)) * z - float(schedule.alpha(s)) * math.expm1(-h) * d
        previous = z0, h
    return z


def sample_dpmpp_2m_sde(predict, z, schedule, pairs, options: SolverOptions):
    """SDE-DPM-Solver++(2M) (Lu et al. 2022b, eq. 19, second order by the midpoint rule). Only the first
    num_noisy_steps steps add noise; later steps are those of DPM-Solver++(2M)."""
    previous = None  # (z0, h) of the previous step
    for i, (t, s) in enumerate(pairs):  # i = 0 … N-1
        z0 = predict(z, t)
        if s < 0:
            return z0
        h = half_log_snr(schedule, s) - half_log_snr(schedule, t)
        d = extrapolate(z0, previous, h)  # D_i
        sigma_ratio, alpha = float(schedule.sigma(s) / schedule.sigma(t)), float(schedule.alpha(s))
        if i < options.num_noisy_steps:
            z = sigma_ratio * math.exp(-h) * z - alpha * math.expm1(-2 * h) * d
            z = z + float(schedule.sigma(s)) * math.sqrt(-math.expm1(-2 * h)) * options.randn()
        else:
            z = sigma_ratio * z - alpha * math.expm1(-h) * d
        previous = z0, h
    return z


def sample_unipc(predict, z, schedule, pairs, options: SolverOptions):
    """UniPC (Zhao et al. 2023, Algorithms 5 to 8, data prediction, B(h) = e^h - 1).

    Each network evaluation is used twice: to correct the previous step (UniC) and to predict the next one (UniP). So the
    corrector costs no extra evaluations. The first and last steps have a lower order.
    """
    history: list[tuple[float, Tensor]] = []  # (lambda_i, z0_i), oldest first, at most `order` entries
    z_last = None  # z at the timestep of the newest entry in history
    for i, (t, s) in enumerate(pairs):  # i = 0 … N-1
        z0 = predict(z, t)
        if s < 0:
            return z0
        if i > 0:
            z = unipc_step(z_last, schedule, (pairs[i - 1][0], t), history, z0)
        history = [*history, (half_log_snr(schedule, t), z0)][-options.order :]
        z_last = z
        # Lower the order towards the end, because the last steps are long in log(alpha/sigma).
        max_order = len(pairs) - i if pairs[-1][1] < 0 else options.order
        z = unipc_step(z_last, schedule, (t, s), history[-max_order:])
    return z


SAMPLERS: dict[str, Callable] = {
    "ancestral": sample_ancestral,
    "ddim": sample_ddim,
    "euler": sample_euler,
    "heun": sample_heun,
    "dpmpp_2m": sample_dpmpp_2m,
    "dpmpp_2m_sde": sample_dpmpp_2m_sde,
    "unipc": sample_unipc,
}
SECOND_ORDER = ("heun", "dpmpp_2m", "dpmpp_2m_sde", "unipc")


# Single steps


def ddim_mean(z_t: Tensor, z0: Tensor, schedule: Schedule, t: int, s: int, noise_std: float) -> Tensor:
    """Mean of z_s given z_t and z0: alpha_s · z0 + sqrt(sigma_s² - noise_std²) · eps (DDIM eq. 12)."""
    if s < 0:
        return z0  # the last step ends exactly at the clean estimate
    alpha_t, sigma_t = float(schedule.alpha(t)), float(schedule.sigma(t))
    alpha_s, sigma_s = float(schedule.alpha(s)), float(schedule.sigma(s))
    eps = (z_t - alpha_t * z0) / sigma_t
    return alpha_s * z0 + max(sigma_s**2 - noise_std**2, 0.0) ** 0.5 * eps


def beta_std(schedule: Schedule, t: int, s: int) -> float:
    """Std of q(z_t | z_s): sigma²_{t|s} = sigma_t² - (alpha_t/alpha_s)² · sigma_s². For s = t-1 this is sqrt(beta_t)."""
    ratio = float(schedule.alpha(t) / schedule.alpha(s))
    return max(float(schedule.sigma(t)) ** 2 - (ratio * float(schedule.sigma(s))) ** 2, 0.0) ** 0.5


def posterior_std(schedule: Schedule, t: int, s: int) -> float:
    """Std of q(z_s | z_t, z0): sigma_s/sigma_t · sigma_{t|s} (Ho et al. 2020, eq. 7; DDIM eq. 16)."""
    return float(schedule.sigma(s) / schedule.sigma(t)) * beta_std(schedule, t, s)


def noise_level(schedule: Schedule, t: int) -> float:
    """sigma_t/alpha_t, the "sigma" of Karras et al. 2022."""
    return float(schedule.sigma(t) / schedule.alpha(t))


def half_log_snr(schedule: Schedule, t: int) -> float:
    """lambda_t = log(alpha_t/sigma_t), half of the log-SNR (Lu et al. 2022a, §3.1)."""
    return -math.log(noise_level(schedule, t))


def derivative(z: Tensor, z0: Tensor, schedule: Schedule, t: int) -> Tensor:
    """dx/dsigma' of the ODE at x = z/alpha, sigma' = sigma/alpha: (x - z0)/sigma' (Karras et al. 2022, eq. 3)."""
    return (z / float(schedule.alpha(t)) - z0) / noise_level(schedule, t)


def euler_step(z: Tensor, z0: Tensor, schedule: Schedule, t: int, s: int) -> Tensor:
    """Euler step from z_t (B, C, h, w) to z_s with the clean estimate z0 (Karras et al. 2022, Algorithm 1, line 7)."""
    if s < 0:
        return z0
    x = z / float(schedule.alpha(t)) + (noise_level(schedule, s) - noise_level(schedule, t)) * derivative(z, z0, schedule, t)
    return float(schedule.alpha(s)) * x


def extrapolate(z0: Tensor, previous: tuple[Tensor, float] | None, h: float) -> Tensor:
    """Extrapolate clean estimates: D_i = (1 + 1/(2r)) · z0_i - 1/(2r) · z0_{i-1} with r = h_{i-1}/h_i, and D_0 = z0_0.

    h_i is the length of step i in lambda (Lu et al. 2022b, Algorithm 2).
    """
    if previous is None:
        return z0
    z0_previous, h_previous = previous
    half = h / (2 * h_previous)
    return (1 + half) * z0 - half * z0_previous


def unipc_step(
    z: Tensor,
    schedule: Schedule,
    pair: tuple[int, int],
    history: list[tuple[float, Tensor]],
    z0_s: Tensor | None = None,
) -> Tensor:
    """Step from z_t to z_s with the clean estimates in `history`, the newest of which is at t.

    Without z0_s, this is the predictor UniP. With the clean estimate z0_s at s, this is the corrector UniC.

    Let h = lambda_s - lambda_t. Besides the estimate at t, there are p estimates z0_k (k = 1 … p) at lambda_k, with
    r_k = (lambda_k - lambda_t) / h. The slope (z0_k - z0_t) / r_k has the weight a_k. The weights solve the p equations
        sum_k a_k · r_k^(n-1) = -h · n! · phi_{n+1}(-h) / B(-h),  n = 1 … p
    with phi_1(x) = (e^x - 1) / x and phi_{n+1}(x) = (phi_n(x) - 1/n!) / x
    (Zhao et al. 2023, eq. 5 and 10, in the data-prediction form of App. A).
    """
    t, s = pair
    lambda_t, z0 = history[-1]
    h = half_log_snr(schedule, s) - lambda_t
    # (r_k, slope) of every estimate except the one at t
    nodes = [((node - lambda_t) / h, (estimate - z0) * (h / (node - lambda_t))) for node, estimate in reversed(history[:-1])]
    if z0_s is not None:
        nodes.append((1.0, z0_s - z0))
    z = float(schedule.sigma(s) / schedule.sigma(t)) * z - float(schedule.alpha(s)) * math.expm1(-h) * z0
    if not nodes:
        return z
    b_h = math.expm1(-h)  # B(-h), because data prediction replaces h by -h
    phi, rhs = math.expm1(-h) / -h - 1, []
    for n in range(1, len(nodes) + 1):
        rhs.append(phi * math.factorial(n) / b_h)
        phi = phi / -h - 1 / math.factorial(n + 1)
    if len(nodes) == 1:
        weights = [0.5]  # limit of the solution for h -> 0
    else:
        r = torch.tensor([r for r, _ in nodes], dtype=torch.float64)
        vandermonde = r[None] ** torch.arange(len(r))[:, None]
        weights = torch.linalg.solve(vandermonde, torch.tensor(rhs, dtype=torch.float64)).tolist()
    return z - float(schedule.alpha(s)) * b_h * sum(w * slope for w, (_, slope) in zip(weights, nodes))

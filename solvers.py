"""The solvers: each walks explicit pairs (t, s) of descending timesteps, s = -1 being clean data, and returns z0_hat.

    solver(predict, z, schedule, pairs, draw, *, eta, order, variance, first_clean) -> z0

predict(z_t, t) -> z0_hat is the network seen through conditioning, guidance and thresholding; draw() gives fresh noise of
z's shape. Steps i >= first_clean add no noise. `sampling.sample` builds all of it; each function reads like its paper.
"""

import math
from typing import Callable

import torch
from torch import Tensor

from models.schedules import Schedule


def sample_ddim(predict, z, schedule, pairs, draw, *, eta, first_clean, **_):
    """DDIM (Song et al. 2021, eq. 12 and 16): eta 0 is deterministic, eta 1 has the posterior's variance."""
    for i, (t, s) in enumerate(pairs):  # i = 0 … N-1
        z0 = predict(z, t)
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
        z0 = predict(z, t)
        if i >= first_clean:
            z = step_from(z, z0, schedule, t, s, 0.0)
            continue
        noise_std = posterior_std(schedule, t, s)
        z = step_from(z, z0, schedule, t, s, noise_std)
        noise_std = noise_std if variance == "posterior" else beta_std(schedule, t, s)
        if s >= 0:
            z = z + noise_std * draw()
    return z


def sample_euler(predict, z, schedule, pairs, draw, **_):
    """Euler's method on the probability-flow ODE in x = z/alpha over noise = sigma/alpha: dx/dnoise = (x - z0)/noise
    (Karras et al. 2022, eq. 1 and 3). In exact arithmetic this is DDIM with eta = 0."""
    for t, s in pairs:
        z = euler_step(z, predict(z, t), schedule, t, s)
    return z


def sample_heun(predict, z, schedule, pairs, draw, **_):
    """Heun's method on the same ODE (Karras et al. 2022, Algorithm 1 without churn): two evaluations a step, the last one."""
    for t, s in pairs:  # t_i, t_{i+1}
        z0 = predict(z, t)
        proposal = euler_step(z, z0, schedule, t, s)
        if s < 0:
            return proposal
        slope = derivative(z, z0, schedule, t)  # d_i
        slope_there = derivative(proposal, predict(proposal, s), schedule, s)  # d'_i
        x = z / float(schedule.alpha(t)) + (noise_level(schedule, s) - noise_level(schedule, t)) * (slope + slope_there) / 2
        z = float(schedule.alpha(s)) * x
    return z


def sample_dpmpp_2m(predict, z, schedule, pairs, draw, **_):
    """DPM-Solver++(2M) (Lu et al. 2022b, Algorithm 2): second order from the two last estimates, one evaluation a step."""
    before = None  # z0 at the step before, and its h
    for t, s in pairs:
        z0 = predict(z, t)
        if s < 0:
            return z0
        h = log_snr(schedule, s) - log_snr(schedule, t)
        mixed = extrapolate(z0, before, h)  # D_i
        z = float(schedule.sigma(s) / schedule.sigma(t)) * z - float(schedule.alpha(s)) * math.expm1(-h) * mixed
        before = z0, h
    return z


def sample_dpmpp_2m_sde(predict, z, schedule, pairs, draw, *, first_clean, **_):
    """SDE-DPM-Solver++(2M) (Lu et al. 2022b, eq. 19, second order by the midpoint): noise in every step but the clean ones."""
    before = None
    for i, (t, s) in enumerate(pairs):  # i = 0 … N-1
        z0 = predict(z, t)
        if s < 0:
            return z0
        h = log_snr(schedule, s) - log_snr(schedule, t)
        mixed, ratio, alpha = (
            extrapolate(z0, before, h),
            float(schedule.sigma(s) / schedule.sigma(t)),
            float(schedule.alpha(s)),
        )
        if i < first_clean:
            z = ratio * math.exp(-h) * z - alpha * math.expm1(-2 * h) * mixed
            z = z + float(schedule.sigma(s)) * math.sqrt(-math.expm1(-2 * h)) * draw()
        else:
            z = ratio * z - alpha * math.expm1(-h) * mixed
        before = z0, h
    return z


def sample_unipc(predict, z, schedule, pairs, draw, *, order, **_):
    """UniPC (Zhao et al. 2023, Algorithms 5 to 8, data prediction, B(h) = e^h - 1): each evaluation corrects the step before
    (UniC) and predicts the next (UniP), which costs nothing more. The first steps are of lower order."""
    history: list[tuple[float, Tensor]] = []  # (lambda_i, z0_i), oldest first, at most `order` of them
    start = None  # z at the timestep that history ends with
    for i, (t, s) in enumerate(pairs):  # i = 0 … N-1
        z0 = predict(z, t)
        if s < 0:
            return z0
        if i > 0:
            z = unipc_step(start, schedule, pairs[i - 1][0], t, history, z0)
        history = [*history, (log_snr(schedule, t), z0)][-order:]
        start = z
        # Towards clean data the order falls as it rose: those last steps are long in log-SNR.
        at_most = len(pairs) - i if pairs[-1][1] < 0 else order
        z = unipc_step(start, schedule, t, s, history[-at_most:])
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


def noise_level(schedule: Schedule, t: int) -> float:
    """sigma/alpha: Karras et al.'s sigma."""
    return float(schedule.sigma(t) / schedule.alpha(t))


def log_snr(schedule: Schedule, t: int) -> float:
    """lambda_t = log(alpha_t/sigma_t), half the log of the signal-to-noise ratio (Lu et al. 2022a, §3.1)."""
    return -math.log(noise_level(schedule, t))


def derivative(z: Tensor, z0: Tensor, schedule: Schedule, t: int) -> Tensor:
    """dx/dnoise of x = z/alpha: (x - z0)/noise (Karras et al. 2022, eq. 3)."""
    return (z / float(schedule.alpha(t)) - z0) / noise_level(schedule, t)


def euler_step(z: Tensor, z0: Tensor, schedule: Schedule, t: int, s: int) -> Tensor:
    """z_t (B, C, h, w) and the estimate z0 -> z_s, along the slope at t (Karras et al. 2022, Algorithm 1, line 7)."""
    if s < 0:
        return z0
    x = z / float(schedule.alpha(t)) + (noise_level(schedule, s) - noise_level(schedule, t)) * derivative(z, z0, schedule, t)
    return float(schedule.alpha(s)) * x


def extrapolate(z0: Tensor, before: tuple[Tensor, float] | None, h: float) -> Tensor:
    """D_i = (1 + 1/2r) z0_i - 1/2r z0_{i-1}, r = h_{i-1}/h_i; the first step has nothing before it."""
    if before is None:
        return z0
    z0_before, h_before = before
    half = h / (2 * h_before)
    return (1 + half) * z0 - half * z0_before


def unipc_step(
    z: Tensor, schedule: Schedule, t: int, s: int, history: list[tuple[float, Tensor]], z0_there: Tensor | None = None
) -> Tensor:
    """From z_t to z_s by the estimates at t and before it; with the estimate at s too it is the corrector.

    With p nodes r_k of the other estimates, in units of h from t, the weights a_k solve sum_k a_k r_k^(n-1) = phi_n
    for n = 1 … p (Zhao et al. 2023, eq. 5 and 10, in the data form of App. A).
    """
    lambda_t, z0 = history[-1]
    h = log_snr(schedule, s) - lambda_t
    nodes = [((node - lambda_t) / h, (estimate - z0) * (h / (node - lambda_t))) for node, estimate in reversed(history[:-1])]
    if z0_there is not None:
        nodes.append((1.0, z0_there - z0))
    z = float(schedule.sigma(s) / schedule.sigma(t)) * z - float(schedule.alpha(s)) * math.expm1(-h) * z0
    if not nodes:
        return z
    base = math.expm1(-h)  # B(h) of the data form
    phi, right = math.expm1(-h) / -h - 1, []
    for n in range(1, len(nodes) + 1):
        right.append(phi * math.factorial(n) / base)
        phi = phi / -h - 1 / math.factorial(n + 1)
    r = torch.tensor([r for r, _ in nodes], dtype=torch.float64)
    # One node of a predictor or a corrector: 1/2, the value that the equation tends to for small h.
    weights = (
        [0.5]
        if len(nodes) == 1
        else torch.linalg.solve(r[None] ** torch.arange(len(r))[:, None], torch.tensor(right, dtype=torch.float64)).tolist()
    )
    return z - float(schedule.alpha(s)) * base * sum(w * slope for w, (_, slope) in zip(weights, nodes))

"""ODE and SDE solvers: order of convergence against closed forms, and single steps against diffusers."""

import math

import pytest
import torch

from models.schedules import make_schedule
from sampling import make_denoiser, sample
from solvers import SAMPLERS, SolverOptions

FINE = make_schedule("linear", 100_000)  # rounding to timesteps must not affect the order
LINEAR = make_schedule("linear")
STD, MEAN = 0.5, 0.3


def exact_denoiser(schedule):
    """E[z | z_t] for data N(MEAN, STD²)."""

    def denoise(z_t, t):
        alpha, sigma = float(schedule.alpha(int(t))), float(schedule.sigma(int(t)))
        return MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (z_t - alpha * MEAN)

    return denoise


def walk(name, steps, low=-2.5, high=3.0, **options):
    """Solve in float64 with steps uniform in lambda = log(alpha/sigma). Return (result, exact solution)."""
    t = torch.arange(FINE.timesteps)
    lambdas = (FINE.alpha(t) / FINE.sigma(t)).log()  # decreasing in t
    visited = [int((lambdas - v).abs().argmin()) for v in torch.linspace(low, high, steps + 1).tolist()]
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)
    # For a Gaussian, the probability-flow ODE conserves (z_t - mean(t)) / std(t).
    first, last = visited[0], visited[-1]
    mean = lambda t: float(FINE.alpha(t)) * MEAN
    std = lambda t: (float(FINE.alpha(t)) ** 2 * STD**2 + float(FINE.sigma(t)) ** 2) ** 0.5
    exact = mean(last) + std(last) / std(first) * (z - mean(first))
    options = SolverOptions(randn=lambda: torch.zeros_like(z), num_noisy_steps=0, **options)
    pairs = list(zip(visited, visited[1:]))
    return SAMPLERS[name](exact_denoiser(FINE), z, FINE, pairs, options), exact


@pytest.mark.parametrize("name, order, options", [
    ("ddim", 1, {}), ("euler", 1, {}), ("heun", 2, {}), ("dpmpp_2m", 2, {}), ("unipc", 2, dict(order=2)), ("unipc", 3, dict(order=3)),
])  # fmt: skip
def test_order_of_convergence(name, order, options):
    """UniPC also corrects each step, so it reaches at least its nominal order."""
    errors = [float((a - b).abs().max()) for a, b in (walk(name, steps, **options) for steps in (20, 40, 80))]
    orders = [math.log2(errors[i] / errors[i + 1]) for i in range(2)]
    if name == "unipc":
        assert min(orders) > order - 0.3, (errors, orders)
    else:
        assert all(abs(o - order) < 0.3 for o in orders), (errors, orders)


def test_sde_solver_without_noisy_steps_is_the_ode_solver():
    assert torch.equal(walk("dpmpp_2m_sde", 10)[0], walk("dpmpp_2m", 10)[0])


@pytest.mark.parametrize("steps, tolerance", [(50, 0.06), (200, 0.02)])
def test_sde_samples_have_mean_and_std_of_the_data(steps, tolerance):
    noise = torch.randn(4000, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    denoise = lambda z, t: exact_denoiser(LINEAR)(z, t[0])
    z = sample(denoise, noise, LINEAR, "dpmpp_2m_sde", steps, generator=torch.Generator().manual_seed(1))
    assert float(z.mean()) == pytest.approx(MEAN, abs=0.02) and float(z.std()) == pytest.approx(STD, rel=tolerance)


def mixture_denoiser(schedule, center=1.0, std=0.3):
    """E[z | z_t] by Bayes' theorem for N(-c, s²) and N(c, s²) with equal weights."""

    def denoise(z_t, t):
        alpha, sigma = float(schedule.alpha(int(t[0]))), float(schedule.sigma(int(t[0])))
        var = alpha**2 * std**2 + sigma**2
        p_right = torch.sigmoid(2 * alpha * center * z_t / var)  # posterior of the component at +c
        mean = lambda c: c + alpha * std**2 / var * (z_t - alpha * c)
        return p_right * mean(center) + (1 - p_right) * mean(-center)

    return denoise


@pytest.mark.parametrize(
    "name, steps", [("ddim", 200), ("heun", 50), ("dpmpp_2m", 50), ("unipc", 50), ("ancestral", 1000), ("dpmpp_2m_sde", 100)]
)
def test_mixture_of_two_gaussians(name, steps):
    """Samples have equal weights, means ±1 and std 0.3 within each component."""
    noise = torch.randn(2000, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    z = sample(mixture_denoiser(LINEAR), noise, LINEAR, name, steps, generator=torch.Generator().manual_seed(1))
    right = z[z > 0]
    assert len(right) / z.numel() == pytest.approx(0.5, abs=0.03)
    assert float(right.mean()) == pytest.approx(1.0, abs=0.03) and float(right.std()) == pytest.approx(0.3, rel=0.08)


@pytest.mark.parametrize("steps, std", [(10, 0.95), (20, 1.00), (50, 1.00)])
def test_dpmpp_2m_keeps_the_std_of_a_unit_gaussian(steps, std):
    noise = torch.randn(2000, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    denoise = lambda z, t: float(LINEAR.alpha(int(t[0]))) * z
    assert float(sample(denoise, noise, LINEAR, "dpmpp_2m", steps).std()) == pytest.approx(std, abs=0.02)


# Step by step against diffusers, with the same denoiser and timesteps. Its tables are float32.


def record(denoise, trajectory):
    """Append every z_t that the denoiser receives to `trajectory`."""

    def recording(z_t, t):
        trajectory.append(z_t.clone())
        return denoise(z_t, t)

    return recording


@pytest.mark.parametrize("name, order, scheduler_name, options", [
    ("ddim", 2, "DDIMScheduler", dict(clip_sample=False, set_alpha_to_one=True)),
    ("dpmpp_2m", 2, "DPMSolverMultistepScheduler", dict(algorithm_type="dpmsolver++", solver_order=2, final_sigmas_type="zero")),
    ("unipc", 2, "UniPCMultistepScheduler", dict(solver_order=2, final_sigmas_type="zero")),
    ("unipc", 3, "UniPCMultistepScheduler", dict(solver_order=3, final_sigmas_type="zero")),
])  # fmt: skip
def test_agrees_with_diffusers(name, order, scheduler_name, options):
    diffusers = pytest.importorskip("diffusers")
    scheduler = getattr(diffusers, scheduler_name)(
        1000, beta_schedule="linear", timestep_spacing="trailing", prediction_type="sample", **options
    )
    scheduler.set_timesteps(20)
    denoise = mixture_denoiser(LINEAR)
    z = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    final = sample(record(denoise, trajectory := []), z, LINEAR, name, 20, order=order)
    for i, t in enumerate(scheduler.timesteps):
        torch.testing.assert_close(z, trajectory[i], rtol=1e-4, atol=1e-4)
        z = scheduler.step(denoise(z, t[None]), t, z).prev_sample
    torch.testing.assert_close(z, final, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name, scheduler_name", [("euler", "EulerDiscreteScheduler"), ("heun", "HeunDiscreteScheduler")])
def test_agrees_with_diffusers_in_x_space(name, scheduler_name):
    """These schedulers solve for x = z/alpha. They start from our noise/alpha instead of their noise · sigma_max."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = getattr(diffusers, scheduler_name)(
        1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear", prediction_type="epsilon", timestep_spacing="trailing"
    )
    scheduler.set_timesteps(20)
    denoise = mixture_denoiser(LINEAR)
    z = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    final = sample(record(denoise, trajectory := []), z, LINEAR, name, 20)
    x = z / float(LINEAR.alpha(999))
    for i, t in enumerate(scheduler.timesteps):
        alpha, sigma = float(LINEAR.alpha(int(t))), float(LINEAR.sigma(int(t)))
        torch.testing.assert_close(alpha * x, trajectory[i], rtol=2e-4, atol=2e-4)
        eps = (alpha * x - alpha * denoise(alpha * x, t[None].long())) / sigma
        x = scheduler.step(eps, t, x).prev_sample
    torch.testing.assert_close(x, final, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name, options, prediction, absolute_sum", [
    ("ancestral", dict(steps=1000), "eps", 258.9606),
    ("ancestral", dict(steps=1000), "v", 202.0296),
    ("ddim", dict(steps=10, spacing="leading"), "eps", 172.0067),
    ("ddim", dict(steps=10, spacing="leading"), "v", 52.5302),
])  # fmt: skip
def test_golden_sums_of_diffusers(name, options, prediction, absolute_sum):
    """The full-loop tests in diffusers' tests/schedulers/test_scheduler_{ddpm,ddim}.py: dummy sample, dummy model, clipping."""
    dummy_sample = torch.arange(4 * 3 * 8 * 8).reshape(3, 8, 8, 4).permute(3, 0, 1, 2) / (4 * 3 * 8 * 8)
    dummy_model = lambda z, t: z * t[0] / (t[0] + 1)
    denoise = make_denoiser(dummy_model, LINEAR, prediction, torch.device("cpu"))
    z = sample(denoise, dummy_sample, LINEAR, name, x0_range=1.0, generator=torch.Generator().manual_seed(0), **options)
    assert float(z.abs().sum()) == pytest.approx(absolute_sum, abs=1e-2)

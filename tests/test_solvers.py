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
    """Solve from log-SNR low to high in uniform log-SNR steps, float64. Returns (result, exact solution)."""
    lambdas = -(FINE.sigma(torch.arange(FINE.timesteps)) / FINE.alpha(torch.arange(FINE.timesteps))).log()  # decreasing in t
    times = [int((lambdas - v).abs().argmin()) for v in torch.linspace(low, high, steps + 1).tolist()]
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)
    scale = lambda t: (float(FINE.alpha(t)) ** 2 * STD**2 + float(FINE.sigma(t)) ** 2) ** 0.5
    # For a Gaussian, the probability-flow ODE conserves (z_t - alpha_t m) / sqrt(alpha_t² s² + sigma_t²).
    exact = float(FINE.alpha(times[-1])) * MEAN + scale(times[-1]) / scale(times[0]) * (
        z - float(FINE.alpha(times[0])) * MEAN
    )
    options = SolverOptions(**dict(randn=lambda: torch.zeros_like(z), num_noisy_steps=0) | options)
    pairs = list(zip(times, times[1:]))
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


def test_sde_form_without_noise_is_the_ode_form():
    """Without noisy steps both give the same result."""
    assert torch.equal(walk("dpmpp_2m_sde", 10, num_noisy_steps=0)[0], walk("dpmpp_2m", 10)[0])


@pytest.mark.parametrize("steps, tolerance", [(50, 0.06), (200, 0.02)])
def test_sde_form_reaches_the_gaussian(steps, tolerance):
    noise = torch.randn(4000, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    denoise = lambda z, t: exact_denoiser(LINEAR)(z, t[0])
    z = sample(denoise, noise, LINEAR, "dpmpp_2m_sde", steps, generator=torch.Generator().manual_seed(1))
    assert float(z.mean()) == pytest.approx(MEAN, abs=0.02) and float(z.std()) == pytest.approx(STD, rel=tolerance)


def mixture_denoiser(schedule, centre=1.0, std=0.3):
    """E[z | z_t] for the mixture of N(-c, s²) and N(c, s²) with equal weights: Bayes by hand."""

    def denoise(z_t, t):
        alpha, sigma = float(schedule.alpha(int(t[0]))), float(schedule.sigma(int(t[0])))
        var = alpha**2 * std**2 + sigma**2
        right = torch.sigmoid(2 * alpha * centre * z_t / var)  # share of the right component
        mean = lambda c: c + alpha * std**2 / var * (z_t - alpha * c)
        return right * mean(centre) + (1 - right) * mean(-centre)

    return denoise


@pytest.mark.parametrize(
    "name, steps", [("ddim", 200), ("heun", 50), ("dpmpp_2m", 50), ("unipc", 50), ("ancestral", 1000), ("dpmpp_2m_sde", 100)]
)
def test_two_components_come_out_as_two(name, steps):
    """Equal shares, means ±1, std 0.3 within each."""
    noise = torch.randn(2000, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    z = sample(mixture_denoiser(LINEAR), noise, LINEAR, name, steps, generator=torch.Generator().manual_seed(1))
    right = z[z > 0]
    assert len(right) / z.numel() == pytest.approx(0.5, abs=0.03)
    assert float(right.mean()) == pytest.approx(1.0, abs=0.03) and float(right.std()) == pytest.approx(0.3, rel=0.08)


@pytest.mark.parametrize("steps, std", [(10, 0.95), (20, 1.00), (50, 1.00)])
def test_2m_trailing_keeps_the_spread_of_a_unit_gaussian(steps, std):
    noise = torch.randn(2000, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    denoise = lambda z, t: float(LINEAR.alpha(int(t[0]))) * z
    assert float(sample(denoise, noise, LINEAR, "dpmpp_2m", steps).std()) == pytest.approx(std, abs=0.02)


# Step by step against diffusers. Their schedulers are given our timesteps and the same denoiser; what they were handed at
# each step must be what ours were handed. Their tables are float32.


def record(denoise, seen):
    def recording(z_t, t):
        seen.append(z_t.clone())
        return denoise(z_t, t)

    return recording


@pytest.mark.parametrize("ours, theirs, options", [
    ("ddim", "DDIMScheduler", dict(clip_sample=False, set_alpha_to_one=True)),
    ("dpmpp_2m", "DPMSolverMultistepScheduler", dict(algorithm_type="dpmsolver++", solver_order=2, final_sigmas_type="zero")),
    ("unipc", "UniPCMultistepScheduler", dict(solver_order=2, final_sigmas_type="zero")),
    ("unipc3", "UniPCMultistepScheduler", dict(solver_order=3, final_sigmas_type="zero")),
])  # fmt: skip
def test_agrees_with_diffusers(ours, theirs, options):
    diffusers = pytest.importorskip("diffusers")
    scheduler = getattr(diffusers, theirs)(
        1000, beta_schedule="linear", timestep_spacing="trailing", prediction_type="sample", **options
    )
    scheduler.set_timesteps(20)
    denoise = mixture_denoiser(LINEAR)
    z = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    order = 3 if ours.endswith("3") else 2
    final = sample(record(denoise, seen := []), z, LINEAR, ours.rstrip("3"), 20, order=order)
    for i, t in enumerate(scheduler.timesteps):
        torch.testing.assert_close(z, seen[i], rtol=1e-4, atol=1e-4)
        z = scheduler.step(denoise(z, t[None]), t, z).prev_sample
    torch.testing.assert_close(z, final, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ours, theirs", [("euler", "EulerDiscreteScheduler"), ("heun", "HeunDiscreteScheduler")])
def test_agrees_with_diffusers_in_noise_units(ours, theirs):
    """These walk x = z/alpha; their first x is noise · sigma_max, where ours is noise/alpha: we hand them ours."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = getattr(diffusers, theirs)(
        1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear", prediction_type="epsilon", timestep_spacing="trailing"
    )
    scheduler.set_timesteps(20)
    denoise = mixture_denoiser(LINEAR)
    z = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    final = sample(record(denoise, seen := []), z, LINEAR, ours, 20)
    x = z / float(LINEAR.alpha(999))
    for i, t in enumerate(scheduler.timesteps):
        alpha, sigma = float(LINEAR.alpha(int(t))), float(LINEAR.sigma(int(t)))
        torch.testing.assert_close(alpha * x, seen[i], rtol=2e-4, atol=2e-4)
        eps = (alpha * x - alpha * denoise(alpha * x, t[None].long())) / sigma
        x = scheduler.step(eps, t, x).prev_sample
    torch.testing.assert_close(x, final, rtol=2e-4, atol=2e-4)


# The sums that diffusers' own tests of its schedulers hold (tests/schedulers/test_scheduler_{ddpm,ddim}.py, full_loop): a
# dummy model of the sample and t, a sample that counts from 0 to 1, clean estimates clipped to ±1.


@pytest.mark.parametrize("name, options, prediction, absolute_sum", [
    ("ancestral", dict(steps=1000), "eps", 258.9606),
    ("ancestral", dict(steps=1000), "v", 202.0296),
    ("ddim", dict(steps=10, spacing="leading"), "eps", 172.0067),
    ("ddim", dict(steps=10, spacing="leading"), "v", 52.5302),
])  # fmt: skip
def test_golden_sums_of_diffusers(name, options, prediction, absolute_sum):
    counting = torch.arange(4 * 3 * 8 * 8).reshape(3, 8, 8, 4).permute(3, 0, 1, 2) / (4 * 3 * 8 * 8)
    dummy = lambda z, t: z * t[0] / (t[0] + 1)
    denoise = make_denoiser(dummy, LINEAR, prediction, torch.device("cpu"))
    z = sample(denoise, counting, LINEAR, name, x0_range=1.0, generator=torch.Generator().manual_seed(0), **options)
    assert float(z.abs().sum()) == pytest.approx(absolute_sum, abs=1e-2)

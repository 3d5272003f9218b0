"""Schedules against values computed by hand, identities, and the implementation in diffusers."""

import math

import pytest
import torch

from models.schedules import PREDICTIONS, SCHEDULES, make_schedule, min_snr_weight, target, to_z0


def test_linear_by_hand():
    schedule = make_schedule("linear", 1000)
    assert float(schedule.alphas_cumprod[0]) == pytest.approx(1 - 1e-4, abs=1e-12)
    second_beta = 1e-4 + (0.02 - 1e-4) / 999
    assert float(schedule.alphas_cumprod[1]) == pytest.approx((1 - 1e-4) * (1 - second_beta), abs=1e-12)
    # log alpha bar_T = sum log(1 - beta_t); 4.04e-5 is DDPM's value
    assert float(schedule.alphas_cumprod[-1]) == pytest.approx(4.036e-5, rel=1e-3)


def test_cosine_by_hand():
    schedule = make_schedule("cosine", 1000)
    f = lambda t: math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2
    for t in (0, 1, 499, 900, 989):  # entry t holds alpha bar after t+1 steps
        assert float(schedule.alphas_cumprod[t]) == pytest.approx(f(t + 1) / f(0), rel=1e-9)
    last_ratio = float(schedule.alphas_cumprod[-1] / schedule.alphas_cumprod[-2])
    assert last_ratio == pytest.approx(0.001)  # beta is capped at 0.999


def test_scaled_linear_by_hand():
    abar = make_schedule("scaled_linear", 1000).alphas_cumprod
    betas = 1 - abar[1:] / abar[:-1]
    assert 1 - float(abar[0]) == pytest.approx(0.00085) and float(betas[-1]) == pytest.approx(0.012)
    beta_499 = (math.sqrt(0.00085) + 500 / 999 * (math.sqrt(0.012) - math.sqrt(0.00085))) ** 2
    assert float(betas[499]) == pytest.approx(beta_499)


def test_flow_by_hand():
    schedule = make_schedule("flow", 1000)
    assert float(schedule.alpha(249)) == pytest.approx(0.75) and float(schedule.sigma(249)) == pytest.approx(0.25)
    assert float(schedule.alpha(999)) == 0.0 and float(schedule.sigma(999)) == 1.0
    torch.testing.assert_close(
        schedule.alpha(torch.arange(1000)) + schedule.sigma(torch.arange(1000)), torch.ones(1000, dtype=torch.float64)
    )


@pytest.mark.parametrize(
    "name, diffusers_name", [("linear", "linear"), ("scaled_linear", "scaled_linear"), ("cosine", "squaredcos_cap_v2")]
)
def test_matches_diffusers(name, diffusers_name):
    diffusers = pytest.importorskip("diffusers")
    betas = dict(beta_start=0.00085, beta_end=0.012) if name == "scaled_linear" else {}
    reference = diffusers.DDPMScheduler(1000, beta_schedule=diffusers_name, **betas).alphas_cumprod
    # The reference is float32: its cumulative products drift by a relative 1e-5.
    torch.testing.assert_close(make_schedule(name).alphas_cumprod.float(), reference, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("timesteps", [10, 1000])
def test_identities(name, timesteps):
    schedule = make_schedule(name, timesteps)
    t = torch.arange(timesteps)
    assert schedule.alphas_cumprod.dtype == torch.float64 and len(schedule.alphas_cumprod) == timesteps
    assert (schedule.alphas_cumprod.diff() < 0).all() and (schedule.alphas_cumprod >= 0).all()
    if name != "flow":
        ones = torch.ones(timesteps, dtype=torch.float64)
        torch.testing.assert_close(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, ones, rtol=1e-12, atol=0)
        abar = schedule.alphas_cumprod
        torch.testing.assert_close(schedule.snr(t), abar / (1 - abar), rtol=1e-9, atol=0)
    torch.testing.assert_close(schedule.alpha(t) ** 2, schedule.alphas_cumprod, rtol=1e-12, atol=0)
    assert float(schedule.alpha(-1)) == 1.0 and float(schedule.sigma(-1)) == 0.0
    alpha, sigma = schedule.coefficients(t)
    assert alpha.shape == sigma.shape == (timesteps, 1, 1, 1)
    assert torch.equal(alpha.flatten(), schedule.alpha(t).float()) and torch.equal(
        sigma.flatten(), schedule.sigma(t).float()
    )


def test_add_noise_by_hand():
    schedule, t = make_schedule("flow", 10), torch.tensor([1, 9, -1])
    z, eps = torch.full((3, 2, 4, 4), 2.0), torch.full((3, 2, 4, 4), -1.0)
    z_t = schedule.add_noise(z, eps, t)
    assert z_t.shape == z.shape and z_t.dtype == torch.float32
    for value, expected in zip(z_t, (0.8 * 2.0 - 0.2, -1.0, 2.0)):
        torch.testing.assert_close(value, torch.full_like(value, expected))


def test_bins_cover_all_timesteps():
    bins = make_schedule("linear", 25).bins(4)
    assert bins == [(0, 5), (6, 11), (12, 17), (18, 24)]


def test_bad_input():
    with pytest.raises(ValueError, match="linear, cosine, scaled_linear"):
        make_schedule("quadratic")
    with pytest.raises(ValueError, match="at least 2"):
        make_schedule("linear", 1)
    with pytest.raises(IndexError, match="1000"):
        make_schedule("linear").alpha(1000)


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("sigma", [0.8, 0.4], ids=["variance preserving", "flow"])
def test_to_z0_inverts_target(kind, sigma):
    torch.manual_seed(0)
    z, eps = torch.randn(2, 5, 3, 4, 4, dtype=torch.float64)
    alpha, sigma = torch.tensor(0.6, dtype=torch.float64), torch.tensor(sigma, dtype=torch.float64)
    z_t = alpha * z + sigma * eps
    torch.testing.assert_close(to_z0(kind, target(kind, z, eps, alpha, sigma), z_t, alpha, sigma), z)


@pytest.mark.parametrize("name", ["cosine", "flow"])
def test_min_snr_weights_of_all_predictions_agree(name):
    """An error dz in z0 gives the same weighted loss for every prediction type."""
    schedule, t = make_schedule(name), torch.tensor([5, 300, 600, 900])
    alpha, sigma, snr = schedule.alpha(t), schedule.sigma(t), schedule.snr(t)
    torch.manual_seed(0)
    z, eps, dz = torch.randn(3, 4, dtype=torch.float64)
    z_t = alpha * z + sigma * eps
    for kind in PREDICTIONS:
        error = target(kind, z + dz, (z_t - alpha * (z + dz)) / sigma, alpha, sigma) - target(kind, z, eps, alpha, sigma)
        torch.testing.assert_close(min_snr_weight(kind, alpha, sigma, 5.0) * error**2, snr.clamp(max=5.0) * dz**2)
    torch.testing.assert_close(min_snr_weight("eps", *make_pair(3.0), 5.0), torch.tensor(1.0, dtype=torch.float64))
    no_signal = torch.tensor(0.0), torch.tensor(1.0)
    torch.testing.assert_close(min_snr_weight("eps", *no_signal, 5.0), torch.tensor(1.0))
    torch.testing.assert_close(min_snr_weight("eps", *make_pair(20.0), 5.0), torch.tensor(0.25, dtype=torch.float64))
    torch.testing.assert_close(min_snr_weight("v", *make_pair(20.0), 5.0), torch.tensor(5 / 21, dtype=torch.float64))


def make_pair(snr):
    """Variance-preserving alpha and sigma with this SNR."""
    return torch.tensor(snr / (1 + snr), dtype=torch.float64).sqrt(), torch.tensor(1 / (1 + snr), dtype=torch.float64).sqrt()


def test_unknown_prediction():
    z = torch.zeros(1)
    for call in (
        lambda: target("epsilon", z, z, z, z),
        lambda: to_z0("epsilon", z, z, z, z),
        lambda: min_snr_weight("epsilon", z, z, 5.0),
    ):
        with pytest.raises(ValueError, match=r"prediction must be one of eps, v, x0, velocity \(got 'epsilon'\)"):
            call()

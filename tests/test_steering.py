"""Guidance, image-to-image, inpainting and slerp, against their definitions."""

import pytest
import torch

from models.schedules import make_schedule
from sampling import guided, sample, slerp, timesteps
from solvers import SAMPLERS, noise_level

LINEAR, COSINE = make_schedule("linear"), make_schedule("cosine")


def gaussian(schedule, mean, std):
    """E[z | z_t] for data N(mean, std²)."""

    def denoise(z_t, t):
        alpha, sigma = float(schedule.alpha(int(t[0]))), float(schedule.sigma(int(t[0])))
        return mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (z_t - alpha * mean)

    return denoise


COND, UNCOND = gaussian(LINEAR, 1.0, 0.5), gaussian(LINEAR, 0.0, 1.0)


def denoise_both(z_t, t):
    return COND(z_t, t), UNCOND(z_t, t)


def noise(n=4, seed=0):
    return torch.randn(n, 2, 4, 4, generator=torch.Generator().manual_seed(seed))


def at(t):
    return torch.full((4,), t)


def record():
    """Return a list and a callback for sample() that appends (t, z_t) to it."""
    trajectory = []
    return trajectory, lambda i, t, z_t, z0: trajectory.append((t, z_t))


# Guidance


def test_scale_one_is_conditional_and_zero_unconditional():
    z_t = noise()
    assert torch.equal(guided(COND, denoise_both, LINEAR, 1.0)(z_t, at(300)), COND(z_t, at(300)))
    assert torch.equal(guided(COND, denoise_both, LINEAR, 0.0)(z_t, at(300)), UNCOND(z_t, at(300)))
    fails = lambda *_: pytest.fail("scale 1 must not evaluate the unconditional network")
    guided(COND, fails, LINEAR, 1.0)(z_t, at(300))


def test_guiding_z0_is_guiding_eps():
    """eps = (z_t - alpha z0) / sigma is linear in z0 (Ho & Salimans 2021, eq. 6)."""
    z_t, t, w = noise(), at(300), 4.0
    alpha, sigma = float(LINEAR.alpha(300)), float(LINEAR.sigma(300))
    eps_cond, eps_uncond = ((z_t - alpha * d(z_t, t)) / sigma for d in (COND, UNCOND))
    z0 = (z_t - sigma * (eps_uncond + w * (eps_cond - eps_uncond))) / alpha
    torch.testing.assert_close(guided(COND, denoise_both, LINEAR, w)(z_t, t), z0, rtol=1e-4, atol=1e-5)


def test_guidance_moves_samples_away_from_the_unconditional_mean():
    mean = lambda w: float(sample(guided(COND, denoise_both, LINEAR, w), noise(256), LINEAR, "dpmpp_2m", 50).mean())
    assert mean(0.0) == pytest.approx(0.0, abs=0.05) and mean(1.0) == pytest.approx(1.0, abs=0.05) and mean(3.0) > 1.1


@pytest.mark.parametrize("t, inside", [(100, False), (400, True), (900, False)])
def test_interval_is_in_noise_levels(t, inside):
    low, high = noise_level(LINEAR, 300), noise_level(LINEAR, 500)
    z_t = noise()
    expected = guided(COND, denoise_both, LINEAR, 3.0) if inside else COND
    assert torch.equal(guided(COND, denoise_both, LINEAR, 3.0, (low, high))(z_t, at(t)), expected(z_t, at(t)))


def test_rescale_restores_the_conditional_std():
    z_t, t = noise(), at(600)
    full, half, none = (guided(COND, denoise_both, LINEAR, 6.0, rescale=r)(z_t, t) for r in (1.0, 0.5, 0.0))
    std = lambda x: x.std(dim=(1, 2, 3))
    torch.testing.assert_close(std(full), std(COND(z_t, t)))
    torch.testing.assert_close(half, (full + none) / 2)
    assert (std(none) - std(full)).abs().min() > 1e-3


@pytest.mark.parametrize("options, message", [
    (dict(rescale=1.5), r"rescale must be in \[0, 1\]"), (dict(interval=(3.0, 1.0)), "0 <= low < high"),
])  # fmt: skip
def test_invalid_guidance(options, message):
    with pytest.raises(ValueError, match=message):
        guided(COND, denoise_both, LINEAR, 2.0, **options)


# Image-to-image and inpainting


def test_strength_is_the_fraction_of_the_steps():
    visited = timesteps(COSINE, 20)
    assert timesteps(COSINE, 20, strength=0.5) == visited[10:] and timesteps(COSINE, 20, strength=0.01) == visited[19:]
    trajectory, callback = record()
    sample(UNCOND, noise(), LINEAR, "ddim", 20, init_latents=noise(4, 1), strength=0.25, callback=callback)
    assert [t for t, _ in trajectory] == timesteps(LINEAR, 20)[15:]


@pytest.mark.parametrize("spacing", ["logsnr", "karras", "linspace"])
@pytest.mark.parametrize("strength", [0.3, 0.6, 0.8])
def test_strength_means_the_same_noise_level_for_every_spacing(spacing, strength):
    trailing, visited = timesteps(COSINE, 20, strength=strength), timesteps(COSINE, 20, spacing, strength=strength)
    assert visited[0] == trailing[0] and len(visited) == len(trailing) and visited[-1] == 0


def test_sampling_starts_from_noised_init_latents():
    init_latents, eps = noise(4, 1), noise(4, 2)
    trajectory, callback = record()
    sample(UNCOND, eps, LINEAR, "ddim", 20, init_latents=init_latents, strength=0.5, callback=callback)
    t, z_t = trajectory[0]
    torch.testing.assert_close(z_t, float(LINEAR.alpha(t)) * init_latents + float(LINEAR.sigma(t)) * eps)


@pytest.mark.parametrize("strength", [0.1, 0.4])
def test_distance_to_init_latents(strength):
    """The ODE of unit Gaussian data leaves z_t = alpha init + sigma eps unchanged."""
    init_latents, t = noise(64, 1), timesteps(LINEAR, 40, strength=strength)[0]
    alpha, sigma = float(LINEAR.alpha(t)), float(LINEAR.sigma(t))
    z = sample(UNCOND, noise(64), LINEAR, "dpmpp_2m", 40, init_latents=init_latents, strength=strength)
    assert float((z - init_latents).std()) == pytest.approx(((1 - alpha) ** 2 + sigma**2) ** 0.5, rel=0.06)


def test_full_strength_ignores_init_latents():
    z = sample(UNCOND, noise(), LINEAR, "ddim", 10, init_latents=noise(4, 1), strength=1.0)
    assert torch.equal(z, sample(UNCOND, noise(), LINEAR, "ddim", 10))


@pytest.mark.parametrize("name", SAMPLERS)
def test_mask_keeps_init_latents(name):
    """Outside the mask z is exactly init_latents, and z_t is init_latents with unit-variance noise at the level of t."""
    init_latents, mask = noise(256, 1), torch.zeros(1, 1, 4, 4)
    mask[..., 2:] = 1
    trajectory, callback = record()
    z = sample(
        UNCOND, noise(256), LINEAR, name, 20, init_latents=init_latents, mask=mask, eta=1.0,
        generator=torch.Generator().manual_seed(7), callback=callback,
    )  # fmt: skip
    kept = init_latents[..., :2]
    assert torch.equal(z[..., :2], kept) and not torch.isclose(z[..., 2:], init_latents[..., 2:]).all()
    for t, z_t in trajectory:
        eps = (z_t[..., :2] - float(LINEAR.alpha(t)) * kept) / float(LINEAR.sigma(t))
        assert float(eps.std()) == pytest.approx(1.0, abs=0.06) and abs(float((eps * kept).mean())) < 0.06, t


def test_inpainting_uses_the_kept_area():
    """For data with two equal halves, the generated half must correlate with the kept one."""

    def denoise(z_t, t):  # E[z | z_t] of a unit Gaussian whose right half repeats its left half
        alpha, sigma = float(LINEAR.alpha(int(t[0]))), float(LINEAR.sigma(int(t[0])))
        half = alpha * (z_t[..., :2] + z_t[..., 2:]) / (2 * alpha**2 + sigma**2)
        return torch.cat([half, half], dim=-1)

    kept, mask = noise(64, 1)[..., :2], torch.tensor([0.0, 0.0, 1.0, 1.0])
    options = dict(init_latents=torch.cat([kept, kept], dim=-1), mask=mask, generator=torch.Generator().manual_seed(0))
    generated = sample(denoise, noise(64), LINEAR, "ancestral", 500, **options)[..., 2:]
    assert torch.corrcoef(torch.stack([generated.flatten(), kept.flatten()]))[0, 1] > 0.6


@pytest.mark.parametrize("options, message", [
    (dict(init_latents=torch.zeros(4, 2, 8, 8)), "init_latents must have the shape of noise"),
    (dict(init_latents=torch.zeros(4, 2, 4, 4), mask=torch.zeros(3, 3)), "mask must be broadcastable"),
    (dict(mask=torch.zeros(4, 4)), "mask and strength < 1 need init_latents"),
    (dict(init_latents=torch.zeros(4, 2, 4, 4), strength=0.0), r"strength must be in \(0, 1\]"),
    (dict(init_latents=torch.zeros(4, 2, 4, 4), strength=1.1), r"strength must be in \(0, 1\]"),
])  # fmt: skip
def test_invalid_init_latents(options, message):
    with pytest.raises(ValueError, match=message):
        sample(UNCOND, noise(), LINEAR, "ddim", 10, **options)


def test_slerp():
    a, b = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0])
    torch.testing.assert_close(slerp(a, b, 1 / 3), torch.tensor([3**0.5, 1.0]))  # 30 degrees from a, of 90
    assert torch.equal(slerp(a, b, 0.0), a) and torch.allclose(slerp(a, b, 1.0), b, atol=1e-6)
    assert torch.equal(slerp(a, a, 0.3), a)
    a, b = noise(1, 1)[0], noise(1, 2)[0]
    assert float(slerp(a, b, 0.5).norm()) == pytest.approx(float((a.norm() + b.norm()) / 2), rel=0.05)

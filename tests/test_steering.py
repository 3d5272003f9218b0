"""Guidance, a picture to start from, a mask, and what lies between two noises: each against what it must be by its definition."""

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


def both(z_t, t):
    return COND(z_t, t), UNCOND(z_t, t)


def noise(n=4, seed=0):
    return torch.randn(n, 2, 4, 4, generator=torch.Generator().manual_seed(seed))


def at(t):
    return torch.full((4,), t)


# Guidance


def test_scale_one_is_conditional_and_zero_unconditional():
    z_t = noise()
    assert torch.equal(guided(COND, both, LINEAR, 1.0)(z_t, at(300)), COND(z_t, at(300)))
    assert torch.equal(guided(COND, both, LINEAR, 0.0)(z_t, at(300)), UNCOND(z_t, at(300)))
    never = lambda *_: pytest.fail("scale 1 needs no second pass")
    guided(COND, never, LINEAR, 1.0)(z_t, at(300))


def test_guiding_clean_estimates_is_guiding_eps():
    """eps = (z_t - alpha z0) / sigma, so uncond + w (cond - uncond) says the same of both (Ho & Salimans 2021, eq. 6)."""
    z_t, t, w = noise(), at(300), 4.0
    alpha, sigma = float(LINEAR.alpha(300)), float(LINEAR.sigma(300))
    eps_cond, eps_uncond = ((z_t - alpha * d(z_t, t)) / sigma for d in (COND, UNCOND))
    by_eps = (z_t - sigma * (eps_uncond + w * (eps_cond - eps_uncond))) / alpha
    torch.testing.assert_close(guided(COND, both, LINEAR, w)(z_t, t), by_eps, rtol=1e-4, atol=1e-5)


def test_guidance_moves_samples_away_from_the_unconditional_mean():
    means = [
        float(sample(guided(COND, both, LINEAR, w), noise(256), LINEAR, "dpmpp_2m", 50).mean()) for w in (0.0, 1.0, 3.0)
    ]
    assert means[0] == pytest.approx(0.0, abs=0.05) and means[1] == pytest.approx(1.0, abs=0.05) and means[2] > 1.1


@pytest.mark.parametrize("t, inside", [(100, False), (400, True), (900, False)])
def test_interval_is_in_noise_levels(t, inside):
    low, high = noise_level(LINEAR, 300), noise_level(LINEAR, 500)
    z_t = noise()
    wanted = guided(COND, both, LINEAR, 3.0) if inside else COND
    assert torch.equal(guided(COND, both, LINEAR, 3.0, (low, high))(z_t, at(t)), wanted(z_t, at(t)))


def test_rescale_gives_the_conditional_spread():
    z_t, t = noise(), at(600)
    full, half, none = (guided(COND, both, LINEAR, 6.0, rescale=r)(z_t, t) for r in (1.0, 0.5, 0.0))
    std = lambda x: x.std(dim=(1, 2, 3))
    torch.testing.assert_close(std(full), std(COND(z_t, t)))
    torch.testing.assert_close(half, (full + none) / 2)
    assert (std(none) - std(full)).abs().min() > 1e-3


@pytest.mark.parametrize("options, message", [
    (dict(rescale=1.5), r"rescale must be in \[0, 1\]"), (dict(interval=(3.0, 1.0)), "0 <= low < high"),
])  # fmt: skip
def test_bad_guidance(options, message):
    with pytest.raises(ValueError, match=message):
        guided(COND, both, LINEAR, 2.0, **options)


# From a picture, and into one


def test_strength_is_the_share_of_the_steps_made():
    whole = timesteps(COSINE, 20)
    assert timesteps(COSINE, 20, strength=0.5) == whole[10:] and timesteps(COSINE, 20, strength=0.01) == whole[19:]
    for spacing in ("logsnr", "karras", "linspace"):  # begin where even steps do
        for strength in (0.3, 0.6, 0.8):
            even, found = timesteps(COSINE, 20, strength=strength), timesteps(COSINE, 20, spacing, strength=strength)
            assert found[0] == even[0] and len(found) == len(even) and found[-1] == 0
    seen = []
    sample(UNCOND, noise(), LINEAR, "ddim", 20, init_latents=noise(4, 1), strength=0.25, callback=lambda i, t, *_: seen.append(t))
    assert seen == timesteps(LINEAR, 20)[15:]


def test_starts_from_the_picture_at_its_noise_level():
    start, eps, seen = noise(4, 1), noise(4, 2), []
    sample(UNCOND, eps, LINEAR, "ddim", 20, init_latents=start, strength=0.5, callback=lambda i, t, z_t, z0: seen.append((t, z_t)))
    t, z_t = seen[0]
    torch.testing.assert_close(z_t, float(LINEAR.alpha(t)) * start + float(LINEAR.sigma(t)) * eps)


def test_less_strength_stays_nearer():
    """The ODE of a unit Gaussian leaves z_t as it is: what is left of the picture is alpha of it, and sigma of noise."""
    for strength in (0.1, 0.4):
        alpha, sigma = (float(f(timesteps(LINEAR, 40, strength=strength)[0])) for f in (LINEAR.alpha, LINEAR.sigma))
        z = sample(UNCOND, noise(64), LINEAR, "dpmpp_2m", 40, init_latents=noise(64, 1), strength=strength)
        assert float((z - noise(64, 1)).std()) == pytest.approx(((1 - alpha) ** 2 + sigma**2) ** 0.5, rel=0.06)


def test_full_strength_forgets_the_picture():
    with_it = sample(UNCOND, noise(), LINEAR, "ddim", 10, init_latents=noise(4, 1), strength=1.0)
    assert torch.equal(with_it, sample(UNCOND, noise(), LINEAR, "ddim", 10))


@pytest.mark.parametrize("name", SAMPLERS)
def test_what_the_mask_keeps_is_kept(name):
    """Exactly at the end; on the way at each step's own noise level, with a spread of alpha² + sigma² = 1."""
    start, seen = noise(256, 1), []
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., 2:] = 1
    z = sample(
        UNCOND, noise(256), LINEAR, name, 20, init_latents=start, mask=mask, eta=1.0, generator=torch.Generator().manual_seed(7),
        callback=lambda i, t, z_t, z0: seen.append((t, z_t)),
    )  # fmt: skip
    assert torch.equal(z[..., :2], start[..., :2]) and not torch.isclose(z[..., 2:], start[..., 2:]).all()
    for t, z_t in seen:
        eps = (z_t - float(LINEAR.alpha(t)) * start)[..., :2] / float(LINEAR.sigma(t))
        assert float(eps.std()) == pytest.approx(1.0, abs=0.06) and abs(float((eps * start[..., :2]).mean())) < 0.06, t


def test_outside_the_mask_knows_what_is_kept():
    """Data whose halves are equal: the drawn half must become the kept one."""

    def twins(z_t, t):  # E[z | z_t] for a unit Gaussian whose right half repeats its left
        alpha, sigma = float(LINEAR.alpha(int(t[0]))), float(LINEAR.sigma(int(t[0])))
        left = alpha * (z_t[..., :2] + z_t[..., 2:]) / (2 * alpha**2 + sigma**2)
        return torch.cat([left, left], dim=-1)

    start, mask = noise(64, 1).clone(), torch.zeros(4)
    start[..., 2:] = start[..., :2]
    mask[2:] = 1
    z = sample(
        twins, noise(64), LINEAR, "ancestral", 500, init_latents=start, mask=mask, generator=torch.Generator().manual_seed(0)
    )
    drawn, kept = z[..., 2:], start[..., :2]
    assert torch.corrcoef(torch.stack([drawn.flatten(), kept.flatten()]))[0, 1] > 0.6


@pytest.mark.parametrize("options, message", [
    (dict(init_latents=torch.zeros(4, 2, 8, 8)), "init_latents must have the shape of noise"),
    (dict(init_latents=torch.zeros(4, 2, 4, 4), mask=torch.zeros(3, 3)), "mask must be broadcastable"),
    (dict(mask=torch.zeros(4, 4)), "need init_latents"),
    (dict(init_latents=torch.zeros(4, 2, 4, 4), strength=0.0), r"strength must be in \(0, 1\]"),
    (dict(init_latents=torch.zeros(4, 2, 4, 4), strength=1.1), r"strength must be in \(0, 1\]"),
])  # fmt: skip
def test_bad_starts(options, message):
    with pytest.raises(ValueError, match=message):
        sample(UNCOND, noise(), LINEAR, "ddim", 10, **options)


def test_slerp_by_hand():
    a, b = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0])
    torch.testing.assert_close(slerp(a, b, 1 / 3), torch.tensor([3**0.5, 1.0]))  # 30 degrees from a
    assert torch.equal(slerp(a, b, 0.0), a) and torch.allclose(slerp(a, b, 1.0), b, atol=1e-6)
    assert torch.equal(slerp(a, a, 0.3), a)
    long_a, long_b = noise(1, 1)[0], noise(1, 2)[0]
    assert float(slerp(long_a, long_b, 0.5).norm()) == pytest.approx(float((long_a.norm() + long_b.norm()) / 2), rel=0.05)

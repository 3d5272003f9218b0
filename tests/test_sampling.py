"""Samplers on exact denoisers, whose answers are known in closed form."""

import math

import pytest
import torch

from models.schedules import make_schedule
from sampling import Threshold, image_generators, make_denoiser, randn, sample, default_spacing, timesteps
from solvers import SAMPLERS, beta_std, posterior_std, ddim_mean

LINEAR, COSINE, FLOW = make_schedule("linear"), make_schedule("cosine"), make_schedule("flow")


def gaussian_denoiser(schedule, mean=0.0, std=1.0):
    """E[z | z_t] for data N(mean, std²); mean and std broadcast to z."""

    def denoise(z_t, t):
        alpha, sigma = float(schedule.alpha(int(t[0]))), float(schedule.sigma(int(t[0])))
        return mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (z_t - alpha * mean)

    return denoise


def noise(n=512, seed=0):
    return torch.randn(n, 2, 4, 4, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("schedule", [LINEAR, COSINE, FLOW], ids=["linear", "cosine", "flow"])
@pytest.mark.parametrize("std", [1.0, 0.5, 2.0])
def test_ddim_follows_the_ode(schedule, std):
    """For Gaussian data the probability-flow ODE keeps (z_t - alpha_t m) / sqrt(alpha_t² s² + sigma_t²) constant (float64 closed form)."""
    mean, z_T = 0.7, noise(64)
    start = timesteps(schedule, 1000)[0]
    alpha, sigma = float(schedule.alpha(start)), float(schedule.sigma(start))
    z_T_there = z_T * (alpha**2 + sigma**2) ** 0.5  # what the sampler starts from: unit variance of z assumed
    exact = mean + std * (z_T_there - alpha * mean) / (alpha**2 * std**2 + sigma**2) ** 0.5
    z = sample(gaussian_denoiser(schedule, mean, std), z_T, schedule, "ddim", 1000)
    assert float((z - exact).abs().max()) < 0.02 * std + 0.01


@pytest.mark.parametrize("variance", ["posterior", "beta"])
@pytest.mark.parametrize(
    "std",
    [torch.tensor(1.0), torch.tensor(0.5), torch.tensor([0.5, 2.0])[:, None, None]],
    ids=["1", "0.5", "unequal channels"],
)
def test_ancestral_reaches_the_gaussian(variance, std):
    z = sample(
        gaussian_denoiser(LINEAR, 0.3, std),
        noise(),
        LINEAR,
        "ancestral",
        1000,
        variance=variance,
        generator=torch.Generator().manual_seed(1),
    )
    per_channel = std.flatten().expand(2)
    torch.testing.assert_close(z.std(dim=(0, 2, 3)), per_channel, rtol=0.03, atol=0)
    torch.testing.assert_close(z.mean(dim=(0, 2, 3)), torch.full((2,), 0.3), rtol=0, atol=0.06)


@pytest.mark.parametrize("steps, std", [(10, 0.83), (20, 0.91), (50, 0.96)])
def test_known_shrinkage_of_few_ddim_steps(steps, std):
    assert float(sample(gaussian_denoiser(LINEAR), noise(), LINEAR, "ddim", steps).std()) == pytest.approx(std, abs=0.015)


def test_clamping_to_one_shrinks_unit_latents():
    """The "variance collapse" of the original project: std 0.68 after 1000 ancestral steps; the measured range does not do it."""
    run = lambda bound: float(
        sample(
            gaussian_denoiser(LINEAR),
            noise(),
            LINEAR,
            "ancestral",
            1000,
            x0_range=bound,
            generator=torch.Generator().manual_seed(1),
        ).std()
    )
    assert run(1.0) == pytest.approx(0.68, abs=0.02)
    assert run(4.0) == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize("steps", [7, 50, 1000])
def test_ddim_with_eta_one_is_ancestral(steps):
    runs = [
        sample(
            gaussian_denoiser(COSINE), noise(8), COSINE, name, steps, generator=torch.Generator().manual_seed(3), **options
        )
        for name, options in (("ddim", dict(eta=1.0)), ("ancestral", {}))
    ]
    assert torch.equal(*runs)


def test_posterior_variance_by_hand():
    """One step t=1 -> s=0 of the linear schedule: beta tilde = beta_1 (1 - abar_0) / (1 - abar_1) (Ho et al. 2020, eq. 7)."""
    abar = LINEAR.alphas_cumprod
    beta = 1 - abar / torch.cat([torch.ones(1), abar[:-1]])
    assert posterior_std(LINEAR, 1, 0) ** 2 == pytest.approx(float(beta[1] * (1 - abar[0]) / (1 - abar[1])), rel=1e-6)
    assert beta_std(LINEAR, 1, 0) ** 2 == pytest.approx(float(beta[1]), rel=1e-6)


def test_ancestral_step_agrees_with_diffusers():
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDPMScheduler(1000, prediction_type="sample", clip_sample=False)
    theirs.set_timesteps(1000)
    z, z0 = noise(4, 1), noise(4, 2)
    seen = {}

    def denoise(z_t, t):
        seen[int(t[0])] = z_t.clone()
        return z0

    sample(denoise, z, LINEAR, "ancestral", 1000, generator=torch.Generator().manual_seed(5))
    # Their step from our z_500 with the noise that we drew for it must land on our z_499.
    for t in (999, 500, 1):
        mean = theirs.step(z0, t, seen[t], generator=torch.Generator().manual_seed(9)).prev_sample
        drawn = torch.randn(z.shape, generator=torch.Generator().manual_seed(9))
        std = theirs._get_variance(t) ** 0.5
        ours = torch.Generator().manual_seed(5)
        for _ in range(999 - t + 1):
            our_noise = torch.randn(z.shape, generator=ours)
        torch.testing.assert_close(seen[t - 1], mean - std * drawn + std * our_noise, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 13, 1000])
@pytest.mark.parametrize("schedule", [LINEAR, COSINE, FLOW], ids=["linear", "cosine", "flow"])
def test_no_noise_is_left_in(name, steps, schedule):
    """A denoiser that always answers c ends at exactly c."""
    c = noise(3, 7)
    z = sample(
        lambda z_t, t: c,
        noise(3),
        schedule,
        name,
        steps,
        eta=1.0,
        variance="beta",
        generator=torch.Generator().manual_seed(0),
    )
    assert torch.equal(z, c)


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_image_does_not_depend_on_its_batch(name):
    def run(indices):
        generators = image_generators(5, indices, "cpu")
        z = randn((len(indices), 2, 4, 4), generators, "cpu")
        return sample(gaussian_denoiser(LINEAR), z, LINEAR, name, 20, eta=0.5, generator=generators)

    whole = run(range(6))
    assert torch.equal(whole[4:5], run([4])) and torch.equal(whole[2:4], run([2, 3]))
    assert not torch.equal(whole[0], whole[1])
    assert not torch.equal(
        randn((1, 4), image_generators(0, [1], "cpu"), "cpu"), randn((1, 4), image_generators(1, [0], "cpu"), "cpu")
    )


def test_clean_steps_add_no_noise():
    """With all steps clean, ancestral is deterministic DDIM; with K, the last K steps make no difference between two noises."""
    deterministic = sample(gaussian_denoiser(LINEAR), noise(4), LINEAR, "ddim", 10)
    assert torch.equal(sample(gaussian_denoiser(LINEAR), noise(4), LINEAR, "ancestral", 10, clean_finish_steps=10), deterministic)
    drawn = []
    for clean in (0, 4):
        generator = torch.Generator().manual_seed(0)
        sample(gaussian_denoiser(LINEAR), noise(4), LINEAR, "ancestral", 10, clean_finish_steps=clean, generator=generator)
        after = torch.rand(1, generator=generator)
        fresh = torch.Generator().manual_seed(0)
        for draws in range(11):
            if torch.equal(torch.rand(1, generator=torch.Generator().manual_seed(0).set_state(fresh.get_state())), after):
                drawn.append(draws)
                break
            torch.randn(4, 2, 4, 4, generator=fresh)
    assert drawn == [9, 6]  # the last of ten steps never draws


def test_clean_steps_of_ddim():
    """eta = 1 with all but the first K steps clean is eta = 1 for K steps, then eta = 0."""
    seen = []
    mixed = sample(gaussian_denoiser(LINEAR), noise(4), LINEAR, "ddim", 10, eta=1.0, clean_finish_steps=7, generator=torch.Generator().manual_seed(0),
                   callback=lambda i, t, z_t, z0: seen.append((t, z_t)))  # fmt: skip
    t, z = seen[3]
    for s in [t for t, _ in seen[4:]] + [-1]:
        z = ddim_mean(z, gaussian_denoiser(LINEAR)(z, torch.tensor([t])), LINEAR, t, s, 0.0)
        t = s
    torch.testing.assert_close(mixed, z)


@pytest.mark.parametrize(
    "spacing, expected",
    [("trailing", [999, 799, 599, 399, 199]), ("leading", [800, 600, 400, 200, 0]), ("linspace", [999, 749, 500, 250, 0])],
)
def test_spacings(spacing, expected):
    got = timesteps(LINEAR, 5, spacing, sigma_max=1e9)
    assert got == expected


@pytest.mark.parametrize("schedule", [LINEAR, COSINE], ids=["linear", "cosine"])
@pytest.mark.parametrize("spacing", ["logsnr", "karras"])
def test_spacings_by_noise_level(spacing, schedule):
    """The timesteps nearest to equal strides of log(sigma/alpha), or of Karras et al. 2022, eq. 5, from their formulas."""
    level = lambda t: float(schedule.sigma(t) / schedule.alpha(t))
    times = timesteps(schedule, 8, spacing)
    high, low = level(times[0]), level(0)
    assert times[0] == timesteps(schedule, 1000)[0] and times[-1] == 0 and len(times) == 8
    for i, t in enumerate(times):
        if spacing == "logsnr":
            wanted = high * (low / high) ** (i / 7)
        else:
            wanted = (high ** (1 / 7) + i / 7 * (low ** (1 / 7) - high ** (1 / 7))) ** 7
        off = lambda t: abs(math.log(level(t) / wanted))
        assert off(t) <= min(off(max(t - 1, 0)), off(min(t + 1, 999))) + 1e-12, (i, t)
    many = timesteps(schedule, 1000, spacing)
    assert many == sorted(set(many), reverse=True) and 100 < len(many) < 1000  # neighbors that coincide are one step


@pytest.mark.parametrize("schedule", [LINEAR, COSINE], ids=["linear", "cosine"])
@pytest.mark.parametrize("sampler", ["dpmpp_2m", "unipc"])
def test_second_order_solvers_want_even_steps_of_log_snr(sampler, schedule):
    """Ten steps to a direction ten times narrower than the data: its std is right to 5 %, with even steps in t wrong by nearly half
    or more (the exact solution as in test_ddim_follows_the_ode)."""
    assert (
        default_spacing(sampler, schedule) == "logsnr"
        and default_spacing("ddim", schedule) == default_spacing(sampler, FLOW) == "trailing"
    )
    off = {}
    for spacing in ("logsnr", "trailing"):
        start = timesteps(schedule, 10, spacing)[0]
        alpha, sigma = float(schedule.alpha(start)), float(schedule.sigma(start))
        exact = 0.1 / (alpha**2 * 0.1**2 + sigma**2) ** 0.5
        z = sample(gaussian_denoiser(schedule, 0.0, 0.1), torch.ones(1, 1, 1, 1), schedule, sampler, 10, spacing=spacing)
        off[spacing] = abs(float(z) / exact - 1)
    assert off["logsnr"] < 0.05 and off["trailing"] > 0.4, off


def test_cosine_starts_where_noise_is_bounded():
    times = timesteps(COSINE, 1000)
    assert times[-1] == 0 and 985 <= times[0] <= 992
    assert (
        float(COSINE.sigma(times[0]) / COSINE.alpha(times[0]))
        <= 70
        < float(COSINE.sigma(times[0] + 1) / COSINE.alpha(times[0] + 1))
    )


def test_threshold_counts_and_bounds():
    threshold = Threshold(torch.tensor([-1.0, -2.0])[:, None, None], torch.ones(2, 1, 1))
    z0 = torch.full((1, 2, 1, 4), -1.5)
    assert threshold(z0).flatten().tolist() == [-1.0] * 4 + [-1.5] * 4
    assert threshold.counts == (4, 8)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0", "velocity"])
def test_denoiser_closure_inverts_the_prediction(prediction):
    from models.schedules import target

    torch.manual_seed(0)
    z, eps = torch.randn(2, 3, 2, 4, 4)
    alpha, sigma = float(COSINE.alpha(400)), float(COSINE.sigma(400))
    net = lambda z_t, t: target(prediction, z, eps, alpha, sigma)
    denoise = make_denoiser(net, COSINE, prediction, torch.device("cpu"))
    torch.testing.assert_close(denoise(alpha * z + sigma * eps, torch.full((3,), 400)), z, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(sampler="dimm"), "ancestral, ddim"),
        (dict(order=4), "1, 2 or 3"),
        (dict(steps=0), "between 1 and T = 1000"),
        (dict(steps=1001), "between 1 and T = 1000"),
        (dict(eta=1.5), r"eta must be in \[0, 1\]"),
        (dict(spacing="even"), "trailing, leading, linspace, logsnr, karras"),
        (dict(variance="big"), "posterior or beta"),
        (dict(clean_finish_steps=51), "between 0 and steps"),
        (dict(generator=[torch.Generator()], eta=1.0), "must equal the batch size 2 .got 1."),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        sample(gaussian_denoiser(LINEAR), noise(2), LINEAR, **options)

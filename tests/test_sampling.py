"""Sampling with exact denoisers of Gaussian data, against closed forms."""

import math

import pytest
import torch

from models.schedules import make_schedule, target
from sampling import Threshold, default_spacing, image_generators, make_denoiser, randn, sample, timesteps
from solvers import SAMPLERS, beta_std, ddim_mean, noise_level, posterior_std

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
    """For data N(m, s²) the probability-flow ODE conserves (z_t - alpha_t m) / sqrt(alpha_t² s² + sigma_t²)."""
    mean, eps = 0.7, noise(64)
    start = timesteps(schedule, 1000)[0]
    alpha, sigma = float(schedule.alpha(start)), float(schedule.sigma(start))
    z_start = eps * (alpha**2 + sigma**2) ** 0.5  # sample() scales the noise for unit-variance data
    exact = mean + std * (z_start - alpha * mean) / (alpha**2 * std**2 + sigma**2) ** 0.5
    z = sample(gaussian_denoiser(schedule, mean, std), eps, schedule, "ddim", 1000)
    assert float((z - exact).abs().max()) < 0.02 * std + 0.01


@pytest.mark.parametrize("variance", ["posterior", "beta"])
@pytest.mark.parametrize(
    "std",
    [torch.tensor(1.0), torch.tensor(0.5), torch.tensor([0.5, 2.0])[:, None, None]],
    ids=["1", "0.5", "unequal channels"],
)
def test_ancestral_samples_have_mean_and_std_of_the_data(variance, std):
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
def test_few_ddim_steps_shrink_the_std(steps, std):
    """Unit Gaussian data."""
    assert float(sample(gaussian_denoiser(LINEAR), noise(), LINEAR, "ddim", steps).std()) == pytest.approx(std, abs=0.015)


@pytest.mark.parametrize("bound, std, tolerance", [(1.0, 0.68, 0.02), (4.0, 1.0, 0.03)])
def test_clamping_to_one_shrinks_unit_latents(bound, std, tolerance):
    """A bound of 1 gives std 0.68 after 1000 ancestral steps, the "variance collapse" of the original project."""
    generator = torch.Generator().manual_seed(1)
    z = sample(gaussian_denoiser(LINEAR), noise(), LINEAR, "ancestral", 1000, x0_range=bound, generator=generator)
    assert float(z.std()) == pytest.approx(std, abs=tolerance)


@pytest.mark.parametrize("steps", [7, 50, 1000])
def test_ddim_with_eta_one_is_ancestral(steps):
    run = lambda name, eta: sample(
        gaussian_denoiser(COSINE), noise(8), COSINE, name, steps, eta=eta, generator=torch.Generator().manual_seed(3)
    )
    assert torch.equal(run("ddim", 1.0), run("ancestral", 0.0))


def test_posterior_variance_against_the_formula():
    """One step t=1 -> s=0 of the linear schedule: beta tilde = beta_1 (1 - abar_0) / (1 - abar_1) (Ho et al. 2020, eq. 7)."""
    abar = LINEAR.alphas_cumprod
    beta = 1 - abar / torch.cat([torch.ones(1), abar[:-1]])
    assert posterior_std(LINEAR, 1, 0) ** 2 == pytest.approx(float(beta[1] * (1 - abar[0]) / (1 - abar[1])), rel=1e-6)
    assert beta_std(LINEAR, 1, 0) ** 2 == pytest.approx(float(beta[1]), rel=1e-6)


def test_ancestral_step_agrees_with_diffusers():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(1000, prediction_type="sample", clip_sample=False)
    scheduler.set_timesteps(1000)
    z, z0 = noise(4, 1), noise(4, 2)
    trajectory = {}  # t -> z_t

    def denoise(z_t, t):
        trajectory[int(t[0])] = z_t.clone()
        return z0

    sample(denoise, z, LINEAR, "ancestral", 1000, generator=torch.Generator().manual_seed(5))
    # A step of diffusers from our z_t, with its noise replaced by ours, must give our z_{t-1}.
    for t in (999, 500, 1):
        z_next = scheduler.step(z0, t, trajectory[t], generator=torch.Generator().manual_seed(9)).prev_sample
        scheduler_noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(9))
        std = scheduler._get_variance(t) ** 0.5
        generator = torch.Generator().manual_seed(5)
        for _ in range(999 - t + 1):
            our_noise = torch.randn(z.shape, generator=generator)
        expected = z_next - std * scheduler_noise + std * our_noise
        torch.testing.assert_close(trajectory[t - 1], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 13, 1000])
@pytest.mark.parametrize("schedule", [LINEAR, COSINE, FLOW], ids=["linear", "cosine", "flow"])
def test_the_result_is_the_last_clean_estimate(name, steps, schedule):
    """A denoiser that always returns c gives exactly c: no noise is left."""
    c, generator = noise(3, 7), torch.Generator().manual_seed(0)
    z = sample(lambda z_t, t: c, noise(3), schedule, name, steps, eta=1.0, variance="beta", generator=generator)
    assert torch.equal(z, c)


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_image_does_not_depend_on_its_batch(name):
    def run(indices):
        generators = image_generators(5, indices, "cpu")
        z = randn((len(indices), 2, 4, 4), generators, "cpu")
        return sample(gaussian_denoiser(LINEAR), z, LINEAR, name, 20, eta=0.5, generator=generators)

    batch = run(range(6))
    assert torch.equal(batch[4:5], run([4])) and torch.equal(batch[2:4], run([2, 3]))
    assert not torch.equal(batch[0], batch[1])


def test_consecutive_seeds_share_no_noise():
    first = lambda seed, i: randn((1, 4), image_generators(seed, [i], "cpu"), "cpu")
    assert not torch.equal(first(0, 1), first(1, 0))


def test_ancestral_with_only_clean_steps_is_ddim():
    ddim = sample(gaussian_denoiser(LINEAR), noise(4), LINEAR, "ddim", 10)
    ancestral = sample(gaussian_denoiser(LINEAR), noise(4), LINEAR, "ancestral", 10, clean_finish_steps=10)
    assert torch.equal(ancestral, ddim)


@pytest.mark.parametrize("clean_finish_steps, noisy_steps", [(0, 9), (4, 6)])
def test_clean_finish_steps_add_no_noise(clean_finish_steps, noisy_steps):
    """Count the noise tensors by the generator's state. The last of ten steps never adds noise."""
    generator, reference = (torch.Generator().manual_seed(0) for _ in range(2))
    options = dict(clean_finish_steps=clean_finish_steps, generator=generator)
    sample(gaussian_denoiser(LINEAR), noise(4), LINEAR, "ancestral", 10, **options)
    for _ in range(noisy_steps):
        assert not torch.equal(reference.get_state(), generator.get_state())
        torch.randn(4, 2, 4, 4, generator=reference)
    assert torch.equal(reference.get_state(), generator.get_state())


def test_clean_finish_steps_of_ddim():
    """With eta = 1 and 7 clean steps of 10, the result is that of 3 steps with eta = 1 and then 7 with eta = 0."""
    trajectory, generator = [], torch.Generator().manual_seed(0)
    callback = lambda i, t, z_t, z0: trajectory.append((t, z_t))
    options = dict(eta=1.0, clean_finish_steps=7, generator=generator, callback=callback)
    result = sample(gaussian_denoiser(LINEAR), noise(4), LINEAR, "ddim", 10, **options)
    t, z = trajectory[3]
    for s in [s for s, _ in trajectory[4:]] + [-1]:
        z = ddim_mean(z, gaussian_denoiser(LINEAR)(z, torch.tensor([t])), LINEAR, t, s, 0.0)
        t = s
    torch.testing.assert_close(result, z)


@pytest.mark.parametrize(
    "spacing, expected",
    [("trailing", [999, 799, 599, 399, 199]), ("leading", [800, 600, 400, 200, 0]), ("linspace", [999, 749, 500, 250, 0])],
)
def test_spacings_uniform_in_t(spacing, expected):
    assert timesteps(LINEAR, 5, spacing, sigma_max=1e9) == expected


@pytest.mark.parametrize("steps", [300, 500, 600, 989])
def test_leading_spacing_starts_near_pure_noise(steps):
    """With an exact denoiser of N(1, 0.5²), DDIM from pure noise gives that mean. From t = 499 it would be 0.55."""
    visited = timesteps(COSINE, steps, "leading")
    usable = timesteps(COSINE, 1000)[0] + 1
    assert visited == [i * usable // steps for i in range(steps)][::-1]  # tau_i = floor(c i) of DDIM
    z = sample(gaussian_denoiser(COSINE, 1.0, 0.5), noise(64), COSINE, "ddim", steps, spacing="leading")
    assert float(z.mean()) == pytest.approx(1.0, abs=0.01) and float(z.std()) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("schedule", [LINEAR, COSINE], ids=["linear", "cosine"])
@pytest.mark.parametrize("spacing", ["logsnr", "karras"])
def test_spacings_by_noise_level(spacing, schedule):
    """The timesteps nearest to uniform steps in log(sigma/alpha), or to Karras et al. 2022, eq. 5."""
    visited = timesteps(schedule, 8, spacing)
    high, low = noise_level(schedule, visited[0]), noise_level(schedule, 0)
    assert visited[0] == timesteps(schedule, 1000)[0] and visited[-1] == 0 and len(visited) == 8
    for i, t in enumerate(visited):
        if spacing == "logsnr":
            exact = high * (low / high) ** (i / 7)
        else:
            exact = (high ** (1 / 7) + i / 7 * (low ** (1 / 7) - high ** (1 / 7))) ** 7
        distance = lambda t: abs(math.log(noise_level(schedule, t) / exact))
        assert distance(t) <= min(distance(max(t - 1, 0)), distance(min(t + 1, 999))) + 1e-12, (i, t)
    visited = timesteps(schedule, 1000, spacing)
    assert visited == sorted(set(visited), reverse=True) and 100 < len(visited) < 1000  # neighbors are merged


@pytest.mark.parametrize("schedule", [LINEAR, COSINE], ids=["linear", "cosine"])
@pytest.mark.parametrize("sampler", ["dpmpp_2m", "unipc"])
def test_second_order_solvers_use_logsnr_spacing(sampler, schedule):
    """For data of std 0.1, ten steps give the std within 5 %. With uniform steps in t the error is more than 40 %.

    The exact solution is that of test_ddim_follows_the_ode.
    """
    assert default_spacing(sampler, schedule) == "logsnr"
    assert default_spacing("ddim", schedule) == default_spacing(sampler, FLOW) == "trailing"
    errors = {}
    for spacing in ("logsnr", "trailing"):
        start = timesteps(schedule, 10, spacing)[0]
        alpha, sigma = float(schedule.alpha(start)), float(schedule.sigma(start))
        exact = 0.1 / (alpha**2 * 0.1**2 + sigma**2) ** 0.5
        z = sample(gaussian_denoiser(schedule, 0.0, 0.1), torch.ones(1, 1, 1, 1), schedule, sampler, 10, spacing=spacing)
        errors[spacing] = abs(float(z) / exact - 1)
    assert errors["logsnr"] < 0.05 and errors["trailing"] > 0.4, errors


def test_cosine_starts_at_a_noise_level_of_at_most_70():
    visited = timesteps(COSINE, 1000)
    assert visited[-1] == 0 and 985 <= visited[0] <= 992
    assert noise_level(COSINE, visited[0]) <= 70 < noise_level(COSINE, visited[0] + 1)


def test_threshold_clamps_and_counts():
    threshold = Threshold(torch.tensor([-1.0, -2.0])[:, None, None], torch.ones(2, 1, 1))
    z0 = torch.full((1, 2, 1, 4), -1.5)
    assert threshold(z0).flatten().tolist() == [-1.0] * 4 + [-1.5] * 4
    assert threshold.counts == (4, 8)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0", "velocity"])
def test_denoiser_converts_predictions_to_z0(prediction):
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
def test_invalid_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        sample(gaussian_denoiser(LINEAR), noise(2), LINEAR, **options)

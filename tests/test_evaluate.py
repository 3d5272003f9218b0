"""evaluation.task=samplers: distance, recommendation, and the table of a tiny model."""

import pytest
import torch
from PIL import Image

from evaluation.samplers import SamplerMetrics, recommend, sliced_wasserstein


def test_sliced_wasserstein_of_shifted_latents():
    """A shift c moves projections by <c, d>: |c| / sqrt(dimensions), RMS over random directions."""
    a = torch.randn(300, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    shift = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(1))
    assert sliced_wasserstein(a, a) == 0.0
    assert sliced_wasserstein(a, a + shift) == pytest.approx(float(shift.norm()) / 256**0.5, rel=0.1)
    assert sliced_wasserstein(a, 1.5 * a) == pytest.approx(0.5, rel=0.05)
    other = torch.randn(300, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    assert 0.03 < sliced_wasserstein(a, other) < 0.2


ANCESTRAL = SamplerMetrics("ancestral", 1000, 991, None, 0.99, 0.100, 100.0)


BEST = "ancestral with 991 evaluations"


@pytest.mark.parametrize("rows, expected", [
    (
        [SamplerMetrics("ddim", 50, 50, 0.1, 0.98, 0.104, 5.0), SamplerMetrics("unipc", 20, 20, 0.1, 0.99, 0.103, 2.0)],
        f"unipc, 20 steps: distance 3.0% above that of {BEST}, in 2.0% of its time",
    ),
    ([SamplerMetrics("ddim", 20, 20, 0.1, 0.95, 0.101, 2.0), SamplerMetrics("unipc", 50, 50, 0.1, 0.99, 0.103, 5.0)], "unipc, 50 steps"),
    ([SamplerMetrics("ddim", 20, 20, 0.1, 0.95, 0.101, 2.0)], "no sampler this close has a std ratio in 0.97"),
    (
        [SamplerMetrics("heun", 1000, 1981, 0.1, 0.95, 0.101, 200.0)],
        f"no cheaper sampler has a distance within 5% of {BEST}",
    ),
    (
        [SamplerMetrics("ddim", 20, 20, 0.1, 0.95, 0.2, 2.0)],
        f"no cheaper sampler has a distance within 5% of {BEST}; the closest is ddim",
    ),
])  # fmt: skip
def test_recommendation(rows, expected):
    assert expected in recommend([ANCESTRAL, *rows])


def test_comparison_of_samplers_on_a_tiny_model(trained, capsys):
    argv = (
        "evaluation.task=samplers",
        "evaluation.steps=[4,20]",
        "evaluation.samplers=[ancestral,ddim,euler,unipc]",
        "evaluation.num_images=12",
        "evaluation.batch_size=5",
    )
    assert trained.run("evaluate", *argv) == 0
    assert "recommendation: " in capsys.readouterr().out
    lines = (trained.folder / "results" / "tiny_cosine_samplers.md").read_text().splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    rows = {(row[0], row[1]): dict(zip(table[0], row)) for row in table[2:]}
    assert len(rows) == 4 * 2 + 1  # and the reference, heun with the most steps
    assert rows["heun", "20"]["RMS distance to the ODE solution"] == "0.000" and rows["heun", "20"]["evaluations"] == "39"
    assert rows["ancestral", "20"]["RMS distance to the ODE solution"] == "–" and rows["ddim", "4"]["evaluations"] == "4"
    assert (
        rows["ddim", "20"]["RMS distance to the ODE solution"]
        == rows["euler", "20"]["RMS distance to the ODE solution"]
        < rows["ddim", "4"]["RMS distance to the ODE solution"]
    )
    assert Image.open(trained.folder / "results" / "tiny_cosine_samplers.png").width > 600


@pytest.mark.parametrize("option, message", [
    ("evaluation.steps=[5,2000]", "must be at most 1000, the number of timesteps of the model (got 2000)"),
    ("sampling.sigma_max=0.0001", "sigma_max = 0.0001 excludes every timestep"),
    ("evaluation.num_images=5000", "must be at most 48, the number of training latents"),
    ("evaluation.samplers=[dimm]", "'ancestral', 'ddim', 'euler'"),
    ("diffusion.name=none", "does not exist: run train_diffusion.py first"),
])  # fmt: skip
def test_invalid_settings(trained, capsys, option, message):
    assert trained.run("evaluate", "evaluation.task=samplers", option) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and message in error[0], error


def test_dry_run_prints_the_plan(trained, capsys):
    options = ("evaluation.task=samplers", "evaluation.steps=[7]", "evaluation.num_images=12")
    assert trained.run("evaluate", "--dry-run", *options) == 0
    assert "with 7 steps" in capsys.readouterr().out

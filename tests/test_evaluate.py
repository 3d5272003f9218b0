"""The sampler bench: its distance against a closed form, its advice by hand, its table from a real run."""

import pytest
import torch
from PIL import Image

from metrics.sampler_bench import Row, advice, sliced_wasserstein


def test_distance_of_a_shift():
    """Projections of a shifted set are shifted by <c, d>: over random directions that is |c| / sqrt(dimensions), RMS."""
    a = torch.randn(300, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    shift = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(1))
    assert sliced_wasserstein(a, a) == 0.0
    assert sliced_wasserstein(a, a + shift) == pytest.approx(float(shift.norm()) / 256**0.5, rel=0.1)
    assert sliced_wasserstein(a, 1.5 * a) == pytest.approx(0.5, rel=0.05)  # every projection has half its std more
    other = torch.randn(300, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    assert 0.03 < sliced_wasserstein(a, other) < 0.2  # two draws of the same: the floor


ANCESTRAL = Row("ancestral", 1000, 991, None, 0.99, 0.100, 100.0)


@pytest.mark.parametrize("rows, expected", [
    ([Row("ddim", 50, 50, 0.1, 0.98, 0.104, 5.0), Row("unipc", 20, 20, 0.1, 0.99, 0.103, 2.0)], "unipc, 20 steps: a distance 3.0% above that of ancestral with 991 evaluations, in 2.0% of its time"),
    ([Row("ddim", 20, 20, 0.1, 0.95, 0.101, 2.0), Row("unipc", 50, 50, 0.1, 0.99, 0.103, 5.0)], "unipc, 50 steps"),  # calibrated first
    ([Row("ddim", 20, 20, 0.1, 0.95, 0.101, 2.0)], "no std ratio lies in 0.97"),
    ([Row("heun", 1000, 1981, 0.1, 0.95, 0.101, 200.0)], "nothing cheaper comes within 5% of ancestral with 991 evaluations"),
    ([Row("ddim", 20, 20, 0.1, 0.95, 0.2, 2.0)], "nothing cheaper comes within 5% of ancestral with 991 evaluations; nearest is ddim"),
])  # fmt: skip
def test_advice(rows, expected):
    assert expected in advice([ANCESTRAL, *rows])


def test_bench_of_a_tiny_model(trained, capsys):
    argv = (
        "evaluation.task=samplers",
        "evaluation.steps=[4,20]",
        "evaluation.samplers=[ancestral,ddim,euler,unipc]",
        "evaluation.images=12",
        "evaluation.batch_size=5",
    )
    assert trained.run("evaluate", *argv) == 0
    assert "advice: " in capsys.readouterr().out
    lines = (trained.folder / "results" / "tiny_cosine_samplers.md").read_text().splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    rows = {(row[0], row[1]): dict(zip(table[0], row)) for row in table[2:]}
    assert len(rows) == 4 * 2 + 1  # heun at the most steps is the reference
    assert rows["heun", "20"]["to the ODE"] == "0.000" and rows["heun", "20"]["evaluations"] == "39"
    assert rows["ancestral", "20"]["to the ODE"] == "–" and rows["ddim", "4"]["evaluations"] == "4"
    assert rows["ddim", "20"]["to the ODE"] == rows["euler", "20"]["to the ODE"] < rows["ddim", "4"]["to the ODE"]
    assert Image.open(trained.folder / "results" / "tiny_cosine_samplers.png").width > 600


@pytest.mark.parametrize("option, message", [
    ("evaluation.steps=[5,2000]", "2000 is more than the model's T = 1000"),
    ("sampling.sigma_max=0.0001", "no timestep has sigma/alpha <= sigma_max"),
    ("evaluation.images=5000", "more than the 48 training latents"),
    ("evaluation.samplers=[dimm]", "'ancestral', 'ddim', 'euler'"),
    ("diffusion.name=none", "does not exist: run train_diffusion.py first"),
])  # fmt: skip
def test_bad_input(trained, capsys, option, message):
    assert trained.run("evaluate", "evaluation.task=samplers", option) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and message in error[0], error


def test_dry_run_measures_nothing(trained, capsys):
    assert (
        trained.run("evaluate", "--dry-run", "evaluation.task=samplers", "evaluation.steps=[7]", "evaluation.images=12") == 0
    )
    assert "at 7 steps" in capsys.readouterr().out

"""Metrics against known values, and the tasks of evaluate.py on a tiny experiment."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import Hostile
from PIL import Image

from dataset.image_cache import load_images
from evaluation import reconstruction, reports
from evaluation.denoising import denoising_error
from evaluation.features import Features, frechet, kid, make_features, precision_recall
from evaluation.generation import NEAR_QUANTILE, NUM_NEIGHBORS, Memorization, SetMetrics, error_budget
from evaluation.latents import verdict
from models.normalizer import Normalizer
from models.schedules import make_schedule
from pipeline.stage_files import load_images_for, load_vae
from sampling import make_denoiser
from utils.errors import UserError
from utils.settings import load_config

CPU = torch.device("cpu")


def normal(n=400, d=8, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Distances


def test_error_budget_of_identical_images():
    same = torch.ones(16, 8)
    val, generated = SetMetrics.measure("", same, same), SetMetrics.measure("", normal(16).float(), same)
    assert error_budget(generated, val, val) == "No error budget: validation images do not differ from training images."
    assert "is 2.00 times" in error_budget(SetMetrics("", 8, 4.0, 0, 0, 0, 0), *[SetMetrics("", 8, 2.0, 0, 0, 0, 0)] * 2)


def test_frechet_against_closed_form():
    """Same covariance: the squared shift. Same mean and features times s: (s - 1)² times the trace of the covariance."""
    a, shift = normal(), torch.arange(8.0).double()
    assert frechet(a, a) == pytest.approx(0.0, abs=1e-6)
    assert frechet(a, a + shift) == pytest.approx(float(shift.square().sum()), rel=1e-6)
    centered = a - a.mean(dim=0)
    assert frechet(centered, 3 * centered) == pytest.approx(4 * float(torch.cov(a.T).trace()), rel=1e-6)


def test_kid_is_unbiased_and_detects_a_shift():
    same, std = kid(normal(seed=0), normal(seed=1))
    assert abs(same) < 3 * std / 10 + 0.05 and kid(normal(seed=0), normal(seed=1) + 1)[0] > 10 * abs(same)


def test_precision_and_recall_extremes():
    a = normal(200, 3)
    assert precision_recall(a, a) == (1.0, 1.0) and precision_recall(a, a + 100) == (0.0, 0.0)
    half = torch.cat([a[:100], a[:100] + 100])  # half are far from every real point
    precision, recall = precision_recall(half, a)
    assert precision == 0.5 and 0.5 <= recall <= 1.0


@pytest.fixture(scope="module")
def mobilenet(tmp_path_factory):
    from torchvision.models import mobilenet_v2

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "mobilenet.pth"
    torch.save(mobilenet_v2().state_dict(), path)
    return path


def test_keras_weights_use_the_padding_of_keras(mobilenet):
    """Output (0, 0) of a strided 3x3 convolution sees pixels 0 … 2 in Keras, 0 … 1 in torch."""
    networks = [make_features(name, str(mobilenet), CPU) for name in ("mobilenet_v2", "mobilenet_v2_keras")]
    pixels = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    features = [network(pixels, 3) for network in networks]
    assert all(f.shape == (3, 1280) for f in features)
    assert not torch.allclose(*(f / f.max() for f in features), atol=0.01)  # random weights give tiny features
    assert networks[0].name != networks[1].name
    torch.testing.assert_close(networks[0](pixels[1:2], 1), features[0][1:2], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name, weights, message", [
    ("inception", "none.pth", "evaluation.features=inception: its weights cannot be loaded"),
    ("mobilenet_v2", "none.pth", "name a local file with evaluation.weights=FILE"),
    ("mobilenet_v2_keras", None, "has no download"),
])  # fmt: skip
def test_missing_feature_weights(name, weights, message):
    with pytest.raises(UserError, match=message):
        make_features(name, weights, CPU)


def test_memorization_finds_a_copy():
    """Generated image 7 is training image 20: it comes first, although the median does not show it."""
    train, generated, val = normal(30, seed=1).float(), normal(15, seed=2).float(), normal(40, seed=3).float()
    generated[7] = train[20]
    memorization = Memorization.measure(generated, val, train)
    first, neighbors = memorization.nearest[0]
    assert (first, neighbors[0]) == (7, 20) and len(neighbors) == NUM_NEIGHBORS and memorization.near >= 1 / 15
    distances = torch.cdist(generated, train).min(dim=1).values
    assert memorization.median == pytest.approx(float(distances.median()))
    assert [i for i, _ in memorization.nearest] == distances.argsort().tolist()
    none = Memorization.measure(val, val, train)
    assert none.near == pytest.approx(NEAR_QUANTILE, abs=1 / 40) and none.median == none.val_median


# Latents and loss


def make_normalizer(std=(1.0, 1.0), kurtosis=(0.0, 0.0)) -> Normalizer:
    zeros = torch.zeros(2)
    return Normalizer(zeros, zeros + 1, zeros, torch.tensor(std), torch.tensor(kurtosis), zeros - 3, zeros + 3)


@pytest.mark.parametrize("normalizer, psnr, expected", [
    (make_normalizer(), 30.0, "GO"),
    (make_normalizer(std=(1.0, 0.01)), 30.0, r"NO-GO: channels \[1\] are unused"),
    (make_normalizer(), 18.0, "NO-GO: the VAE reconstructs at 18.0 dB"),
    (make_normalizer(kurtosis=(0.0, 25.0)), 30.0, r"NO-GO: channels \[1\] have heavy tails"),
    (make_normalizer(std=(1.0, 0.2)), 30.0, "GO, with a caveat: the largest channel std is 5.0 times the smallest"),
])  # fmt: skip
def test_verdicts(normalizer, psnr, expected):
    assert re.match(expected, verdict(normalizer, psnr))


@pytest.mark.parametrize(
    "schedule, prediction", [("cosine", "v"), ("linear", "eps"), ("flow", "velocity"), ("scaled_linear", "eps")]
)
def test_optimal_denoiser_for_unit_gaussians_has_relative_error_one(schedule, prediction):
    """The optimal linear denoiser, expressed in each prediction type, has relative error 1 in every bin."""
    table = make_schedule(schedule)

    def net(z_t, t):
        alpha, sigma = (f(t).float()[:, None, None, None] for f in (table.alpha, table.sigma))
        z0 = alpha / (alpha**2 + sigma**2) * z_t
        eps = (z_t - alpha * z0) / sigma
        return {"eps": eps, "v": alpha * eps - sigma * z0, "velocity": eps - z0}[prediction]

    def make_model(model_schedule):
        denoise = make_denoiser(net, model_schedule, prediction, CPU)
        return SimpleNamespace(schedule=model_schedule, denoiser=lambda cfg, cond: denoise)

    z = torch.randn(200, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    bins = denoising_error(make_model(table), z, (), 64)
    assert denoising_error(make_model(make_schedule(schedule, 5)), z, (), 64)
    # scaled_linear covers only 3.53 … -2.68
    assert [b.center for b in bins] == list(range(4, -5, -1) if schedule != "scaled_linear" else range(3, -3, -1))
    assert [b.relative_error for b in bins] == pytest.approx([1.0] * len(bins), abs=0.03)
    for b in bins:
        first, last = [float((table.alpha(t) / table.sigma(t)).log()) for t in (b.first_t, b.last_t)]
        assert b.center + 0.5 >= first >= last >= b.center - 0.5


# Tasks on the tiny experiment


@pytest.mark.parametrize("task, files", [
    ("generation", ["tiny_cosine_ddim4_generation.md", "tiny_cosine_ddim4_generation_nearest.png"]),
    ("reconstruction", ["tiny_reconstruction.md", "tiny_reconstruction.png"]),
    ("latents", ["tiny_latents.md"]),
    ("loss", ["tiny_cosine_loss.md"]),
])  # fmt: skip
def test_tasks(trained, mobilenet, capsys, task, files):
    argv = (
        f"evaluation.task={task}",
        "evaluation.features=mobilenet_v2",
        f"evaluation.weights={mobilenet}",
        "evaluation.num_images=8",
    )
    assert trained.run("evaluate", *argv) == 0
    out = capsys.readouterr().out
    report = (trained.folder / "results" / files[0]).read_text()
    assert report.split("\n\n`python")[0] in out and f"evaluation.task={task}" in report
    assert all((trained.folder / "results" / file).exists() for file in files)
    if task == "generation":
        assert "MobileNetV2" in report and "| validation images | 8 |" in report and "Error budget" in report
        assert len(list((trained.folder / "runs" / "cache").glob("features-*.pt"))) == 2  # one of mirrored images
    if task == "reconstruction":
        images = load_images(load_config(trained.config, trained.argv()[1:]))
        grid = np.asarray(Image.open(trained.folder / "results" / files[1]))
        assert np.array_equal(grid[:16, :16], images.pixels[images.rows(1)[0]])  # originals in the first row


def test_reports_of_other_weights_or_commands_are_kept(tmp_path, monkeypatch, capsys):
    config = load_config(None, [f"results_dir={tmp_path}"])
    for command, origin in (("a", "step 1"), ("a", "step 1"), ("a", "step 2"), ("b", "step 2")):
        monkeypatch.setattr(reports.cli, "command", command)
        reports.write_report(config, "page", CPU, origin, f"# {command} {origin}")
    pages = {path.name: path.read_text().splitlines() for path in tmp_path.iterdir()}
    assert {name: lines[0] for name, lines in pages.items()} == {
        "page-2.md": "# a step 1",
        "page-3.md": "# a step 2",
        "page.md": "# b step 2",
    }
    source = pages["page.md"][2]
    assert source.startswith("`b`, step 2, on ") and source.endswith(f"commit {reports.cli.commit()}.")


def test_too_few_validation_images(trained, capsys, mobilenet, monkeypatch):
    monkeypatch.setattr(reconstruction, "MIN_VAL_IMAGES", 62)
    argv = ("evaluation.features=mobilenet_v2", f"evaluation.weights={mobilenet}")
    assert trained.run("evaluate", *argv) == 2
    assert "evaluation needs at least 62 validation images" in capsys.readouterr().err


def test_features_keep_their_order():
    features = Features("mean", lambda x: x.float().mean(dim=(2, 3)), CPU)
    pixels = np.arange(10, dtype=np.uint8)[:, None, None, None].repeat(4, 1).repeat(4, 2).repeat(3, 3)
    assert features(pixels, 3)[:, 0].tolist() == list(range(10))
    assert features(pixels, 2, rows=np.array([7, 1, 4])).tolist() == [[7.0] * 3, [1.0] * 3, [4.0] * 3]
    left_column = Features("left column", lambda x: x[..., 0].float().mean(dim=2), CPU)
    pixels[:, :, -1] = 100
    assert left_column(pixels, 3)[:, 0].tolist() == list(range(10))
    assert left_column(pixels, 3, mirrored=True)[:, 0].tolist() == [100.0] * 10


def test_inception_from_a_local_file(tmp_path):
    """torch-fidelity's network with random weights computes features of uint8 images; pickled code is refused."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class RandomWeights(FeatureExtractorInceptionV3):
        def load_state_dict(self, state):
            return super().load_state_dict({**self.state_dict(), **state})

    path = tmp_path / "inception.pth"
    torch.save({}, path)
    torch.manual_seed(0)
    torch.save(RandomWeights("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path)).state_dict(), path)
    features = make_features("inception", str(path), CPU)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    values = features(pixels, 2)
    assert values.shape == (3, 2048) and features.name == "Inception" and values.std() > 0
    torch.testing.assert_close(features(pixels[2:], 1), values[2:], rtol=1e-3, atol=1e-5)
    torch.save({"weights": Hostile(tmp_path / "canary")}, path)
    with pytest.raises(UserError, match="its weights cannot be loaded"):
        make_features("inception", str(path), CPU)
    assert not (tmp_path / "canary").exists()


def test_more_generated_than_validation_images(trained, mobilenet):
    """Sets of equal size are compared; a row of its own has all generated images."""
    argv = (
        "evaluation.task=generation",
        "evaluation.features=mobilenet_v2",
        f"evaluation.weights={mobilenet}",
        "evaluation.num_images=30",
    )
    assert trained.run("evaluate", *argv) == 0
    report = (trained.folder / "results" / "tiny_cosine_ddim4_generation.md").read_text()
    num_val = int(report.split("| validation images | ")[1].split(" |")[0])
    assert num_val < 30 and f"| generated | {num_val} |" in report and "| generated, all | 30 |" in report
    assert f"{num_val} images are fewer than the 1,280 features" in report
    assert "48 training images and their mirror images" in report


def test_psnr_and_ssim_equal_those_logged_in_training(trained):
    config = load_config(str(trained.config), trained.argv()[1:])
    vae, metadata = load_vae(config, CPU)
    originals = reconstruction.val_pixels(load_images_for(config, metadata), 100)
    reconstructions = reconstruction.reconstruct(vae, originals, 8, CPU, torch.float32)
    psnr, ssim = reconstruction.psnr_ssim(reconstructions, originals, 3)
    assert (psnr, ssim) == pytest.approx(reconstruction.psnr_ssim(reconstructions, originals, 100), rel=1e-5)
    logged = json.loads((trained.run_dir / "vae" / "metrics.jsonl").read_text().splitlines()[-1])
    assert logged["val/psnr"] == pytest.approx(psnr, abs=0.05)
    assert logged["val/ssim"] == pytest.approx(ssim, abs=0.003)

"""evaluate.py's other tasks: distances with known answers, verdicts by hand, and every task on the tiny experiment."""

import json
import types

import numpy as np
import pytest
import torch
from conftest import Hostile
from PIL import Image

import evaluate
from lab.errors import UserError
from lab.settings import load_config
from latent_diffusion import images_of, load_vae
from metrics import judging
from metrics.features import Features, frechet, kid, make_features, precision_recall
from models.latents import Normaliser
from models.schedules import make_schedule

CPU = torch.device("cpu")


def normal(n=400, d=8, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Distances


def test_frechet_by_closed_form():
    """Same covariance: the squared shift. Same mean, features times s: (s - 1)² tr of the covariance."""
    a, shift = normal(), torch.arange(8.0).double()
    assert frechet(a, a) == pytest.approx(0.0, abs=1e-6)
    assert frechet(a, a + shift) == pytest.approx(float(shift.square().sum()), rel=1e-6)
    centred = a - a.mean(dim=0)
    assert frechet(centred, 3 * centred) == pytest.approx(4 * float(torch.cov(a.T).trace()), rel=1e-6)


def test_kid_is_unbiased_and_notices_a_shift():
    same, std = kid(normal(seed=0), normal(seed=1))
    assert abs(same) < 3 * std / 10 + 0.05 and kid(normal(seed=0), normal(seed=1) + 1)[0] > 10 * abs(same)


def test_precision_and_recall_at_their_ends():
    a = normal(200, 3)
    assert precision_recall(a, a) == (1.0, 1.0) and precision_recall(a, a + 100) == (0.0, 0.0)
    half = torch.cat(
        [a[:100], a[:100] + 100]
    )  # half of what is made is far from anything real; what is real is half covered or more
    precision, recall = precision_recall(half, a)
    assert precision == 0.5 and 0.5 <= recall <= 1.0


@pytest.fixture(scope="module")
def mobilenet(tmp_path_factory):
    from torchvision.models import mobilenet_v2

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "mobilenet.pth"
    torch.save(mobilenet_v2().state_dict(), path)
    return path


def test_keras_weights_are_padded_as_keras_does(mobilenet):
    """A strided 3x3 convolution of Keras pads right and below: its output at (0, 0) sees pixels 0 … 2, torch's sees 0 … 1."""
    kinds = [make_features(name, str(mobilenet), CPU) for name in ("mobilenet_v2", "mobilenet_v2_keras")]
    pixels = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    found = [f(pixels, 3) for f in kinds]
    assert all(f.shape == (3, 1280) for f in found)
    assert not torch.allclose(*(f / f.max() for f in found), atol=0.01)  # random weights give tiny features
    assert kinds[0].name != kinds[1].name
    torch.testing.assert_close(kinds[0](pixels[1:2], 1), found[0][1:2], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name, weights, message", [
    ("inception", "none.pth", "evaluation.features=inception: its weights cannot be loaded"),
    ("mobilenet_v2", "none.pth", "name a local file with evaluation.weights=FILE"),
    ("mobilenet_v2_keras", None, "has no download"),
])  # fmt: skip
def test_missing_feature_weights(name, weights, message):
    with pytest.raises(UserError, match=message):
        make_features(name, weights, CPU)


def test_memorisation_finds_a_copy():
    """Generated picture 7 is training picture 20: it comes first, and one of 15 lies nearer than held-out ones do, which the
    medians do not show."""
    training, made, held_out = normal(30, seed=1).float(), normal(15, seed=2).float(), normal(40, seed=3).float()
    made[7] = training[20]
    found = judging.Memorisation.of(made, held_out, training)
    first, neighbours = found.nearest[0]
    assert (first, neighbours[0]) == (7, 20) and len(neighbours) == judging.SHOWN_NEIGHBOURS and found.near >= 1 / 15
    distances = torch.cdist(made, training).min(dim=1).values
    assert (
        found.median == pytest.approx(float(distances.median()))
        and [i for i, _ in found.nearest] == distances.argsort().tolist()
    )
    none = judging.Memorisation.of(held_out, held_out, training)
    assert none.near == pytest.approx(judging.NEAR, abs=1 / 40) and none.median == none.median_held_out


# Latents and loss


def card_of(std=(1.0, 1.0), kurtosis=(0.0, 0.0)) -> Normaliser:
    zeros = torch.zeros(2)
    return Normaliser(zeros, zeros + 1, zeros, torch.tensor(std), torch.tensor(kurtosis), zeros - 3, zeros + 3)


@pytest.mark.parametrize("normaliser, ceiling, expected", [
    (card_of(), 30.0, "GO"),
    (card_of(std=(1.0, 0.01)), 30.0, r"NO-GO: channels \[1\] carry nothing"),
    (card_of(), 18.0, "NO-GO: the VAE reconstructs at 18.0 dB"),
    (card_of(kurtosis=(0.0, 25.0)), 30.0, r"NO-GO: channels \[1\] have heavy tails"),
    (card_of(std=(1.0, 0.2)), 30.0, "GO, with care: the widest channel has 5.0 times"),
])  # fmt: skip
def test_verdicts(normaliser, ceiling, expected):
    import re

    assert re.match(expected, judging.verdict(normaliser, ceiling))


@pytest.mark.parametrize(
    "schedule, prediction", [("cosine", "v"), ("linear", "eps"), ("flow", "velocity"), ("scaled_linear", "eps")]
)
def test_knowing_only_the_variance_scores_one(schedule, prediction):
    """The best linear guess for unit Gaussian latents, said in each kind of prediction, scores 1 at every timestep."""
    table = make_schedule(schedule)

    def net(z_t, t, _raw):
        alpha, sigma = (f(t).float()[:, None, None, None] for f in (table.alpha, table.sigma))
        z0 = alpha / (alpha**2 + sigma**2) * z_t
        eps = (z_t - alpha * z0) / sigma
        return {"eps": eps, "v": alpha * eps - sigma * z0, "velocity": eps - z0}[prediction]

    model = types.SimpleNamespace(
        schedule=table, unet=net, header={"prediction": prediction}, device=CPU, dtype=torch.float32
    )
    z = torch.randn(200, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    found = judging.loss_by_snr(model, z, None, 64)
    # scaled_linear goes from 3.53 to -2.68 only
    assert judging.loss_by_snr(types.SimpleNamespace(**{**vars(model), "schedule": make_schedule(schedule, 5)}), z, None, 64)
    assert [row[0] for row in found] == list(range(4, -5, -1) if schedule != "scaled_linear" else range(3, -3, -1))
    assert [row[4] for row in found] == pytest.approx([1.0] * len(found), abs=0.03)
    for middle, first, last, *_ in found:
        ends = [float((table.alpha(t) / table.sigma(t)).log()) for t in (first, last)]
        assert middle + 0.5 >= ends[0] >= ends[1] >= middle - 0.5


# Every task on the tiny experiment


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
        "evaluation.images=8",
    )
    assert trained.run("evaluate", *argv) == 0
    out = capsys.readouterr().out
    page = (trained.folder / "results" / files[0]).read_text()
    assert page.split("\n\n`python")[0] in out and f"evaluation.task={task}" in page
    assert all((trained.folder / "results" / file).exists() for file in files)
    if task == "generation":
        assert "MobileNetV2" in page and "held-out (perfection) | 8 |" in page and "Error budget" in page
        assert len(list((trained.folder / "runs" / "cache").glob("features-*.pt"))) == 2  # and of mirrored images
    if task == "reconstruction":
        from data import load_images
        from lab.settings import load_config

        images = load_images(load_config(trained.config, trained.argv()[1:]))
        sheet = np.asarray(Image.open(trained.folder / "results" / files[1]))
        assert np.array_equal(sheet[:16, :16], images.pixels[images.rows(1)[0]])  # originals above


def test_pages_of_other_weights_or_commands_are_kept(tmp_path, monkeypatch, capsys):
    config = load_config(None, [f"results_dir={tmp_path}"])
    for command, of in (("a", "step 1"), ("a", "step 1"), ("a", "step 2"), ("b", "step 2")):
        monkeypatch.setattr(evaluate.cli, "command", command)
        evaluate.publish(config, "page", CPU, of, f"# {command} {of}")
    pages = {path.name: path.read_text().splitlines() for path in tmp_path.iterdir()}
    assert {name: lines[0] for name, lines in pages.items()} == {
        "page-2.md": "# a step 1",
        "page-3.md": "# a step 2",
        "page.md": "# b step 2",
    }
    assert pages["page.md"][2].startswith("`b`, step 2, on ") and pages["page.md"][2].endswith(
        f"commit {evaluate.cli.commit()}."
    )


def test_too_few_held_out_images(trained, capsys, mobilenet, monkeypatch):
    monkeypatch.setattr(judging, "SHOWN_NEIGHBOURS", 30)
    argv = ("evaluation.features=mobilenet_v2", f"evaluation.weights={mobilenet}")
    assert trained.run("evaluate", *argv) == 2 and "too few to judge by" in capsys.readouterr().err


def test_features_keep_their_order():
    features = Features("mean", lambda x: x.float().mean(dim=(2, 3)), CPU)
    pixels = np.arange(10, dtype=np.uint8)[:, None, None, None].repeat(4, 1).repeat(4, 2).repeat(3, 3)
    assert features(pixels, 3)[:, 0].tolist() == list(range(10))
    assert features(pixels, 2, rows=np.array([7, 1, 4])).tolist() == [[7.0] * 3, [1.0] * 3, [4.0] * 3]
    left = Features("the left column", lambda x: x[..., 0].float().mean(dim=2), CPU)
    pixels[:, :, -1] = 100
    assert (
        left(pixels, 3)[:, 0].tolist() == list(range(10)) and left(pixels, 3, mirrored=True)[:, 0].tolist() == [100.0] * 10
    )


def test_inception_takes_pictures_as_they_are(tmp_path):
    """torch-fidelity's network from a local file, here of random weights: features of (N, 3, H, W) bytes; no hostile file."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Unloaded(FeatureExtractorInceptionV3):
        def load_state_dict(self, state):
            return super().load_state_dict({**self.state_dict(), **state})

    path = tmp_path / "inception.pth"
    torch.save({}, path)
    torch.manual_seed(0)
    torch.save(Unloaded("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path)).state_dict(), path)
    features = make_features("inception", str(path), CPU)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    found = features(pixels, 2)
    assert found.shape == (3, 2048) and features.name == "Inception" and found.std() > 0
    torch.testing.assert_close(features(pixels[2:], 1), found[2:], rtol=1e-3, atol=1e-5)
    torch.save({"weights": Hostile(tmp_path / "canary")}, path)
    with pytest.raises(UserError, match="its weights cannot be loaded"):
        make_features("inception", str(path), CPU)
    assert not (tmp_path / "canary").exists()


def test_too_many_generated_for_the_held_out_ones(trained, mobilenet):
    """Distances are compared at the number of held-out pictures; those of all generated ones stand in a row of their own."""
    argv = (
        "evaluation.task=generation",
        "evaluation.features=mobilenet_v2",
        f"evaluation.weights={mobilenet}",
        "evaluation.images=30",
    )
    assert trained.run("evaluate", *argv) == 0
    page = (trained.folder / "results" / "tiny_cosine_ddim4_generation.md").read_text()
    held_out = int(page.split("held-out (perfection) | ")[1].split(" |")[0])
    assert held_out < 30 and f"| generated | {held_out} |" in page and "| generated, all | 30 |" in page
    assert (
        f"{held_out} pictures are fewer than the 1,280 features" in page and "48 training images and their mirrors" in page
    )


def test_the_judge_and_the_log_of_training_agree(trained):
    config = load_config(str(trained.config), trained.argv()[1:])
    vae, header = load_vae(config, CPU)
    originals = judging.held_out_pixels(images_of(config, header), 100)
    made = judging.through(vae, originals, 8, CPU, torch.float32)
    figures = judging.fidelity(made, originals, 3)
    assert figures == pytest.approx(judging.fidelity(made, originals, 100), rel=1e-5)
    logged = json.loads((trained.run_dir / "vae" / "metrics.jsonl").read_text().splitlines()[-1])
    assert logged["held_out/psnr"] == pytest.approx(figures["psnr"], abs=0.05)
    assert logged["held_out/ssim"] == pytest.approx(figures["ssim"], abs=0.003)

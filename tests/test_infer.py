"""infer.py: image-to-image, inpainting, slerp, and output files. test_pipeline.py covers the rest of stage 4."""

import shlex
from pathlib import Path

import numpy as np
import pytest
from conftest import noise_image
from PIL import Image

import infer
from utils import cli
from utils.checkpoints import load_weights, save_weights
from utils.images import LINE_HEIGHT, MAX_TITLE_LINES, image_grid

ROW_OF_3 = ("sampling.rows=1", "sampling.cols=3")
ROW_OF_2 = ("sampling.rows=1", "sampling.cols=2")


@pytest.fixture
def face(tmp_path):
    path = tmp_path / "face.png"
    noise_image(0, 16, 16).save(path)
    return path


@pytest.fixture
def white_mask(tmp_path):
    """A mask that keeps nothing."""
    path = tmp_path / "mask.png"
    Image.new("L", (16, 16), 255).save(path)
    return path


def cells(path, size=16, gap=2):
    """Images of a grid, row by row: (N, size, size, 3)."""
    grid = np.asarray(Image.open(path))
    rows, cols = (-(-n // (size + gap)) for n in grid.shape[:2])
    at = lambda i: slice(i * (size + gap), i * (size + gap) + size)
    return np.stack([grid[at(r), at(c)] for r in range(rows) for c in range(cols)])


def grid_path(trained, name):
    return trained.folder / "results" / f"tiny_cosine_{name}.png"


def test_inpainting_keeps_the_pixels_outside_the_mask(trained, face, tmp_path):
    mask = np.zeros((16, 16), dtype=np.uint8)
    mask[9:, :] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    options = ("sampling.strength=1", f"sampling.image={face}", f"sampling.mask={tmp_path}/mask.png")
    assert trained.run("infer", *ROW_OF_3, *options) == 0
    images, original = cells(grid_path(trained, "ddim_1x3_inpaint_face")), np.asarray(Image.open(face))
    assert len(images) == 3 and all(np.array_equal(image[:9], original[:9]) for image in images)
    assert not any(np.array_equal(image[9:], original[9:]) for image in images)
    assert not np.array_equal(images[0], images[1])


def test_small_strength_stays_close_to_the_image(trained, face):
    deviations = []
    for strength in (0.25, 1.0):  # one step of four, or all
        options = (f"sampling.image={face}", f"sampling.strength={strength}", "sampling.batch_size=2")
        assert trained.run("infer", *ROW_OF_3, *options) == 0
        images = cells(grid_path(trained, "ddim_1x3_from_face")).astype(float)
        deviations.append(np.abs(images - images.mean(axis=0)).mean())
    assert deviations[0] < 0.8 * deviations[1]


def test_default_strength(trained, face, white_mask):
    """0.6 for image-to-image and 1 for inpainting."""

    def run(suffix, *options):
        assert trained.run("infer", *ROW_OF_2, f"sampling.image={face}", *options) == 0
        return cells(grid_path(trained, f"ddim_1x2_{suffix}_face"))

    mask = f"sampling.mask={white_mask}"
    assert np.array_equal(run("inpaint", mask), run("inpaint", mask, "sampling.strength=1"))
    images = run("from")
    assert np.array_equal(images, run("from", "sampling.strength=0.6"))
    assert not np.array_equal(images, run("from", "sampling.strength=1"))


def test_more_images_than_the_grid_holds(trained, capsys):
    assert trained.run("infer", *ROW_OF_2, "sampling.num_images=3") == 2
    assert "sampling.num_images must be at most 2 to fit in the 1x2 grid (got 3)" in capsys.readouterr().err


def test_files_of_other_settings_are_renamed(trained, capsys):
    path, contents = grid_path(trained, "ddim_1x2"), {}
    for seed in (5, 5, 6, 7):
        assert trained.run("infer", *ROW_OF_2, "sampling.trajectory_frames=2", f"sampling.seed={seed}") == 0
        contents[seed] = [path.read_bytes(), path.with_name(path.stem + "_strip.gif").read_bytes()]
    assert "was made with other settings or weights: renamed to tiny_cosine_ddim_1x2-2.png" in capsys.readouterr().out
    for seed, stem in ((5, f"{path.stem}-2"), (6, f"{path.stem}-3"), (7, path.stem)):
        assert contents[seed] == [path.with_name(stem + suffix).read_bytes() for suffix in (".png", "_strip.gif")]
    assert not path.with_name(f"{path.stem}-4.png").exists()


def test_grids_of_a_retrained_unet_are_kept(trained, capsys):
    """The same command with other U-Net weights renames the older grid; with the same weights it replaces the grid."""
    weights_path, path = trained.run_dir / "cosine" / "unet.safetensors", grid_path(trained, "euler_1x2")
    command = ("infer", *ROW_OF_2, "sampling.sampler=euler")
    original = weights_path.read_bytes()
    try:
        assert trained.run(*command) == trained.run(*command) == 0
        assert "renamed" not in capsys.readouterr().out
        older_grid = path.read_bytes()
        tensors, metadata = load_weights(weights_path, "unet", "")
        save_weights(weights_path, tensors | {"conv_out.bias": tensors["conv_out.bias"] + 0.1}, metadata)
        assert trained.run(*command) == 0
    finally:
        weights_path.write_bytes(original)
    assert "was made with other settings or weights: renamed to tiny_cosine_euler_1x2-2.png" in capsys.readouterr().out
    assert path.with_name("tiny_cosine_euler_1x2-2.png").read_bytes() == older_grid != path.read_bytes()


def test_python_example_of_the_readme(trained):
    """It runs, and its images are those of the grid that infer.py writes with the same settings."""
    config_path, *overrides = trained.argv("sampling.rows=2", "sampling.cols=2", "sampling.sampler=heun")
    lines = [line.strip() for line in Path("README.md").read_text(encoding="utf-8").splitlines() if line.startswith("    ")]
    example = "\n".join(lines[lines.index("import torch") :][:7])
    assert 'load_config("configs/demo.yaml")' in example
    variables = {}
    exec(example.replace('"configs/demo.yaml"', f"{config_path!r}, {overrides!r}"), variables)
    assert trained.run("infer", *overrides) == 0
    assert np.array_equal(variables["pixels"], cells(grid_path(trained, "heun_2x2")))


def test_a_grid_contains_its_command(trained):
    argv = trained.argv(*ROW_OF_2, "diffusion.sample_images=4", "diffusion.labels=['hair color', it's]")
    assert infer.main(argv) == 0
    text = Image.open(grid_path(trained, "ddim_1x2")).text
    assert shlex.split(text["command"]) == ["python", "infer.py", *argv] and text["commit"] == cli.commit()


def test_slerp_goes_from_one_seed_to_the_other(trained):
    def run(name, option):
        assert trained.run("infer", "sampling.rows=2", "sampling.cols=3", option) == 0
        return cells(grid_path(trained, name))

    first, last = run("ddim_2x3", "sampling.seed=0"), run("ddim_2x3", "sampling.seed=5")
    between = run("ddim_2x3_slerp0to5", "sampling.slerp_to=5")
    # Row i goes from image i of the first seed to image i of the second, where slerp is exact up to rounding.
    for i in range(2):
        assert np.array_equal(between[3 * i], first[i])
        assert np.abs(between[3 * i + 2].astype(int) - last[i]).max() <= 1
        assert not np.array_equal(between[3 * i + 1], first[i])


@pytest.mark.parametrize("size, black, options, message", [
    ((16, 20), False, (), "face.png must be 16x16, as in the model's images (got 16x20)"),
    ((16, 16), True, (), "is black everywhere"),
    ((16, 16), False, ("sampling.image=none.png",), "cannot read none.png (No such file"),
    ((16, 16), False, ("sampling.image=null",), "sampling.mask needs sampling.image"),
    ((16, 16), False, ("sampling.slerp_to=1",), "are mutually exclusive"),
    ((16, 16), False, ("sampling.image=null", "sampling.mask=null", "sampling.slerp_to=1", "sampling.eta=0.5"), "sampling.slerp_to needs a sampler without added noise"),
])  # fmt: skip
def test_invalid_images(trained, tmp_path, capsys, size, black, options, message):
    noise_image(0, *size).save(tmp_path / "face.png")
    Image.new("L", (16, 16), 0 if black else 255).save(tmp_path / "mask.png")
    assert trained.run("infer", f"sampling.image={tmp_path}/face.png", f"sampling.mask={tmp_path}/mask.png", *options) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and message in error[0], error


def test_mask_of_another_size(trained, face, tmp_path, capsys):
    Image.new("L", (8, 8), 255).save(tmp_path / "mask.png")
    assert trained.run("infer", f"sampling.image={face}", f"sampling.mask={tmp_path}/mask.png") == 2
    assert "mask.png must be 16x16, as in the model's images (got 8x8)" in capsys.readouterr().err


@pytest.mark.parametrize("stem, short", [
    ("my-face.1", "my-face.1"),
    ("图" * 80, "图" * 16),
    ("download_of_a_very_long_title_" * 8, "download_of_a_very_long_title_download_of_a_very"),
    ("cat #2 50%", "cat_2_50_"),
    ("caf\udce9", "caf_"),
])  # fmt: skip
def test_output_names_of_any_image(trained, tmp_path, stem, short):
    path = tmp_path / f"{stem}.png"
    noise_image(0, 16, 16).save(path)
    options = (f"sampling.image={path}", "sampling.trajectory_frames=2", "sampling.save_images=true")
    for _ in range(2):
        assert trained.run("infer", *ROW_OF_2, *options) == 0
    grid = grid_path(trained, f"ddim_1x2_from_{short}")
    assert (
        grid.exists()
        and grid.with_name(f"{grid.stem}_strip.gif").exists()
        and (grid.with_suffix("") / "000001.png").exists()
    )
    assert not grid.with_name(f"{grid.stem}-2.png").exists()


def test_a_long_title_is_shortened():
    image = image_grid(np.zeros((2, 16, 16, 3), dtype=np.uint8), 2, titles=["word " * 10_000])
    assert image.height <= MAX_TITLE_LINES * LINE_HEIGHT + 16
    assert image_grid(np.zeros((2, 16, 16, 3), dtype=np.uint8), 2, titles=["word"]).height == LINE_HEIGHT + 16


def test_overflow_is_one_line(trained, tmp_path, capsys):
    """Autoguidance with the same network: the difference is zero, and zero times infinity is NaN."""
    weights = trained.run_dir / "cosine" / "unet.safetensors"
    options = (f"sampling.autoguidance={weights}", "sampling.guidance=1e39", "sampling.x0_clamp=none")
    assert trained.run("infer", *ROW_OF_2, *options, f"results_dir={tmp_path}") == 2
    assert capsys.readouterr().err.strip().splitlines()[-1] == (
        "error: sampling produced NaN or infinity: use sampling.x0_clamp=range (got none) and a smaller sampling.guidance "
        "(got 1e+39)"
    )
    assert not list(tmp_path.iterdir())

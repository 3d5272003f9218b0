"""infer.py's starts: a picture, a picture with a mask, the way between two seeds. The rest of stage 4 is in test_pipeline.py."""

import numpy as np
import pytest
from conftest import noise_image
from PIL import Image

from utils import cli

WITH = ("sampling.strength=1", "sampling.rows=1", "sampling.cols=3")


@pytest.fixture
def face(tmp_path):
    path = tmp_path / "face.png"
    noise_image(0, 16, 16).save(path)
    return path


def cells(path, size=16, gap=2):
    """The pictures of a grid, row by row: (N, size, size, 3)."""
    whole = np.asarray(Image.open(path))
    rows, cols = (-(-n // (size + gap)) for n in whole.shape[:2])
    at = lambda i: slice(i * (size + gap), i * (size + gap) + size)
    return np.stack([whole[at(r), at(c)] for r in range(rows) for c in range(cols)])


def results(trained, name):
    return trained.folder / "results" / f"tiny_cosine_{name}.png"


def test_a_mask_keeps_the_pictures_own_pixels(trained, face, tmp_path):
    mask = np.zeros((16, 16), dtype=np.uint8)
    mask[9:, :] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    assert trained.run("infer", *WITH, f"sampling.image={face}", f"sampling.mask={tmp_path}/mask.png") == 0
    drawn = cells(results(trained, "ddim_1x3_inpaint_face"))
    given = np.asarray(Image.open(face))
    assert len(drawn) == 3 and all(np.array_equal(d[:9], given[:9]) for d in drawn)
    assert not any(np.array_equal(d[9:], given[9:]) for d in drawn) and not np.array_equal(drawn[0], drawn[1])


def test_little_strength_stays_with_the_picture(trained, face):
    off = []
    for strength in (0.25, 1.0):  # of four steps: the last one, or all
        argv = (*WITH[1:], f"sampling.image={face}", f"sampling.strength={strength}", "sampling.batch_size=2")
        assert trained.run("infer", *argv) == 0
        drawn = cells(results(trained, "ddim_1x3_from_face")).astype(float)
        off.append(np.abs(drawn - drawn.mean(axis=0)).mean())
    assert off[0] < 0.8 * off[1]


def test_a_mask_forgets_what_it_does_not_keep(trained, face, tmp_path):
    """Without a strength a picture is kept to 0.4, and with a mask not at all where it is drawn anew."""
    Image.new("L", (16, 16), 255).save(tmp_path / "mask.png")
    drawn = {}
    for options in ((), ("sampling.strength=1",), ("sampling.strength=0.6",)):
        for mask in ((), (f"sampling.mask={tmp_path}/mask.png",)):
            argv = ("sampling.rows=1", "sampling.cols=2", f"sampling.image={face}", *mask, *options)
            assert trained.run("infer", *argv) == 0
            drawn[bool(mask), options] = cells(results(trained, f"ddim_1x2_{'inpaint' if mask else 'from'}_face"))
    assert np.array_equal(drawn[True, ()], drawn[True, ("sampling.strength=1",)])
    assert np.array_equal(drawn[False, ()], drawn[False, ("sampling.strength=0.6",)])
    assert not np.array_equal(drawn[False, ()], drawn[False, ("sampling.strength=1",)])


def test_pictures_that_would_be_shown_nowhere(trained, capsys):
    assert trained.run("infer", "sampling.rows=1", "sampling.cols=2", "sampling.num_images=3") == 2
    assert "sampling.num_images must be at most 2 to fit in the 1x2 grid (got 3)" in capsys.readouterr().err


def test_a_grid_of_other_settings_is_kept(trained, capsys):
    path, before = results(trained, "ddim_1x2"), {}
    for seed in (5, 5, 6, 7):
        assert trained.run("infer", "sampling.rows=1", "sampling.cols=2", "sampling.trajectory_frames=2", f"sampling.seed={seed}") == 0
        before[seed] = [path.read_bytes(), path.with_name(path.stem + "_strip.gif").read_bytes()]
    assert "has other settings or weights and was renamed to tiny_cosine_ddim_1x2-2.png" in capsys.readouterr().out
    for seed, stem in ((5, f"{path.stem}-2"), (6, f"{path.stem}-3"), (7, path.stem)):
        assert before[seed] == [path.with_name(f"{stem}{ending}").read_bytes() for ending in (".png", "_strip.gif")]
    assert not path.with_name(f"{path.stem}-4.png").exists()


def test_the_command_inside_a_grid_can_be_pasted(trained):
    import shlex

    argv = trained.argv(
        "sampling.rows=1", "sampling.cols=2", "diffusion.sample_images=4", "diffusion.labels=['hair colour', it's]"
    )
    assert __import__("infer").main(argv) == 0
    text = Image.open(results(trained, "ddim_1x2")).text
    assert shlex.split(text["command"]) == ["python", "infer.py", *argv] and text["commit"] == cli.commit()


def test_slerp_goes_from_one_seed_to_the_other(trained):
    for options in ("sampling.slerp_to=5", "sampling.seed=0", "sampling.seed=5"):
        assert trained.run("infer", "sampling.rows=2", "sampling.cols=3", options) == 0
        if options == "sampling.seed=0":
            first = cells(results(trained, "ddim_2x3"))
    last, between = cells(results(trained, "ddim_2x3")), cells(results(trained, "ddim_2x3_slerp0to5"))
    # Row i goes from image i of the one seed to image i of the other. uint8, and slerp's end is exact to rounding.
    for i in range(2):
        assert np.array_equal(between[3 * i], first[i])
        assert np.abs(between[3 * i + 2].astype(int) - last[i]).max() <= 1
        assert not np.array_equal(between[3 * i + 1], first[i])


@pytest.mark.parametrize("size, black, options, message", [
    ((16, 20), False, (), "face.png must be 16x16, the size of the model (got 16x20)"),
    ((16, 16), True, (), "is black everywhere"),
    ((16, 16), False, ("sampling.image=none.png",), "cannot read none.png (No such file"),
    ((16, 16), False, ("sampling.image=null",), "sampling.mask needs sampling.image"),
    ((16, 16), False, ("sampling.slerp_to=1",), "are mutually exclusive"),
    ((16, 16), False, ("sampling.image=null", "sampling.mask=null", "sampling.slerp_to=1", "sampling.eta=0.5"), "sampling.slerp_to needs a sampler without added noise"),
])  # fmt: skip
def test_bad_pictures(trained, tmp_path, capsys, size, black, options, message):
    noise_image(0, *size).save(tmp_path / "face.png")
    Image.new("L", (16, 16), 0 if black else 255).save(tmp_path / "mask.png")
    argv = (f"sampling.image={tmp_path}/face.png", f"sampling.mask={tmp_path}/mask.png", *options)
    assert trained.run("infer", *argv) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and message in error[0], error


def test_a_mask_of_another_size(trained, face, tmp_path, capsys):
    Image.new("L", (8, 8), 255).save(tmp_path / "mask.png")
    assert trained.run("infer", f"sampling.image={face}", f"sampling.mask={tmp_path}/mask.png") == 2
    assert "mask.png must be 16x16, the size of the model (got 8x8)" in capsys.readouterr().err

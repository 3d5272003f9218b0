"""Faces are a pure function of (seed, index), look the same at every size, and match their labels and captions."""

import re

import numpy as np
import pytest

from dataset import synthetic_faces as faces

NAMES = list(faces.ATTRIBUTES)


def attributes_of(row):
    return {name: faces.ATTRIBUTES[name][i] for name, i in zip(NAMES, row)}


@pytest.fixture(scope="module")
def faces_32px():
    """Labels, captions and 32-pixel images of 2,000 faces."""
    indices = np.arange(2000)
    return faces.labels(3, indices), faces.captions(3, indices), faces.render(3, indices, 32)


def downsample(images):
    """Area average of 2 x 2 pixels: (B, 2s, 2s, 3) -> (B, s, s, 3) float64."""
    b, s = len(images), images.shape[1] // 2
    return images.reshape(b, s, 2, s, 2, 3).mean((2, 4))


def test_identical_for_any_batching_and_order():
    indices = np.array([7, 0, 123456789, 41, 41, 2**40, 5, 900, 12, 13, 14])
    whole = faces.render(1, indices, 64)
    assert whole.shape == (11, 64, 64, 3) and whole.dtype == np.uint8
    for i, index in enumerate(indices):
        assert np.array_equal(faces.render(1, indices[i : i + 1], 64)[0], whole[i]), index
    assert np.array_equal(faces.render(1, indices[::-1], 64), whole[::-1])
    # more faces than a chunk holds, rendered by several threads
    assert np.array_equal(faces.render(1, np.arange(80), 64)[37], faces.render(1, np.array([37]), 64)[0])
    assert np.array_equal(faces.labels(1, indices[::-1]), faces.labels(1, indices)[::-1])
    assert faces.captions(1, indices[4:6]) == faces.captions(1, indices)[4:6]


def test_seed_and_index_matter():
    images = np.concatenate([faces.render(seed, np.arange(20), 32) for seed in (0, 1, 2)]).reshape(60, -1)
    assert len(np.unique(images, axis=0)) == 60
    # face i of one seed is not face i + k of another
    rows = np.concatenate([faces.labels(seed, np.arange(200)) for seed in (0, 1)])
    assert len(np.unique(rows, axis=0)) > 390


@pytest.mark.parametrize("size, tolerance", [(16, 8.0), (32, 4.5), (64, 2.5)])
def test_same_face_at_every_size(size, tolerance):
    indices = np.arange(24)
    small, large = faces.render(2, indices, size).astype(float), downsample(faces.render(2, indices, 2 * size))
    distance = np.abs(small[:, None] - large[None]).mean((2, 3, 4))  # (24, 24), all pairs
    assert np.diag(distance).max() < tolerance  # gray levels of 255
    assert (distance.argmin(1) == np.arange(24)).all()
    assert abs((small - large).mean()) < 2  # strokes are equally thick at both sizes


def test_frequencies(faces_32px):
    rows = faces_32px[0]
    assert rows.dtype == np.int64 and rows.shape == (2000, len(NAMES)) and len(NAMES) >= 12
    for k, name in enumerate(NAMES):
        share = np.bincount(rows[:, k], minlength=len(faces.ATTRIBUTES[name])) / 2000
        assert len(share) == len(faces.ATTRIBUTES[name]), name  # in range
        assert share.min() >= 0.04, (name, share)


def test_captions_match_labels(faces_32px):
    rows, captions, _ = faces_32px
    for row, caption in zip(rows, captions):
        face = {name: value.replace("gray", "grey") for name, value in attributes_of(row).items()}  # spelling of captions
        words = set(re.findall(r"[a-z]+", caption))
        assert words.isdisjoint({"no", "yes", "none"}), caption
        person = {"child": {"girl", "boy"}, "adult": {"woman", "man"}, "old": {"woman", "man"}}[face["age"]]
        assert words & {"girl", "boy", "woman", "man"} == {
            p for p in person if (p in ("man", "boy")) == (face["sex"] == "male")
        }
        assert ("old" in words) == (face["age"] == "old")
        assert ("smiling" in words) == (face["smile"] == "yes")
        assert ("open mouth" in caption) == (face["mouth_open"] == "yes")
        for name in ("glasses", "beard", "moustache", "earrings", "freckles", "fringe"):
            assert (name in words) == (face[name] == "yes"), (name, caption)
        assert ("striped" in words) == (face["stripes"] == "yes")
        assert ("hat" in words, "beanie" in words) == (face["hat"] == "sun hat", face["hat"] == "beanie")
        assert f"{face['skin']} skin" in caption and f"{face['eye_color']} eyes" in caption
        assert f"{face['clothes']} shirt" in caption and f"on a {face['background']} background" in caption
        assert ("bald head" in caption) == (face["hair"] == "bald") == (face["hair_color"] == "none")
        if face["hair"] != "bald":
            assert f"{face['hair_color']} hair" in caption and face["hair"] in words, caption
    assert len({w for c in captions for w in re.findall(r"[a-z]+", c)}) < 80  # a closed, small vocabulary


def test_attribute_constraints(faces_32px):
    for face in map(attributes_of, faces_32px[0]):
        if "yes" in (face["beard"], face["moustache"]):
            assert face["sex"] == "male" and face["age"] != "child"
        if face["hat"] != "no":
            assert face["hair"] not in ("bald", "spiky", "bun") and face["fringe"] == "no"


def test_background_color_matches_label(faces_32px):
    rows, _, images = faces_32px
    backdrop, background = rows[:, NAMES.index("backdrop")], rows[:, NAMES.index("background")]
    corner = images[:, 2, 1].astype(float)  # (B, 3) top left, not covered by hair or hat
    (r, g, b), gray = corner.T, np.ptp(corner, axis=1) < 30
    conditions = {
        "blue": (b > g) & (g > r),
        "green": (g > b) & (g > r),
        "pink": (r > b) & (b > g),
        "yellow": (r > g) & (g > b),
        "gray": gray,
        "purple": (b > r) & (r > g),
    }
    for k, name in enumerate(faces.ATTRIBUTES["background"]):
        ok = conditions[name] & (gray == (name == "gray"))
        assert ok[background == k].mean() > 0.99, name
    plain = backdrop == faces.ATTRIBUTES["backdrop"].index("plain")
    top, bottom = images[:, 1, 0].astype(int), images[:, 20, 0].astype(int)  # left edge, above the shoulders
    assert np.abs(top - bottom)[plain].max() == 0
    assert (np.abs(top - bottom).max(1)[~plain] > 3).mean() > 0.99


@pytest.mark.parametrize("name, top, bottom", [("glasses", 22, 46), ("beard", 26, 60), ("hat", 0, 34), ("earrings", 28, 52)])
def test_attribute_changes_only_its_region(monkeypatch, name, top, bottom):
    """Switching an attribute off changes only the faces that have it, in the expected rows."""
    indices = np.arange(96)
    has = faces.labels(0, indices)[:, NAMES.index(name)] > 0
    before = faces.render(0, indices, 64).astype(int)
    appearance = faces._appearance

    def without(seed, indices):
        a, g, c = appearance(seed, indices)
        if name == "hat":
            g["hat_y"] = np.full_like(g["hat_y"], -3)
        return a | {name: 0 * a[name]}, g, c

    monkeypatch.setattr(faces, "_appearance", without)
    change = np.abs(faces.render(0, indices, 64).astype(int) - before).max(3)  # (B, 64, 64)
    assert not change[~has].any()
    assert (change[has] > 40).sum((1, 2)).min() >= 6  # pixels
    rows = np.flatnonzero(change[has].max((0, 2)) > 40)
    assert top <= rows.min() and rows.max() < bottom, (rows.min(), rows.max())


def test_skin_brightness_follows_labels(faces_32px):
    """pale, light, tan, brown, dark: mean gray level of the center of the face."""
    rows, _, images = faces_32px
    middle = images[:, 14:20, 13:19].mean((1, 2, 3))
    means = [middle[rows[:, NAMES.index("skin")] == k].mean() for k in range(5)]
    assert (np.diff(means) < -15).all(), means


def test_clothes_are_visible(monkeypatch):
    indices = np.arange(400)
    before = faces.render(0, indices, 64).astype(int)
    monkeypatch.setattr(faces, "CLOTHES", 255 - faces.CLOTHES)
    changed = np.abs(faces.render(0, indices, 64) - before).max(3) > 24
    share = changed.mean((1, 2))  # of pixels that show clothes
    assert (share > 0.01).mean() > 0.98 and share.min() > 0.004


def test_bad_input():
    with pytest.raises(ValueError, match="size must be at least 16"):
        faces.render(0, np.arange(2), 8)
    for call in (lambda i: faces.render(0, i, 32), lambda i: faces.labels(0, i), lambda i: faces.captions(0, i)):
        with pytest.raises(ValueError, match=r"negative \(got -4\)"):
            call(np.array([3, -4]))
    with pytest.raises(ValueError, match="1-d array of integers"):
        faces.labels(0, np.array([0.5]))
    assert faces.render(0, np.arange(0), 32).shape == (0, 32, 32, 3)

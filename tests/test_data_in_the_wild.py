"""Folders and zips as people have them: other spellings, stray and damaged files, links, bit depths, color profiles, metadata files."""

import io
import json
import os
import re
import struct
import zipfile
import zlib

import numpy as np
import pytest
from conftest import noise_image
from PIL import Image, ImageCms

from dataset import TEST, TRAIN, VAL
from dataset.color import srgb_transform
from dataset.files import Files, decode_image
from dataset.image_cache import index_dataset, load_images
from utils.errors import UserError
from utils.settings import load_config


def settings(tmp_path, path, **data):
    options = {"source": "folder", "image_size": 16, "path": path, **data}
    return load_config(None, [f"runs_dir={tmp_path}/runs", *(f"data.{k}={v}" for k, v in options.items())])


def write_images(folder, names, size=16):
    """Different images, so that fingerprints depend on the order."""
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        noise_image(i, size, size).save(path, "PNG")


def numbered(*folders, n=8):
    return [f"{folder}/{i:02d}.png" for folder in folders for i in range(n)]


def classes_of(source):
    return {name: source.label_names["class"][label] for name, (label,) in zip(source.names, source.labels)}


def account(index):
    return index.describe()[0].removeprefix("dataset: ")


def encoded(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


# Splits and classes


@pytest.mark.parametrize(
    "train, val, test",
    [("train", "valid", "test"), ("Training", "Validation", "Testing"), ("TRAIN", "dev", None), ("train", None, "test")],
)
@pytest.mark.parametrize("layout", ["{split}/{label}", "{label}/{split}", "wrapper/{split}/images/{label}"])
def test_spellings_of_split_folders(tmp_path, train, val, test, layout):
    splits = [split for split in (train, val, test) if split]
    write_images(tmp_path / "in", numbered(*(layout.format(split=s, label=c) for s in splits for c in ("cat", "dog"))))
    source = index_dataset(settings(tmp_path, tmp_path / "in")).source
    expected = {train: TRAIN, val: VAL, test: TEST if val else VAL}
    for name, split in zip(source.names, source.split):
        assert split == next(expected[folder] for folder in name.split("/") if folder in splits)
    assert all(f"/{label}/" in f"/{name}" for name, label in classes_of(source).items())


def test_spellings_of_splits_in_metadata(tmp_path):
    write_images(tmp_path / "in", numbered("."))
    splits = ["train", "Training", "valid", "Val", "dev", "validation", "test", None]
    rows = [{"file_name": f"{i:02d}.png", "text": "x", "split": split} for i, split in enumerate(splits)]
    (tmp_path / "in/captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    write_images(tmp_path / "in", numbered("more"))
    source = index_dataset(settings(tmp_path, tmp_path / "in")).source
    assert source.split[:8].tolist() == [TRAIN, TRAIN, VAL, VAL, VAL, VAL, TEST, TRAIN] and (source.split[8:] == TRAIN).all()


@pytest.mark.parametrize(
    "train, other",
    [("train", "eval"), ("training_set", "test_set"), ("train2017", "val2017"), ("Train Images", "Evaluation")],
)
def test_decorated_names_of_splits(tmp_path, train, other):
    write_images(tmp_path / "in", numbered(f"{train}/cat", f"{train}/dog", f"{other}/cat"))
    source = index_dataset(settings(tmp_path, tmp_path / "in")).source
    assert source.label_names == {"class": ["cat", "dog"]}
    assert all(split == (TRAIN if name.startswith(train) else VAL) for name, split in zip(source.names, source.split))


def test_a_note_on_classes_that_look_like_splits(tmp_path, capsys):
    write_images(tmp_path / "in", numbered("seg_train", "seg_pred"))
    assert index_dataset(settings(tmp_path, tmp_path / "in")).source.split is None
    assert "note: folder seg_train/ is read as a class" in capsys.readouterr().out


def test_stray_images_do_not_hide_splits_inside_classes(tmp_path):
    names = numbered("cat/train", "cat/val", "dog/train", "dog/val")
    write_images(tmp_path / "in", [*names, "cat/stray.png"])
    index = index_dataset(settings(tmp_path, tmp_path / "in"))
    assert index.source.names == sorted(names) and index.source.label_names == {"class": ["cat", "dog"]}
    assert all((split == VAL) == ("/val/" in name) for name, split in zip(index.source.names, index.source.split))
    assert "1 images in cat/ next to the split folders (cat/stray.png)" in account(index)


def test_plan_names_classes_without_training_images(tmp_path):
    write_images(tmp_path / "in", numbered("train/cat", "train/dog", "val/Cat", "val/dog"))
    plan = index_dataset(settings(tmp_path, tmp_path / "in")).describe()
    assert "values of class without training images: Cat" in plan
    assert "values of class that differ only in case: Cat, cat" in plan


def test_a_class_may_be_called_train(tmp_path, capsys):
    write_images(tmp_path / "in", numbered("bus", "car", "train"))
    source = index_dataset(settings(tmp_path, tmp_path / "in")).source
    assert source.split is None and source.label_names == {"class": ["bus", "car", "train"]}
    assert "note: folder train/ is read as a class" in capsys.readouterr().out


@pytest.mark.parametrize(
    "names, stray, reason",
    [
        (numbered("cats", "dogs"), ["a.png"], "1 images next to the class folders (a.png)"),
        (numbered("x/cats", "x/dogs"), ["a.png", "x/b.png"], "2 images next to the class folders"),
        (
            numbered("train/cats", "train/dogs", "val/cats"),
            ["samples/0.png"],
            "1 images in samples/ next to the split folders",
        ),
        (numbered("train/cats", "train/dogs", "val/cats"), ["train/a.png", "b.png"], "images next to the class folders"),
        (numbered("train/cats", "train/dogs", "val/cats"), numbered("test"), "8 images next to the class folders"),
    ],
)
def test_stray_images_are_left_out(tmp_path, names, stray, reason):
    write_images(tmp_path / "in", names + stray)
    index = index_dataset(settings(tmp_path, tmp_path / "in"))
    assert sorted(index.source.names) == sorted(names) and index.source.label_names == {"class": ["cats", "dogs"]}
    assert all(f"/{label}/" in f"/{name}" for name, label in classes_of(index.source).items())
    assert reason in account(index) and f"{len(names + stray)} files found: {len(names)} images" in account(index)


def test_many_images_outside_of_folders_are_kept(tmp_path, capsys):
    write_images(tmp_path / "in", numbered(".", "new", "old"))
    source = index_dataset(settings(tmp_path, tmp_path / "in")).source
    assert len(source.names) == 24 and source.labels is None
    assert "note: the 2 folders are not used as classes: 8 of 24 images are in none of them" in capsys.readouterr().out


def test_zip_has_the_order_split_and_labels_of_the_folder(tmp_path):
    names = numbered("a", "a.b", "a b", "A", n=30)
    write_images(tmp_path / "in", names)
    for archive, prefix in (("flat.zip", ""), ("wrapped.zip", "some folder/")):
        with zipfile.ZipFile(tmp_path / archive, "w") as file:
            for name in reversed(names):
                file.write(tmp_path / "in" / name, prefix + name)
            file.writestr("__MACOSX/._x.png", b"resource fork")
    folder, *zips = (load_images(settings(tmp_path, tmp_path / p)) for p in ("in", "flat.zip", "wrapped.zip"))
    for images in zips:
        assert images.fingerprint == folder.fingerprint and np.array_equal(images.pixels, folder.pixels)
        assert np.array_equal(images.split, folder.split) and (images.split == VAL).sum() == 6
        assert np.array_equal(images.labels, folder.labels) and images.label_names == folder.label_names


# Links, names and file types


def test_links_are_followed_without_loops(tmp_path):
    write_images(tmp_path, numbered("elsewhere/birds", "in/cats"))
    folder = tmp_path / "in"
    for link, target in (
        ("birds", "../elsewhere/birds"),
        ("loop", ".."),
        ("cats/up", ".."),
        ("self", "self"),
        ("gone.png", "x"),
    ):
        (folder / link).symlink_to(target)
    (tmp_path / "elsewhere/in").symlink_to("../in")
    index = index_dataset(settings(tmp_path, folder))
    assert index.source.label_names == {"class": ["birds", "cats", "loop"]}  # loop/elsewhere is a folder of its own
    assert [n for n in index.source.names if n.startswith(("birds/", "cats/"))] == numbered("birds", "cats")
    assert "2 broken links" in account(index) and "links to a parent folder" in account(index)


def test_names_that_are_not_utf8(tmp_path, capsys):
    """They are read, and escaped in reports."""
    write_images(tmp_path / "in", numbered(".", n=150))
    folder = os.fsencode(tmp_path / "in")
    for old, new in ((b"07.png", b"caf\xe9.png"), (b"08.png", b"two\nlines.png")):
        os.rename(folder + b"/" + old, folder + b"/" + new)
    with open(folder + b"/caf\xe9.png", "wb") as file:
        file.write(b"<!DOCTYPE html><title>404</title>")
    images = load_images(settings(tmp_path, tmp_path / "in"))
    message = r"caf\xe9.png: UnidentifiedImageError: not an image that Pillow can read: it starts with b'<!DOCTYPE html>"
    assert len(images.pixels) == 149 and message in capsys.readouterr().out
    (report,) = (tmp_path / "runs/cache").glob("*-damaged.txt")
    assert message in report.read_text(encoding="utf-8") and "BytesIO" not in report.read_text(encoding="utf-8")
    assert r"two\nlines.png" in Files(tmp_path / "in").images


def rename_in_zip(path, old: bytes, new: bytes, system: int):
    """Replace a name of the same length without setting the UTF-8 flag. system: 0 DOS, 3 Unix."""
    content = path.read_bytes().replace(old, new)
    position = content.index(b"PK\x01\x02")
    while content[position : position + 4] == b"PK\x01\x02":
        content = content[: position + 5] + bytes([system]) + content[position + 6 :]
        position += 46 + sum(struct.unpack("<HHH", content[position + 28 : position + 34]))
    path.write_bytes(content)


@pytest.mark.parametrize(
    "raw, system, name",
    [(b"\x82t\x82", 0, "été"), ("é1".encode(), 0, "é1"), ("é1".encode(), 3, "é1"), (b"\xe9t\xe9", 3, r"\xe9t\xe9")],
)
def test_names_in_zips_of_other_systems(tmp_path, raw, system, name):
    path = tmp_path / "p.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("set\\abc\\1.png", encoded(Image.new("RGB", (4, 4))))
        file.writestr("set\\abc\\", b"")
    rename_in_zip(path, b"abc", raw, system)
    files = Files(path)
    assert files.images == [f"set/{name}/1.png"] and decode_image(files.read(files.images[0])).size == (4, 4)
    assert files.num_found == 1


def test_unsafe_paths_in_zips(tmp_path):
    """As the unzip program: without a root and without ".."."""
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as file:
        for name in ("../a/1.png", "/a/2.png", "a/../a/3.png", "./a//4.png"):
            file.writestr(name, encoded(Image.new("RGB", (4, 4))))
    files = Files(tmp_path / "p.zip")
    assert files.images == ["a/1.png", "a/2.png", "a/4.png", "a/a/3.png"] and not files.skipped


@pytest.mark.parametrize("source", ["folder", "huggingface"])
def test_a_path_that_is_too_long(tmp_path, source):
    with pytest.raises(UserError, match="data.path: a+ cannot be read .File name too long"):
        index_dataset(settings(tmp_path, "a" * 300, source=source))


def test_images_that_cannot_be_read_are_found_before_training(experiment, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for i in range(20):
        (tmp_path / f"in/{i:02d}.jpg").write_text("version https://git-lfs.github.com/spec/v1")
    assert experiment.run("train_vae", "data.source=folder", f"data.path={tmp_path}/in", "--dry-run") == 2
    assert "none of 8 images sampled from the dataset can be read, for example 00.jpg (" in capsys.readouterr().err


def test_unreadable_zips(tmp_path):
    for flag, method, message in ((1, 0, "is encrypted"), (0, 9, "is compressed by method 9")):
        path = tmp_path / "p.zip"
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("1.png", encoded(Image.new("RGB", (4, 4))))
        content = bytearray(path.read_bytes())
        entry = content.index(b"PK\x01\x02")
        content[entry + 8], content[entry + 10] = flag, method
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"data.path: 1.png in .*p.zip {message}: unpack the zip into a folder"):
            Files(path)


def test_file_types_are_recognized_by_content(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    image = noise_image(0, 16, 16)
    formats = {
        "a.jfif": "JPEG",
        "b.JPG_large": "JPEG",
        "c.ppm": "PPM",
        "d": "PNG",
        "e.001": "TIFF",
        "f.webp": "WEBP",
        "g.jp2": "JPEG2000",
    }
    for name, format in formats.items():
        image.save(folder / name, format)
    for name, content in {"a.mp4": b"\0\0\0\x18ftypmp42", "b": b"P5 is text", "c.txt": b"a caption", "d.npy": b"BM"}.items():
        (folder / f"other_{name}").write_bytes(content)
    image.save(folder / "raw.nef", "TIFF")  # a raw photo: Pillow would read its thumbnail
    assert Files(folder).images == sorted(formats)


def test_every_file_is_accounted_for(tmp_path):
    folder = tmp_path / "in"
    junk = "LOST.DIR/1.png @Recently-Snapshot/1.png "
    junk += ".DS_Store ._00.png Thumbs.db desktop.ini __MACOSX/._00.png .ipynb_checkpoints/00.png @eaDir/00.png/x.jpg #recycle/00.png .Trash-1000/1.png"
    write_images(folder, [*numbered(".", n=20), *junk.split()])
    (folder / "02.jpg.crdownload").write_bytes(encoded(noise_image(2, 16, 16))[:-100])
    for name in ("00.txt", "01.txt", "clip.mp4", "movie.mp4", "notes.pdf"):
        (folder / name).write_text("x")
    index = index_dataset(settings(tmp_path, folder, max_train_images=10))
    assert account(index) == (
        "37 files found: 20 images, 2 files with captions or labels, 15 skipped: 11 hidden or system files, "
        "4 other files (2 .mp4, 1 .crdownload, 1 .pdf); 9 images not used (data.max_train_images)"
    )


# Values and colors


RAMP = np.tile(np.linspace(0, 1, 16, dtype=np.float32), (16, 1))


def write_ramps(folder, make, suffix, n=10):
    folder.mkdir()
    for i in range(n):
        Image.fromarray(make(i)).save(folder / f"{i:02d}{suffix}")
    return folder


@pytest.mark.parametrize(
    "make, suffix, options, first",
    [
        (lambda i: RAMP, ".tif", {}, 0),
        (lambda i: (RAMP * (200 if i == 0 else 65535)).astype(np.uint16), ".png", {}, 200 / 65535),  # one dark frame
        (lambda i: (RAMP * 4095).astype(np.uint16), ".png", {"value_range": "[0, 4095]"}, 0),
        (lambda i: (RAMP * 2000 - 1000).astype(np.int32), ".tif", {"value_range": "[-1000, 1000]"}, 0),
    ],
)
def test_values_are_scaled_alike_in_all_files(tmp_path, make, suffix, options, first):
    images = load_images(settings(tmp_path, write_ramps(tmp_path / "in", make, suffix), **options))
    for i, pixels in enumerate(images.pixels):
        expected = RAMP * 255 * (first if first and i == 0 else 1)
        assert np.abs(pixels - expected[:, :, None]).max() <= 1


@pytest.mark.parametrize(
    "make, suffix, message",
    [
        (
            lambda i: (RAMP * 4095).astype(np.uint16),
            ".png",
            r"is only 4095: set data.value_range=\[0, 4095\] if white is 4095",
        ),
        (lambda i: (RAMP * 4095).astype(">u2"), ".tif", "is only 4095: set data.value_range"),
        (lambda i: RAMP * 255, ".tif", "float values, 0 to 255, are not in 0 to 1: set data.value_range"),
        (lambda i: (RAMP * 4095).astype(np.int32), ".tif", "32-bit values is unknown: set data.value_range"),
        (lambda i: np.where(RAMP > 0.5, np.nan, RAMP), ".tif", "00.tif: it contains NaN"),
    ],
)
def test_an_unknown_range_of_values_is_an_error(tmp_path, make, suffix, message):
    with pytest.raises(UserError, match=message) as error:
        index_dataset(settings(tmp_path, write_ramps(tmp_path / "in", make, suffix)))
    assert "\n" not in str(error.value)


def test_16_bit_color_images_must_use_their_range(tmp_path):
    """Pillow drops the lower bits, so there is nothing to scale."""
    for scale in (1, 16):
        for i in range(12):
            rows = np.broadcast_to(np.full(3, 4095 * scale, dtype=">u2"), (16, 16, 3)).reshape(16, -1)
            write_png(tmp_path / f"in{scale}" / f"{i}.png", 16, 16, rows)
        config = settings(tmp_path, tmp_path / f"in{scale}", value_range="[0, 4095]")
        if scale == 16:
            assert (load_images(config).pixels == 255).all()
        else:
            with pytest.raises(UserError, match="largest value in 12 16-bit images is only 3840: convert the images to 8"):
                index_dataset(config)


def write_png(path, depth, size, rows):
    """RGB with 16 bits per channel, which Pillow cannot write."""
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", size, size, depth, 2, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b""))


def test_bit_depth_of_the_file_format():
    """PGM states its maximum; a 12-bit TIFF its bits per sample (here of one strip of two packed values)."""
    pgm = b"P5 4 1 4095\n" + np.array([0, 1365, 2730, 4095], dtype=">u2").tobytes()
    assert np.asarray(decode_image(pgm))[0, :, 0].tolist() == [0, 85, 170, 255]
    tags = [
        (256, 4, 2),
        (257, 4, 1),
        (258, 3, 12),
        (259, 3, 1),
        (262, 3, 1),
        (273, 4, 8),
        (277, 3, 1),
        (278, 4, 1),
        (279, 4, 3),
    ]
    directory = struct.pack("<H", len(tags)) + b"".join(
        struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags
    )
    tiff = b"II*\0" + struct.pack("<I", 12) + bytes([0x55, 0x5F, 0xFF, 0]) + directory + b"\0\0\0\0"  # 1365, 4095
    assert np.asarray(decode_image(tiff))[0, :, 0].tolist() == [85, 255]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_tiff_files_in_which_0_is_white(dtype):
    """PhotometricInterpretation (tag 262) is 0 instead of 1."""
    white = 1 if dtype == np.float32 else np.iinfo(dtype).max
    content = encoded(Image.fromarray((RAMP * white).astype(dtype)), "TIFF")
    inverted = content.replace(struct.pack("<HHII", 262, 3, 1, 1), struct.pack("<HHII", 262, 3, 1, 0))
    assert inverted != content
    expected = 255 - np.asarray(decode_image(content)).astype(int)
    assert np.array_equal(np.asarray(decode_image(inverted)), expected)


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
@pytest.mark.parametrize("exif", [b"Exif\0\0no TIFF header", b"Exif\0\0II*\0"])
def test_damaged_exif_data_are_ignored(format, exif):
    image = noise_image(0, 8, 16)
    content = encoded(image, format, exif=exif, **({"lossless": True} if format == "WEBP" else {}))
    assert np.array_equal(np.asarray(decode_image(content)), np.asarray(image))


def swapped_profile() -> bytes:
    """An ICC profile whose red and blue primaries are those of sRGB, exchanged."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = int.from_bytes(profile[128:132], "big")
    at = {bytes(profile[i : i + 4]): i for i in range(132, 132 + 12 * count, 12)}
    red, blue = (slice(at[tag] + 4, at[tag] + 12) for tag in (b"rXYZ", b"bXYZ"))
    profile[red], profile[blue] = profile[blue], profile[red]
    return bytes(profile)


@pytest.mark.parametrize("mode, format", [("RGB", "PNG"), ("RGB", "JPEG"), ("RGBA", "PNG"), ("P", "PNG"), ("RGB", "TIFF")])
def test_color_profiles_are_converted_to_srgb(mode, format):
    image = noise_image(0, 8, 8) if format != "JPEG" else Image.new("RGB", (8, 8), (255, 0, 0))
    image = image.convert(mode)
    plain, converted = (
        np.asarray(decode_image(encoded(image, format, icc_profile=p))).astype(int) for p in (None, swapped_profile())
    )
    assert np.abs(converted - plain[:, :, ::-1]).max() <= 2


def test_transparency_survives_the_conversion():
    pixels = decode_image(encoded(Image.new("RGBA", (2, 2), (255, 0, 0, 128)), icc_profile=swapped_profile()))
    assert pixels.getpixel((0, 0)) == (127, 127, 255)  # half blue, half white


def test_profiles_that_change_nothing():
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert srgb_transform(srgb, "RGB") is None
    for profile in (srgb, b"no profile" * 20):
        image = noise_image(0, 8, 8)
        assert np.array_equal(np.asarray(decode_image(encoded(image, icc_profile=profile))), np.asarray(image))
    gray = Image.new("L", (4, 4), 77)  # with the profile of an RGB image
    assert decode_image(encoded(gray, icc_profile=swapped_profile())).getpixel((0, 0)) == (77, 77, 77)


def test_lab_and_cmyk():
    """L = 53.2, a = 80.1, b = 67.2 is red in CIE Lab."""
    lab = Image.new("LAB", (2, 2), (round(53.2 * 2.55), 80 + 128, 67 + 128))
    assert np.abs(np.array(decode_image(encoded(lab, "TIFF")).getpixel((0, 0))) - (255, 0, 0)).max() <= 16
    assert decode_image(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")).getpixel((0, 0)) == pytest.approx(
        (254, 0, 0), abs=3
    )


# CelebA


def make_celeba(root, images, attributes, partition, kaggle):
    names = [f"{i:06d}.jpg" for i in range(1, 31)]
    write_images(root / images, names)
    smiling, splits = [1 if i % 2 else -1 for i in range(30)], [0 if i < 20 else 1 if i < 26 else 2 for i in range(30)]
    separator, header = (",", ["image_id,Smiling,Young"]) if kaggle else ("  ", ["30", "Smiling Young"])
    for path, lines in (
        (attributes, [*header, *(separator.join([n, str(s), "-1"]) for n, s in zip(names, smiling))]),
        (partition, ["image_id,partition"] * kaggle + [separator.join([n, str(s)]) for n, s in zip(names, splits)]),
    ):
        (root / path).parent.mkdir(exist_ok=True)
        (root / path).write_text("\n".join(lines))
    return smiling, splits


@pytest.mark.parametrize(
    "images, attributes, partition, path",
    [
        ("img_align_celeba/img_align_celeba", "list_attr_celeba.csv", "list_eval_partition.csv", "."),
        ("img_align_celeba/img_align_celeba", "list_attr_celeba.csv", "list_eval_partition.csv", "img_align_celeba"),
        (
            "img_align_celeba/img_align_celeba",
            "list_attr_celeba.csv",
            "list_eval_partition.csv",
            "img_align_celeba/img_align_celeba",
        ),
        ("img_align_celeba", "list_attr_celeba.txt", "list_eval_partition.txt", "img_align_celeba"),
        ("Img/img_align_celeba", "Anno/list_attr_celeba.txt", "Eval/list_eval_partition.txt", "Img/img_align_celeba"),
    ],
)
def test_celeba_lists_of_every_distribution(tmp_path, images, attributes, partition, path):
    smiling, splits = make_celeba(tmp_path / "in", images, attributes, partition, kaggle=attributes.endswith(".csv"))
    source = index_dataset(settings(tmp_path, tmp_path / "in" / path, source="celeba", crop="center")).source
    assert source.split.tolist() == splits and list(source.label_names) == ["smiling", "young"]
    assert source.labels.tolist() == [[int(s > 0), 0] for s in smiling]


def test_celeba_without_official_split(tmp_path, capsys):
    write_images(tmp_path / "in", [f"{i:06d}.jpg" for i in range(1, 31)])
    assert index_dataset(settings(tmp_path, tmp_path / "in", source="celeba", crop="center")).source.split is None
    assert "no list_eval_partition.txt or .csv in or next to" in capsys.readouterr().out
    for code in (-1, 3):
        lines = "\n".join(f"{i:06d}.jpg {code if i > 20 else 0}" for i in range(1, 31))
        (tmp_path / "in/list_eval_partition.txt").write_text(lines)
        with pytest.raises(UserError, match=f"a partition must be 0 .train., 1 .validation. or 2 .test. .got {code}."):
            index_dataset(settings(tmp_path, tmp_path / "in", source="celeba", crop="center"))
    (tmp_path / "in/list_eval_partition.txt").write_text("000001.jpg 0")
    with pytest.raises(UserError, match="list_eval_partition has no complete line for 000002.jpg and 28 others"):
        index_dataset(settings(tmp_path, tmp_path / "in", source="celeba", crop="center"))


# Metadata files


def write_table(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        columns = dict.fromkeys(column for row in rows for column in row)
        lines = [",".join(columns), *(",".join(f'"{row.get(column, "")}"' for column in columns) for row in rows)]
    else:
        lines = map(json.dumps, rows)
    path.write_text("\n".join(lines))


def source_with(tmp_path, rows, table="metadata.jsonl", n=12, **data):
    write_images(tmp_path / "in", numbered(".", n=n))
    write_table(tmp_path / "in" / table, rows)
    return index_dataset(settings(tmp_path, tmp_path / "in", **data)).source


@pytest.mark.parametrize("table", ["metadata.csv", "metadata.jsonl", "captions.jsonl"])
@pytest.mark.parametrize("column", ["text", "caption", "prompt", "note"])
def test_caption_columns(tmp_path, table, column):
    rows = [{"file_name": f"{i:02d}.png", column: f"number {i},\n again"} for i in range(12)]
    options = {"caption_column": "note"} if column == "note" else {}
    assert source_with(tmp_path, rows, table, **options).captions == [[f"number {i}, again"] for i in range(12)]


def test_all_captions_of_an_image_are_kept(tmp_path):
    rows = [{"file_name": f"{i:02d}.png", "text": f"caption {k} of {i}"} for i in range(12) for k in range(5)]
    write_images(tmp_path / "in", numbered("."))
    (tmp_path / "in/03.txt").write_text("caption 0 of 3\nfrom a text file\n")
    (tmp_path / "in/03.caption").write_text("from a caption file")
    captions = source_with(tmp_path, rows).captions
    assert captions[7] == [f"caption {k} of 7" for k in range(5)]
    assert captions[3][5:] == ["from a text file", "from a caption file"]


@pytest.mark.parametrize(
    "row, message",
    [
        ({"caption": {"en": "a", "de": "b"}}, r"line 2: caption must be a string or a list of strings \(got {'en'"),
        ({"captions": [["a"], 5, True]}, "line 2: captions must be a string or a list of strings"),
        ({"captions": [None, "a"]}, "line 2: captions must be a string or a list of strings"),
        ({"text": 5}, r"line 2: text must be a string or a list of strings \(got 5\)"),
        ({"text": "a", "split": ["train"]}, r"line 2: split must be one of train, .* \(got \['train'\]\)"),
        ({"text": "a", "split": "hold-out"}, r"line 2: split must be one of train, .* \(got 'hold-out'\)"),
        ({"file_name": 1}, r"line 2: expected the path of an image in file_name \(got 1\)"),
        ({"file_name": "99.png"}, r"has rows for files that do not exist or are not images: 99.png \(line 2\); add"),
        ({"file_name": None}, r"expected the path of an image in file_name \(got None\)"),
    ],
)
def test_values_of_other_types_are_named_by_line(tmp_path, row, message):
    rows = [{"file_name": "00.png", "text": None}, {"file_name": "01.png"} | row]
    with pytest.raises(UserError, match=f"data.path: metadata.jsonl.*{message}") as error:
        source_with(tmp_path, rows)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content, message",
    [
        ("image,text\n00.png,a\n", r"line 2: expected the path of an image in file_name \(got None\)"),
        ("file_name,text\n00.png,a,b\n", "line 2: more values than the 2 columns"),
        ('file_name,text\n00.png,"a\n01.png,b\n', "line 2: unexpected end of data: a quotation mark is not closed"),
        ("file_name,text,text\n00.png,a,b\n", ": column 'text' is repeated"),
        ("file_name,split\n00.png,train\n00.png,val\n", "line 3: split of 00.png is 'val' here, but differs in another row"),
        ("file_name,text\n\n99.png,a\n", r"has rows for files that do not exist or are not images: 99.png \(line 3\); add"),
    ],
)
def test_bad_csv(tmp_path, content, message):
    write_images(tmp_path / "in", numbered(".", n=12))
    (tmp_path / "in/metadata.csv").write_text(content)
    with pytest.raises(UserError, match=f"data.path: metadata.csv.*{message}"):
        index_dataset(settings(tmp_path, tmp_path / "in"))


def test_csv_of_a_spreadsheet(tmp_path):
    """Semicolons, CRLF, a byte order mark, and empty columns and rows."""
    write_images(tmp_path / "in", numbered(".", n=12))
    rows = "".join(f'{i:02d}.png;"red, blue; green";;\r\n' for i in range(8))
    for header in ("file_name;text;;", '"file_name";"text";;', '"text";"file_name";;'):
        content = f"{header}\r\n{rows};;;\r\n"
        if header.startswith('"text"'):
            content = re.sub(r'(\d\d\.png);("[^"]*")', r"\2;\1", content)
        (tmp_path / "in/metadata.csv").write_text(content, encoding="utf-8-sig", newline="")
        assert index_dataset(settings(tmp_path, tmp_path / "in")).source.captions[0] == ["red, blue; green"]


def test_columns_that_differ_only_in_case(tmp_path):
    write_images(tmp_path / "in", numbered(".", n=12))
    (tmp_path / "in/metadata.csv").write_text("file_name,Text,TEXT\n00.png,a,b\n")
    with pytest.raises(UserError, match="columns whose names differ only in case: Text, TEXT"):
        index_dataset(settings(tmp_path, tmp_path / "in"))


@pytest.mark.parametrize("delimiter", [",", " , ", "|", "\t"])
def test_names_of_columns_ignore_case(tmp_path, delimiter):
    write_images(tmp_path / "in", numbered(".", n=12))
    rows = [["File_Name", "Text", "Split", "Breed"]]
    rows += [[f"{i:02d}.png", f"image {i}", "Val" if i < 3 else "train", ["pug", "nan", "corgi"][i % 3]] for i in range(12)]
    (tmp_path / "in/metadata.csv").write_text("\n".join(map(delimiter.join, rows)))
    source = index_dataset(settings(tmp_path, tmp_path / "in")).source
    assert source.split.tolist() == [VAL] * 3 + [TRAIN] * 9 and source.captions[4] == ["image 4"]
    assert source.label_names == {"Breed": ["corgi", "pug"]} and source.labels[:3, 0].tolist() == [1, 2, 0]
    named = index_dataset(settings(tmp_path, tmp_path / "in", caption_column="Text")).source
    assert named.captions == source.captions


def test_metadata_file_next_to_the_folder_of_images(tmp_path):
    write_images(tmp_path / "in", numbered("images", n=12))
    write_table(tmp_path / "in/lists/metadata.jsonl", [{"file_name": "../images/00.png", "text": "a cup"}])
    assert index_dataset(settings(tmp_path, tmp_path / "in")).source.captions[0] == ["a cup"]


def test_half_of_a_surrogate_pair_in_json(tmp_path):
    rows = [{"file_name": "00.png", "text": "cut \ud83d"}, {"file_name": "01.png", "text": "whole \U0001f600"}]
    assert source_with(tmp_path, rows).captions[:2] == [["cut ?"], ["whole \U0001f600"]]
    with pytest.raises(UserError, match="has rows for files that do not exist"):
        source_with(tmp_path, [{"file_name": "\ud83d.png"}])


def test_caption_files_of_other_systems(tmp_path):
    """Suffixes in upper case, and names that are normalized differently."""
    write_images(tmp_path / "in", [f"caf\u00e9{i:02d}.png" for i in range(12)])
    for i in range(12):
        (tmp_path / f"in/cafe\u0301{i:02d}.TXT").write_text(f"cup {i}")
    assert index_dataset(settings(tmp_path, tmp_path / "in")).source.captions == [[f"cup {i}"] for i in range(12)]


@pytest.mark.parametrize("table", ["metadata.csv", "metadata.jsonl"])
def test_further_columns_are_labels(tmp_path, capsys, table):
    rows = [
        {"file_name": f"{i:02d}.png", "breed": ["pug", "corgi"][i % 2], "year": 10 - i % 3, "good": i % 4 == 0}
        | {"score": i / 7, "note": f"note {i}", "origin": "web"}
        for i in range(12)
    ]
    source = source_with(tmp_path, rows, table)
    assert source.label_names == {"breed": ["corgi", "pug"], "good": ["no", "yes"], "year": ["8", "9", "10"]}
    assert source.labels.tolist() == [[(i + 1) % 2, int(i % 4 == 0), 2 - i % 3] for i in range(12)]
    columns = "note (text), origin (one value), score (numbers with fractions)"
    assert f"note: columns that are not used as labels: {columns}\n" in capsys.readouterr().out
    assert index_dataset(settings(tmp_path, tmp_path / "in", label_column="note")).source.label_names["note"][:2] == [
        "note 0",
        "note 1",
    ]
    for column, message in (("score", r"score \(numbers with fractions\) cannot be a label"), ("age", "has a column 'age'")):
        with pytest.raises(UserError, match=f"data.label_column: .*{message}"):
            index_dataset(settings(tmp_path, tmp_path / "in", label_column=column))


def test_an_empty_caption_does_not_hide_another_one(tmp_path):
    empty = ([], ""), ([""], " "), ([" ", ""], None)
    rows = [
        {"file_name": f"{i:02d}.png", "captions": empty[i % 3][0], "caption": empty[i % 3][1], "text": f"image {i}"}
        for i in range(12)
    ]
    source = source_with(tmp_path, rows)
    assert source.captions == [[f"image {i}"] for i in range(12)] and not source.label_names


def test_nan_is_a_missing_label(tmp_path):
    """As in json.dumps of a row of pandas."""
    rows = [{"file_name": f"{i:02d}.png", "breed": ["pug", "corgi", float("nan")][i % 3]} for i in range(12)]
    source = source_with(tmp_path, rows)
    assert source.labels[:, 0].tolist() == [[1, 0, 2][i % 3] for i in range(12)]


def test_the_caption_column_can_be_the_label(tmp_path):
    rows = [{"file_name": f"{i:02d}.png", "text": ["pug", "corgi"][i % 2]} for i in range(12)]
    source = source_with(tmp_path, rows, label_column="text")
    assert source.label_names == {"text": ["corgi", "pug"]} and source.labels[:2, 0].tolist() == [1, 0]


def test_missing_and_contradictory_labels(tmp_path, capsys):
    """A missing label becomes the null label. A column that differs between the captions of one image is no label."""
    rows = [
        {"file_name": f"{i:02d}.png", "breed": ["pug", "corgi", None][i % 3], "author": f"{k}"}
        for i in range(12)
        for k in range(2)
    ]
    source = source_with(tmp_path, rows)
    assert source.labels[:, 0].tolist() == [[1, 0, 2][i % 3] for i in range(12)]
    assert "author (differs between rows of one image)" in capsys.readouterr().out
    plan = index_dataset(settings(tmp_path, tmp_path / "in")).describe()
    assert "images with the null label: 4 without breed, of 12" in plan
    plan = index_dataset(settings(tmp_path, tmp_path / "in", max_train_images=8)).describe()  # only images that are used
    assert any("without breed, of 9" in line for line in plan)


@pytest.mark.parametrize("values", [[None, None], ["", " "]])
def test_a_label_that_no_image_has(tmp_path, capsys, values):
    """An error if data.label_column names it. Otherwise the column is no label."""
    rows = [{"file_name": f"{i:02d}.png", "breed": values[i % 2], "sex": "mf"[i % 2]} for i in range(12)]
    assert list(source_with(tmp_path, rows).label_names) == ["sex"]
    with pytest.raises(UserError, match=r"data.label_column: breed \(no image has a value\)"):
        index_dataset(settings(tmp_path, tmp_path / "in", label_column="breed"))


def test_metadata_in_split_folders_with_classes(tmp_path):
    """The imagefolder convention: one table per split, with paths relative to its folder."""
    for split in ("train", "validation"):
        write_images(tmp_path / "in" / split, numbered("cat", "dog"))
        names = numbered("cat", "dog")
        write_table(
            tmp_path / "in" / split / "metadata.csv",
            [{"file_name": n, "text": f"{split} {n}", "day": int(n[-5]) % 2} for n in names],
        )
    source = index_dataset(settings(tmp_path, tmp_path / "in")).source
    assert source.split.tolist() == [TRAIN] * 16 + [VAL] * 16
    assert source.label_names == {"class": ["cat", "dog"], "day": ["0", "1"]}
    assert source.labels[:10].tolist() == [[0, i % 2] for i in range(8)] + [[1, 0], [1, 1]]
    assert source.captions[17] == ["validation cat/01.png"]


def test_paths_written_on_other_systems(tmp_path):
    write_images(tmp_path / "in", numbered("caf\u00e9", n=12))
    write_table(tmp_path / "in/metadata.jsonl", [{"file_name": "cafe\u0301\\00.png", "text": "a cup"}])
    assert index_dataset(settings(tmp_path, tmp_path / "in")).source.captions[0] == ["a cup"]


def test_unread_sidecars_are_named(tmp_path, capsys):
    write_images(tmp_path / "in", numbered(".", n=12))
    for name in ("labels.csv", "README.txt", *(f"{i:02d}.json" for i in range(8))):
        (tmp_path / "in" / name).write_text("x")
    index_dataset(settings(tmp_path, tmp_path / "in"))
    assert (
        capsys.readouterr().out.count(
            "note: these files are not read: X.json next to X, labels.csv; captions and labels are read only from metadata.csv"
        )
        == 1
    )


# Labels, captions and image counts that later stages need


@pytest.mark.parametrize(
    "options, message",
    [
        (["diffusion.condition=class"], "diffusion.condition=class: the images of data.source=folder have no labels"),
        (
            ["diffusion.condition=text", "text.encoder=words", "diffusion.cross_attn_resolutions=[8]"],
            "diffusion.condition=text: the images of data.source=folder have no captions",
        ),
    ],
)
def test_missing_conditions_are_found_by_the_first_dry_run(experiment, image_folder, capsys, options, message):
    data = ("data.source=folder", f"data.path={image_folder}")
    assert experiment.run("train_vae", *data, *options, "--dry-run") == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("encoder", ["words", "pretrained"])
def test_captions_of_validation_images_are_not_enough(experiment, tmp_path, capsys, encoder):
    write_images(tmp_path / "in", numbered("train", "val"))
    for i in range(8):
        (tmp_path / f"in/val/{i:02d}.txt").write_text("a red car")
    options = ["diffusion.condition=text", f"text.encoder={encoder}", "diffusion.cross_attn_resolutions=[8]"]
    assert experiment.run("train_vae", "data.source=folder", f"data.path={tmp_path}/in", *options, "--dry-run") == 2
    assert "all training captions of data.source=folder are empty" in capsys.readouterr().err


def test_no_readable_validation_image(tmp_path):
    write_images(tmp_path / "in", [*numbered("train", n=120), "val/0.png"])
    (tmp_path / "in/val/0.png").write_bytes(b"damaged")
    with pytest.raises(UserError, match="data: none of the validation images can be read"):
        load_images(settings(tmp_path, tmp_path / "in"))


def test_a_folder_may_have_any_name(tmp_path):
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    os.mkdir(folder)
    for i in range(12):
        noise_image(i, 16, 16).save(f"{folder}/{i}.png")
    assert len(load_images(settings(tmp_path, folder)).pixels) == 12


def test_plan_of_stage_1(experiment, tmp_path, capsys):
    write_images(tmp_path / "in", numbered(".", n=50))
    (tmp_path / "in/.DS_Store").write_text("x")
    data = ("data.source=folder", f"data.path={tmp_path}/in")
    assert experiment.run("train_vae", *data, "--dry-run") == 0
    out = capsys.readouterr().out
    assert (
        "dataset: 51 files found: 50 images, 0 files with captions or labels, 1 skipped: 1 hidden or system files\n" in out
    )
    assert "note: evaluate.py needs at least 8 validation images (got 2): set data.val_fraction=0.16 before training" in out
    assert experiment.run("train_vae", *data, "data.val_fraction=0.16", "--dry-run") == 0
    out = capsys.readouterr().out
    assert "labels:" not in out and "images: 42 for training, 8 for validation" in out and "evaluate.py needs" not in out
    write_images(tmp_path / "classes", numbered("cat", "dog"))
    (tmp_path / "classes/cat/00.txt").write_text("one\ntwo")
    assert experiment.run("train_vae", "data.source=folder", f"data.path={tmp_path}/classes", "--dry-run") == 0
    assert "labels: class (2)\ncaptions: 17\n" in capsys.readouterr().out

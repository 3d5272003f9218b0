"""Sources, the uint8 cache, and batches, on real files made by Pillow and torch."""

import io
import pickle
import time
import zipfile

import numpy as np
import pytest
import torch
from conftest import noise_image
from PIL import Image

import data as data_module
from data import (
    Shuffle,
    load_images,
    split_by_name,
    to_float,
    to_uint8,
)
from lab.errors import UserError
from lab.feed import Feed
from lab.settings import load_config
from latent_cache import Encodings
from sources import HELD_OUT, TEST, TRAIN
from sources.files import crop_and_resize, decode


def settings(tmp_path, **data):
    overrides = [f"data.{k}={v}" for k, v in {"source": "folder", "image_size": 16, **data}.items()]
    return load_config(None, [f"runs_dir={tmp_path}/runs", *overrides])


def encoded(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


# Decoding


def test_decode_grey_and_transparent_and_16_bit():
    assert np.asarray(decode(encoded(Image.new("L", (4, 4), 77)))).tolist() == [[[77] * 3] * 4] * 4
    half = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    half.putpixel((0, 0), (255, 0, 0, 255))
    pixels = np.asarray(decode(encoded(half)))
    assert pixels[0, 0].tolist() == [255, 0, 0] and pixels[1, 1].tolist() == [255, 255, 255]  # over white
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([10, 20, 30] + [0] * 765)
    assert np.asarray(decode(encoded(palette)))[0, 0].tolist() == [10, 20, 30]
    deep = Image.fromarray(np.full((2, 2), 51400, dtype=np.uint16))
    assert np.asarray(decode(encoded(deep)))[0, 0].tolist() == [200] * 3  # 51400 / 256 = 200.8


def test_decode_turns_upright():
    """EXIF orientation 6: the camera was turned; the stored left column is the top row of the scene."""
    stored = Image.new("RGB", (20, 10), "black")
    stored.paste("white", (0, 0, 5, 10))
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = decode(encoded(stored, "JPEG", exif=exif, quality=95))
    assert upright.size == (10, 20)
    assert np.asarray(upright)[:4].mean() > 240 and np.asarray(upright)[8:].mean() < 15


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_decode_formats(format):
    assert np.asarray(decode(encoded(Image.new("RGB", (8, 8), (200, 100, 50)), format)))[4, 4].tolist() == pytest.approx(
        [200, 100, 50], abs=6
    )


# Cropping


def test_celeba_crop_is_the_ddim_box_without_resampling():
    """Song et al. 2021: 128x128 centred at (89, 121) of 178x218; in half resolution the box (12, 28, 76, 92)."""
    full, half = noise_image(0, 178, 218), noise_image(1, 89, 109)
    assert np.array_equal(crop_and_resize(full, "ddim", 128), np.asarray(full)[57:185, 25:153])
    assert np.array_equal(crop_and_resize(half, "ddim", 64), np.asarray(half)[28:92, 12:76])
    assert crop_and_resize(full, "center140", 64).shape == (64, 64, 3)
    with pytest.raises(ValueError, match="178x218"):
        crop_and_resize(noise_image(0, 100, 100), "ddim", 64)


def test_square_crop_is_the_middle():
    picture = noise_image(0, 30, 20)
    assert np.array_equal(crop_and_resize(picture, "square", 20), np.asarray(picture)[:, 5:25])


def test_shrinking_averages():
    """A one-pixel checkerboard shrinks to grey, not to black or white: there is anti-aliasing."""
    board = Image.fromarray((np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)).convert("RGB")
    assert abs(crop_and_resize(board, "square", 16).astype(float).mean() - 127.5) < 2
    assert crop_and_resize(board, "square", 16).std() < 12


# Folder and zip


def test_folder(tmp_path, pictures):
    images = load_images(settings(tmp_path, path=pictures))
    assert images.pixels.shape == (20, 16, 16, 3) and images.labels is None
    assert len(images.rows(TRAIN)) == 19 and len(images.rows(HELD_OUT)) == 1
    assert images.pixels[3, 8, 8].tolist() == pytest.approx([36, 219, 100], abs=5)


def test_cache_is_read_again_and_follows_the_files(tmp_path, pictures, monkeypatch):
    config = settings(tmp_path, path=pictures)
    first = load_images(config)
    monkeypatch.setattr(data_module, "build_cache", lambda _: pytest.fail("decoded twice"))
    assert load_images(config).fingerprint == first.fingerprint
    monkeypatch.undo()
    Image.new("RGB", (40, 30), "blue").save(pictures / "00.jpg")
    assert load_images(config).fingerprint != first.fingerprint
    assert load_images(settings(tmp_path, path=pictures, image_size=32)).pixels.shape[1] == 32


def test_class_folders_become_labels(tmp_path):
    for name, colour in (("cats", "red"), ("dogs", "blue")):
        (tmp_path / "in" / name).mkdir(parents=True)
        for i in range(8):
            Image.new("RGB", (16, 16), colour).save(tmp_path / "in" / name / f"{i}.png")
    images = load_images(settings(tmp_path, path=tmp_path / "in"))
    assert images.label_names == {"class": ["cats", "dogs"]}
    assert all((images.pixels[i, 0, 0, 2] == 255) == images.labels[i, 0] for i in range(16))


def test_zip_gives_what_the_folder_gives(tmp_path, pictures):
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as file:
        for picture in sorted(pictures.iterdir()):
            file.write(picture, f"inside/{picture.name}")
        file.writestr("__MACOSX/._00.jpg", b"not a picture")
    a, b = (load_images(settings(tmp_path, path=p)) for p in (pictures, tmp_path / "p.zip"))
    assert np.array_equal(a.pixels, b.pixels) and b.labels is None


def test_folders_named_after_splits_are_the_split(tmp_path):
    """set/train/cat/1.jpg, set/val/dog/a/2.jpg: two classes, however deep the pictures lie, and the split of the folders."""
    for place in ("train/cat", "train/dog", "val/cat", "val/dog/a"):
        for i in range(8):
            path = tmp_path / "in" / "set" / place / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            noise_image(i, 16, 16).save(path)
    images = load_images(settings(tmp_path, path=tmp_path / "in"))
    assert images.label_names == {"class": ["cat", "dog"]} and images.labels[:, 0].tolist() == 2 * (8 * [0] + 8 * [1])
    assert images.split.tolist() == 16 * [TRAIN] + 16 * [HELD_OUT]


def test_a_crop_that_fits_no_picture_is_noticed_early(tmp_path, pictures, monkeypatch):
    monkeypatch.setattr(data_module, "MAX_SHOWN", 3)
    monkeypatch.setattr(data_module, "BLOCK", 2)
    monkeypatch.setattr(data_module, "AHEAD", 3)
    read = []
    original = data_module.SOURCES["folder"]

    def watched(data, seed):
        source = original(data, seed)
        reader = source.read
        source.read = lambda indices: time.sleep(0.05) or read.append(len(indices)) or reader(indices)
        return source

    monkeypatch.setitem(data_module.SOURCES, "folder", watched)
    with pytest.raises(UserError, match="data.crop=ddim is for CelebA's aligned"):
        load_images(settings(tmp_path, path=pictures, crop="ddim"))
    (report,) = (tmp_path / "runs" / "cache").glob("*-damaged.txt")
    assert len(report.read_text().splitlines()) == 4 and sum(read) < 20


def test_limit_spreads_over_classes(tmp_path, pictures):
    images = load_images(settings(tmp_path, path=pictures, limit=8))
    assert len(images.rows(TRAIN)) == 8 and len(images.rows(HELD_OUT)) == 1
    assert images.pixels[images.rows(TRAIN)][:, 0, 0, 0].max() > 200  # the last pictures are in too


def test_a_few_damaged_images_are_skipped_and_named(tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(150):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(folder / f"{i:03d}.png")
    whole = (folder / "007.png").read_bytes()
    (folder / "007.png").write_bytes(whole[: len(whole) // 2])
    images = load_images(settings(tmp_path, path=folder))
    assert len(images.pixels) == 149 and images.pixels[7, 0, 0, 0] == 8  # 006 is followed by 008
    assert "1 of 150 images cannot be read" in capsys.readouterr().out
    assert "007.png" in next((tmp_path / "runs" / "cache").glob("*-damaged.txt")).read_text()


def test_many_damaged_images_are_an_error(tmp_path, pictures):
    (pictures / "07.jpg").write_bytes(b"\xff\xd8 not really")
    with pytest.raises(UserError, match=r"1 of 20 images cannot be read.*07.jpg.*more than 1%"):
        load_images(settings(tmp_path, path=pictures))
    assert not list((tmp_path / "runs" / "cache").glob("folder*/"))  # and no half cache stays behind


def test_damaged_cache_says_what_to_do(tmp_path, pictures):
    config = settings(tmp_path, path=pictures)
    load_images(config)
    pixels = next((tmp_path / "runs").rglob("pixels.u8"))
    pixels.write_bytes(pixels.read_bytes()[:100])
    with pytest.raises(UserError, match="cache .* is damaged: remove it"):
        load_images(config)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda p: None, "does not exist"),
        (lambda p: p.mkdir(), "is empty"),
        (lambda p: (p.mkdir(), (p / "a.txt").write_text("x")), r"no image \(.txt\)"),
        (lambda p: p.write_text("x"), "not a folder or a zip"),
        (lambda p: (p.mkdir(), [Image.new("RGB", (16, 16)).save(p / f"{i}.png") for i in range(3)]), "too few"),
    ],
)
def test_unusable_folders(tmp_path, make, message):
    make(tmp_path / "in")
    with pytest.raises(UserError, match=message):
        load_images(settings(tmp_path, path=tmp_path / "in"))


def test_path_not_set(tmp_path):
    for source in ("folder", "celeba", "cifar10"):
        with pytest.raises(UserError, match="data.path is not set"):
            load_images(settings(tmp_path, source=source))


# CelebA and CIFAR-10


def make_celeba(folder, n=30):
    (folder / "img_align_celeba").mkdir(parents=True)
    attributes, partition = [str(n), "Smiling Young"], []
    for i in range(1, n + 1):
        noise_image(i, 89, 109).save(folder / "img_align_celeba" / f"{i:06d}.jpg", quality=95)
        attributes.append(f"{i:06d}.jpg  {1 if i % 2 else -1} -1")
        partition.append(f"{i:06d}.jpg {0 if i <= 20 else 1 if i <= 26 else 2}")
    (folder / "list_attr_celeba.txt").write_text("\n".join(attributes))
    (folder / "list_eval_partition.txt").write_text("\n".join(partition))


def test_celeba(tmp_path):
    make_celeba(tmp_path / "in")
    images = load_images(settings(tmp_path, source="celeba", path=tmp_path / "in", image_size=64))
    assert [len(images.rows(s)) for s in (TRAIN, HELD_OUT, TEST)] == [20, 6, 4]
    assert images.label_names == {"smiling": ["no", "yes"], "young": ["no", "yes"]}
    assert images.labels[:4].tolist() == [[1, 0], [0, 0], [1, 0], [0, 0]]
    stored = np.asarray(Image.open(tmp_path / "in" / "img_align_celeba" / "000005.jpg"))
    assert np.array_equal(images.pixels[4], stored[28:92, 12:76])


def test_other_labels_are_the_same_pictures(tmp_path):
    make_celeba(tmp_path / "in")
    attributes, config = tmp_path / "in" / "list_attr_celeba.txt", settings(tmp_path, source="celeba", path=tmp_path / "in")
    first = load_images(config)
    attributes.write_text(attributes.read_text().replace("000001.jpg  1", "000001.jpg -1"))
    now = load_images(config)
    assert first.labels[0, 0] == 1 and now.labels[0, 0] == 0
    assert now.fingerprint == first.fingerprint  # what ties a VAE to its images


def test_celeba_without_lists_and_with_a_short_one(tmp_path):
    make_celeba(tmp_path / "in")
    (tmp_path / "in" / "list_eval_partition.txt").unlink()
    (tmp_path / "in" / "list_attr_celeba.txt").write_text("1\nSmiling\n000001.jpg 1")
    config = settings(tmp_path, source="celeba", path=tmp_path / "in", image_size=64)
    with pytest.raises(UserError, match="no whole line for .*000002.jpg and 28 other"):
        load_images(config)
    (tmp_path / "in" / "list_attr_celeba.txt").unlink()
    images = load_images(config)
    assert images.labels is None and len(images.rows(HELD_OUT)) == 2  # 5 % of 30


def test_celeba_of_other_pictures(tmp_path, pictures):
    with pytest.raises(UserError, match="data.source=folder"):
        load_images(settings(tmp_path, source="celeba", path=pictures))


def test_failed_download_is_one_line(tmp_path, monkeypatch):
    import torchvision.datasets

    def fail(*_, **__):
        raise RuntimeError("quota exceeded\nsecond line")

    monkeypatch.setattr(torchvision.datasets, "CelebA", fail)
    with pytest.raises(UserError, match=r"cannot download CelebA .*\(quota exceeded\); download it by hand"):
        load_images(settings(tmp_path, source="celeba", path=tmp_path, download="true"))


def test_cifar10(tmp_path, monkeypatch):
    """Files in torchvision's layout; its checksums are those of the real data, so the check alone is stood in for."""
    from torchvision.datasets import CIFAR10

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        batch = {"data": rng.integers(0, 256, (4, 3072), dtype=np.uint8), "labels": [0, 1, 2, 9]}
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    with pytest.raises(UserError, match="no whole cifar-10-batches-py"):
        load_images(settings(tmp_path, source="cifar10", path=tmp_path, image_size=32))
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    images = load_images(settings(tmp_path, source="cifar10", path=tmp_path, image_size=32))
    assert len(images.rows(TRAIN)) == 20 and len(images.rows(HELD_OUT)) == 4
    first = pickle.loads((folder / "data_batch_1").read_bytes())["data"][0].reshape(3, 32, 32).transpose(1, 2, 0)
    assert np.array_equal(images.pixels[0], first)
    assert images.labels[:4, 0].tolist() == [0, 1, 2, 9] and images.label_names["class"][9] == "j"


def test_synthetic_faces_are_cached_with_labels_and_captions(tmp_path):
    from sources import synthetic_faces

    images = load_images(settings(tmp_path, source="synthetic_faces", count=40))
    assert len(images.rows(TRAIN)) == 40 and len(images.rows(HELD_OUT)) == 8
    assert np.array_equal(images.pixels[[3, 45]], synthetic_faces.render(0, np.array([3, 45]), 16))
    assert images.labels.shape == (48, len(synthetic_faces.ATTRIBUTES)) and len(images.captions) == 48


# Batches


def test_split_by_name_hardly_changes_when_images_are_added():
    names = [f"{i}.jpg" for i in range(1000)]
    a = split_by_name(names, 0.1)
    b = split_by_name(names + [f"new{i}.jpg" for i in range(100)], 0.1)
    assert a.sum() == 100 and b.sum() == 110
    assert (a != b[:1000]).sum() <= 25
    shuffled = split_by_name(names[::-1], 0.1)
    assert np.array_equal(shuffled[::-1], a)


def test_shuffle_is_epochs_without_repeats_and_a_pure_function():
    whole = Shuffle(10, seed=1).take(0, 30)
    for epoch in whole.split(10):
        assert sorted(epoch.tolist()) == list(range(10))
    assert not torch.equal(whole[:10], whole[10:20])
    other = Shuffle(10, seed=1)
    other.take(25, 3)
    assert torch.equal(other.take(7, 16), whole[7:23])
    assert not torch.equal(Shuffle(10, seed=2).take(0, 10), whole[:10])


def test_pixels_round_trip():
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(1, 16, 16, 3)
    images = to_float(pixels)
    assert images.shape == (1, 3, 16, 16) and float(images.min()) == -1 and float(images.max()) == 1
    assert np.array_equal(to_uint8(images), pixels.numpy())
    assert to_uint8(torch.full((1, 3, 1, 1), 9.0)).max() == 255


def test_feed_takes_rows_of_all_parts():
    """The rows of the joined array, whether it lies on the device or is read ahead, and whatever was said to come next."""
    parts = [torch.randn(5, 2, 3), torch.randn(3, 2, 3)]
    whole, feed = torch.cat(parts), Feed(parts, torch.device("cpu"))
    for feed.resident in (True, False):
        wanted = [torch.tensor(rows) for rows in ([7, 0, 4], [5, 5, 1], [2], [6, 3])]
        for now, then in zip(wanted, [wanted[1], wanted[3], None, None]):  # the second is told wrongly
            assert torch.equal(feed.take(now, then), whole[now])
    assert str(feed) == "0 MB read a batch ahead, as they do not fit cpu"


def test_feed_reads_ahead_while_others_work():
    """What comes next is read before it is asked for: no wait, where each read takes a while and so does the work."""
    feed, reads = Feed([torch.arange(8.0)], torch.device("cpu")), []
    feed.resident = False
    gather = feed._gather

    def slowly(rows):
        time.sleep(0.05)
        reads.append(rows.tolist())
        return gather(rows)

    feed._gather = slowly
    assert feed.take(torch.tensor([1, 2]), then=torch.tensor([3])).tolist() == [1, 2]
    time.sleep(0.15)
    assert reads == [[1, 2], [3]]
    assert feed.take(torch.tensor([3])).tolist() == [3] and len(reads) == 2


def test_encodings_file(tmp_path, trained):
    """Loadable without executing anything; round trip; damage and strangers are refused."""
    path = trained.run_dir / "encodings.pt"
    content = torch.load(path, weights_only=True, mmap=True)
    assert content["mean"].dtype == torch.float16 and content["mean"].shape == (48, 4, 8, 8) == content["mean_flipped"].shape
    encodings = Encodings.load(path)
    encodings.save(tmp_path / "again.pt")
    again = Encodings.load(tmp_path / "again.pt")
    assert torch.equal(again.mean, encodings.mean) and torch.equal(again.normaliser.scale, encodings.normaliser.scale)
    z = encodings.normaliser.normalise(encodings.mean)
    assert float(z.std()) == pytest.approx(1.0, rel=1e-3)
    torch.testing.assert_close(encodings.normaliser.denormalise(z), encodings.mean.float(), rtol=1e-3, atol=1e-3)
    assert len(encodings.captions) == 48 and len(encodings.labels) == 48
    (tmp_path / "cut.pt").write_bytes(path.read_bytes()[:2000])
    torch.save({"mean": 1}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="damaged"):
        Encodings.load(tmp_path / "cut.pt")
    with pytest.raises(UserError, match="holds no encodings"):
        Encodings.load(tmp_path / "other.pt")
    with pytest.raises(UserError, match="run create_encodings.py first"):
        Encodings.load(tmp_path / "none.pt")

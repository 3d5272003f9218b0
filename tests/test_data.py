"""Image sources, the pixel cache and batch loading, on real files written by Pillow and torch."""

import io
import pickle
import time
import zipfile

import numpy as np
import pytest
import torch
from conftest import noise_image
from PIL import Image

from dataset import TEST, TRAIN, VAL, image_cache
from dataset.encodings import LatentDataset
from dataset.files import crop_and_resize, decode_image
from dataset.image_cache import load_images, split_by_name
from dataset.loader import BatchLoader, Shuffle
from utils.checkpoints import save_tensors
from utils.errors import UserError
from utils.images import to_float, to_uint8
from utils.settings import load_config


def settings(tmp_path, **data):
    overrides = [f"data.{k}={v}" for k, v in {"source": "folder", "image_size": 16, **data}.items()]
    return load_config(None, [f"runs_dir={tmp_path}/runs", *overrides])


def encoded(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


# Decoding


def test_decode_gray_and_transparent_and_16_bit():
    assert np.asarray(decode_image(encoded(Image.new("L", (4, 4), 77)))).tolist() == [[[77] * 3] * 4] * 4
    transparent = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    transparent.putpixel((0, 0), (255, 0, 0, 255))
    pixels = np.asarray(decode_image(encoded(transparent)))
    assert pixels[0, 0].tolist() == [255, 0, 0] and pixels[1, 1].tolist() == [255, 255, 255]  # white background
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([10, 20, 30] + [0] * 765)
    assert np.asarray(decode_image(encoded(palette)))[0, 0].tolist() == [10, 20, 30]
    sixteen_bit = Image.fromarray(np.full((2, 2), 51400, dtype=np.uint16))
    assert np.asarray(decode_image(encoded(sixteen_bit)))[0, 0].tolist() == [200] * 3  # 51400 / 256 = 200.8


def test_decode_applies_exif_orientation():
    """Orientation 6 is a rotated camera: the stored left column is the top row of the scene."""
    stored = Image.new("RGB", (20, 10), "black")
    stored.paste("white", (0, 0, 5, 10))
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = decode_image(encoded(stored, "JPEG", exif=exif, quality=95))
    assert upright.size == (10, 20)
    assert np.asarray(upright)[:4].mean() > 240 and np.asarray(upright)[8:].mean() < 15


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_decode_formats(format):
    assert np.asarray(decode_image(encoded(Image.new("RGB", (8, 8), (200, 100, 50)), format)))[
        4, 4
    ].tolist() == pytest.approx([200, 100, 50], abs=6)


# Cropping


def test_celeba_crop_is_the_ddim_box_without_resampling():
    """Song et al. 2021: 128x128 centered at (89, 121) of 178x218; at half resolution the box is (12, 28, 76, 92)."""
    full, half = noise_image(0, 178, 218), noise_image(1, 89, 109)
    assert np.array_equal(crop_and_resize(full, "ddim", (128, 128)), np.asarray(full)[57:185, 25:153])
    assert np.array_equal(crop_and_resize(half, "ddim", (64, 64)), np.asarray(half)[28:92, 12:76])
    assert crop_and_resize(full, "center140", (64, 64)).shape == (64, 64, 3)
    with pytest.raises(ValueError, match="178x218"):
        crop_and_resize(noise_image(0, 100, 100), "ddim", (64, 64))


def test_center_crop_of_a_square():
    image = noise_image(0, 30, 20)
    assert np.array_equal(crop_and_resize(image, "center", (20, 20)), np.asarray(image)[:, 5:25])


def test_resizing_is_antialiased():
    """A one-pixel checkerboard shrinks to gray, not to black or white."""
    board = Image.fromarray((np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)).convert("RGB")
    assert abs(crop_and_resize(board, "center", (16, 16)).astype(float).mean() - 127.5) < 2
    assert crop_and_resize(board, "center", (16, 16)).std() < 12


# Folder and zip


def test_folder(tmp_path, image_folder):
    images = load_images(settings(tmp_path, path=image_folder))
    assert images.pixels.shape == (20, 16, 16, 3) and images.labels is None
    assert len(images.rows(TRAIN)) == 19 and len(images.rows(VAL)) == 1
    assert images.pixels[3, 8, 8].tolist() == pytest.approx([36, 219, 100], abs=5)


def test_cache_is_reused_until_files_change(tmp_path, image_folder, monkeypatch):
    config = settings(tmp_path, path=image_folder)
    first = load_images(config)
    monkeypatch.setattr(image_cache, "build_cache", lambda _: pytest.fail("decoded twice"))
    assert load_images(config).fingerprint == first.fingerprint
    monkeypatch.undo()
    Image.new("RGB", (40, 30), "blue").save(image_folder / "00.jpg")
    assert load_images(config).fingerprint != first.fingerprint
    assert load_images(settings(tmp_path, path=image_folder, image_size=32)).pixels.shape[1] == 32


def test_class_folders_become_labels(tmp_path):
    for name, color in (("cats", "red"), ("dogs", "blue")):
        (tmp_path / "in" / name).mkdir(parents=True)
        for i in range(8):
            Image.new("RGB", (16, 16), color).save(tmp_path / "in" / name / f"{i}.png")
    images = load_images(settings(tmp_path, path=tmp_path / "in"))
    assert images.label_names == {"class": ["cats", "dogs"]}
    assert all((images.pixels[i, 0, 0, 2] == 255) == images.labels[i, 0] for i in range(16))


def test_zip_equals_folder(tmp_path, image_folder):
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as file:
        for path in sorted(image_folder.iterdir()):
            file.write(path, f"inside/{path.name}")
        file.writestr("__MACOSX/._00.jpg", b"not an image")
    a, b = (load_images(settings(tmp_path, path=p)) for p in (image_folder, tmp_path / "p.zip"))
    assert np.array_equal(a.pixels, b.pixels) and b.labels is None


def test_split_folders(tmp_path):
    """set/train/cat/1.jpg and set/val/dog/a/2.jpg are two classes, at any depth, split by folder."""
    for subfolder in ("train/cat", "train/dog", "val/cat", "val/dog/a"):
        for i in range(8):
            path = tmp_path / "in" / "set" / subfolder / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            noise_image(i, 16, 16).save(path)
    images = load_images(settings(tmp_path, path=tmp_path / "in"))
    assert images.label_names == {"class": ["cat", "dog"]} and images.labels[:, 0].tolist() == 2 * (8 * [0] + 8 * [1])
    assert images.split.tolist() == 16 * [TRAIN] + 16 * [VAL]


def test_reading_stops_early_if_the_crop_fits_no_image(tmp_path, image_folder, monkeypatch):
    monkeypatch.setattr(image_cache, "ABORT_AFTER_DAMAGED", 3)
    monkeypatch.setattr(image_cache, "BLOCK_SIZE", 2)
    monkeypatch.setattr(image_cache, "PREFETCH_BLOCKS", 3)
    monkeypatch.setattr(image_cache, "NUM_TEST_READS", 0)
    counts = []
    make_source = image_cache.SOURCES["folder"]

    def counting(cfg, seed):
        source = make_source(cfg, seed)
        read = source.read
        source.read = lambda indices: time.sleep(0.05) or counts.append(len(indices)) or read(indices)
        return source

    monkeypatch.setitem(image_cache.SOURCES, "folder", counting)
    with pytest.raises(UserError, match="data.crop=ddim requires CelebA's aligned"):
        load_images(settings(tmp_path, path=image_folder, crop="ddim"))
    (report,) = (tmp_path / "runs" / "cache").glob("*-damaged.txt")
    assert len(report.read_text().splitlines()) == 4 and sum(counts) < 20


def test_max_train_images_keeps_evenly_spaced_images(tmp_path, image_folder):
    images = load_images(settings(tmp_path, path=image_folder, max_train_images=8))
    assert len(images.rows(TRAIN)) == 8 and len(images.rows(VAL)) == 1
    assert images.pixels[images.rows(TRAIN)][:, 0, 0, 0].max() > 200  # the last images are included


def test_few_damaged_images_are_skipped_and_reported(tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(150):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(folder / f"{i:03d}.png")
    content = (folder / "007.png").read_bytes()
    (folder / "007.png").write_bytes(content[: len(content) // 2])
    images = load_images(settings(tmp_path, path=folder))
    assert len(images.pixels) == 149 and images.pixels[7, 0, 0, 0] == 8  # 006 is followed by 008
    assert "1 of 150 images cannot be read" in capsys.readouterr().out
    assert "007.png" in next((tmp_path / "runs" / "cache").glob("*-damaged.txt")).read_text()


def test_many_damaged_images_are_an_error(tmp_path, image_folder):
    (image_folder / "07.jpg").write_bytes(b"\xff\xd8 not really")
    with pytest.raises(UserError, match=r"1 of 20 images cannot be read.*07.jpg.*more than 1%"):
        load_images(settings(tmp_path, path=image_folder))
    assert not list((tmp_path / "runs" / "cache").glob("*/"))  # no partial cache is left


def test_damaged_cache_is_an_error_with_remedy(tmp_path, image_folder):
    config = settings(tmp_path, path=image_folder)
    load_images(config)
    pixels = next((tmp_path / "runs").rglob("pixels.u8"))
    pixels.write_bytes(pixels.read_bytes()[:100])
    with pytest.raises(UserError, match="cache .* is damaged .*: remove it"):
        load_images(config)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda p: None, "does not exist"),
        (lambda p: p.mkdir(), "is empty"),
        (lambda p: (p.mkdir(), (p / "a.txt").write_text("x")), r"no image; found: \.txt; supported: "),
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
    assert [len(images.rows(s)) for s in (TRAIN, VAL, TEST)] == [20, 6, 4]
    assert images.label_names == {"smiling": ["no", "yes"], "young": ["no", "yes"]}
    assert images.labels[:4].tolist() == [[1, 0], [0, 0], [1, 0], [0, 0]]
    stored = np.asarray(Image.open(tmp_path / "in" / "img_align_celeba" / "000005.jpg"))
    assert np.array_equal(images.pixels[4], stored[28:92, 12:76])


def test_fingerprint_does_not_depend_on_labels(tmp_path):
    make_celeba(tmp_path / "in")
    attributes, config = tmp_path / "in" / "list_attr_celeba.txt", settings(tmp_path, source="celeba", path=tmp_path / "in")
    first = load_images(config)
    attributes.write_text(attributes.read_text().replace("000001.jpg  1", "000001.jpg -1"))
    second = load_images(config)
    assert first.labels[0, 0] == 1 and second.labels[0, 0] == 0
    assert second.fingerprint == first.fingerprint  # which a VAE is checked against


def test_celeba_with_incomplete_and_without_lists(tmp_path):
    make_celeba(tmp_path / "in")
    (tmp_path / "in" / "list_eval_partition.txt").unlink()
    (tmp_path / "in" / "list_attr_celeba.txt").write_text("1\nSmiling\n000001.jpg 1")
    config = settings(tmp_path, source="celeba", path=tmp_path / "in", image_size=64)
    with pytest.raises(UserError, match="no complete line for .*000002.jpg and 28 other"):
        load_images(config)
    (tmp_path / "in" / "list_attr_celeba.txt").unlink()
    images = load_images(config)
    assert images.labels is None and len(images.rows(VAL)) == 2  # 5 % of 30


def test_celeba_needs_its_file_names(tmp_path, image_folder):
    with pytest.raises(UserError, match="data.source=folder"):
        load_images(settings(tmp_path, source="celeba", path=image_folder))


def test_failed_download_is_one_line(tmp_path, monkeypatch):
    import torchvision.datasets

    def fail(*_, **__):
        raise RuntimeError("quota exceeded\nsecond line")

    monkeypatch.setattr(torchvision.datasets, "CelebA", fail)
    with pytest.raises(UserError, match=r"cannot download CelebA .*\(quota exceeded\); download it manually"):
        load_images(settings(tmp_path, source="celeba", path=tmp_path, download="true"))


def test_cifar10(tmp_path, monkeypatch):
    """Small files in torchvision's layout; only its checksum test, for the real data, is replaced."""
    from torchvision.datasets import CIFAR10

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        batch = {"data": rng.integers(0, 256, (4, 3072), dtype=np.uint8), "labels": [0, 1, 2, 9]}
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    with pytest.raises(UserError, match="no complete cifar-10-batches-py"):
        load_images(settings(tmp_path, source="cifar10", path=tmp_path, image_size=32))
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    images = load_images(settings(tmp_path, source="cifar10", path=tmp_path, image_size=32))
    assert len(images.rows(TRAIN)) == 20 and len(images.rows(VAL)) == 4
    first = pickle.loads((folder / "data_batch_1").read_bytes())["data"][0].reshape(3, 32, 32).transpose(1, 2, 0)
    assert np.array_equal(images.pixels[0], first)
    assert images.labels[:4, 0].tolist() == [0, 1, 2, 9] and images.label_names["class"][9] == "j"


def test_synthetic_faces_are_cached_with_labels_and_captions(tmp_path):
    from dataset import synthetic_faces

    images = load_images(settings(tmp_path, source="synthetic_faces", num_images=40))
    assert len(images.rows(TRAIN)) == 40 and len(images.rows(VAL)) == 8
    assert np.array_equal(images.pixels[[3, 45]], synthetic_faces.render(0, np.array([3, 45]), 16))
    assert images.labels.shape == (48, len(synthetic_faces.ATTRIBUTES)) and len(images.captions) == 48


# Batches


def test_split_by_name_is_stable_when_images_are_added():
    names = [f"{i}.jpg" for i in range(1000)]
    a = split_by_name(names, 0.1)
    b = split_by_name(names + [f"new{i}.jpg" for i in range(100)], 0.1)
    assert a.sum() == 100 and b.sum() == 110
    assert (a != b[:1000]).sum() <= 25
    shuffled = split_by_name(names[::-1], 0.1)
    assert np.array_equal(shuffled[::-1], a)


def test_shuffle_covers_each_epoch_and_is_deterministic():
    whole = Shuffle(10, seed=1).indices(0, 30)
    for epoch in whole.split(10):
        assert sorted(epoch.tolist()) == list(range(10))
    assert not torch.equal(whole[:10], whole[10:20])
    other = Shuffle(10, seed=1)
    other.indices(25, 3)
    assert torch.equal(other.indices(7, 16), whole[7:23])
    assert not torch.equal(Shuffle(10, seed=2).indices(0, 10), whole[:10])


def test_pixels_round_trip():
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(1, 16, 16, 3)
    images = to_float(pixels)
    assert images.shape == (1, 3, 16, 16) and float(images.min()) == -1 and float(images.max()) == 1
    assert np.array_equal(to_uint8(images), pixels.numpy())
    assert to_uint8(torch.full((1, 3, 1, 1), 9.0)).max() == 255


def test_batch_loader_gathers_rows_of_all_parts():
    """Batches are rows of the concatenated parts, resident or prefetched, even if the announced next rows were wrong."""
    parts = [torch.randn(5, 2, 3), torch.randn(3, 2, 3)]
    whole, loader = torch.cat(parts), BatchLoader(parts, torch.device("cpu"))
    for loader.resident in (True, False):
        batches = [torch.tensor(rows) for rows in ([7, 0, 4], [5, 5, 1], [2], [6, 3])]
        for rows, next_rows in zip(batches, [batches[1], batches[3], None, None]):  # the second announces wrong rows
            assert torch.equal(loader.batch(rows, next_rows), whole[rows])
    assert str(loader) == "0 MB prefetched from host memory (too large for cpu)"


def test_batch_loader_prefetches():
    """The announced rows are read in the background, before they are requested, and only once."""
    loader, reads = BatchLoader([torch.arange(8.0)], torch.device("cpu")), []
    loader.resident = False
    gather = loader._gather

    def slow_gather(rows):
        time.sleep(0.05)
        reads.append(rows.tolist())
        return gather(rows)

    loader._gather = slow_gather
    assert loader.batch(torch.tensor([1, 2]), next_rows=torch.tensor([3])).tolist() == [1, 2]
    time.sleep(0.15)
    assert reads == [[1, 2], [3]]
    assert loader.batch(torch.tensor([3])).tolist() == [3] and len(reads) == 2


def test_encodings_file(tmp_path, trained):
    """Loads with weights_only, survives a round trip, and damaged or foreign files are rejected."""
    path = trained.run_dir / "encodings.pt"
    content = torch.load(path, weights_only=True, mmap=True)
    assert content["mean"].dtype == torch.float16 and content["mean"].shape == (48, 4, 8, 8) == content["mean_flipped"].shape
    dataset = LatentDataset.load(path)
    dataset.save(tmp_path / "again.pt")
    again = LatentDataset.load(tmp_path / "again.pt")
    assert torch.equal(again.mean, dataset.mean) and torch.equal(again.normalizer.scale, dataset.normalizer.scale)
    z = dataset.normalizer.normalize(dataset.mean)
    assert float(z.std()) == pytest.approx(1.0, rel=1e-3)
    torch.testing.assert_close(dataset.normalizer.denormalize(z), dataset.mean.float(), rtol=1e-3, atol=1e-3)
    assert len(dataset.captions) == 48 and len(dataset.labels) == 48
    (tmp_path / "truncated.pt").write_bytes(path.read_bytes()[:2000])
    save_tensors(tmp_path / "other.pt", {"mean": 1})
    with pytest.raises(UserError, match="damaged"):
        LatentDataset.load(tmp_path / "truncated.pt")
    with pytest.raises(UserError, match="is not an encodings file"):
        LatentDataset.load(tmp_path / "other.pt")
    with pytest.raises(UserError, match="run create_encodings.py first"):
        LatentDataset.load(tmp_path / "missing.pt")

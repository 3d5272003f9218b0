"""data.source=huggingface: local parquet, arrow and imagefolder files written by the datasets library."""

import io
import json

import datasets
import numpy as np
import pytest
from conftest import noise_image
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value

from dataset import TEST, TRAIN, VAL
from dataset.image_cache import index_dataset, load_images
from utils.errors import UserError
from utils.settings import load_config

IMAGES = [noise_image(i, 30, 24) for i in range(24)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "huggingface")
    datasets.disable_progress_bars()


def settings(tmp_path, path, **data):
    data = {"source": "huggingface", "path": path, "image_size": 16, **data}
    return load_config(None, [f"runs_dir={tmp_path}/runs", *(f"data.{k}={v}" for k, v in data.items())])


def png(image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def make_dataset(rows=range(20), **columns) -> Dataset:
    """Noise images, with columns name=(values, feature)."""
    features = Features({"image": Image(), **{name: feature for name, (_, feature) in columns.items()}})
    content = {"image": [{"bytes": png(IMAGES[i]), "path": None} for i in rows]}
    return Dataset.from_dict(content | {name: values for name, (values, _) in columns.items()}, features=features)


def captions_of(rows) -> tuple:
    return [[f"image {i}", f" noise\n number {i} "] for i in rows], List(Value("string"))


def test_parquet_equals_the_same_images_in_a_folder(tmp_path):
    """Oracle: data.source=folder. Captions, class names and official splits belong to the right images."""
    data = tmp_path / "data"
    data.mkdir()
    for split, rows in (("train", range(14)), ("validation", range(14, 19)), ("test", range(19, 22))):
        labels = [i % 3 for i in rows], ClassLabel(names=["cat", "dog", "owl"])
        make_dataset(rows, label=labels, captions=captions_of(rows)).to_parquet(data / f"{split}-00000-of-00001.parquet")
    images = load_images(settings(tmp_path, data))
    assert images.split.tolist() == [TRAIN] * 14 + [VAL] * 5 + [TEST] * 3
    assert images.label_names == {"label": ["cat", "dog", "owl"]} and images.labels[:, 0].tolist() == [
        i % 3 for i in range(22)
    ]
    assert images.captions == [[f"image {i}", f"noise number {i}"] for i in range(22)]
    folder = tmp_path / "folder"
    folder.mkdir()
    for i in range(22):
        IMAGES[i].save(folder / f"{i:02d}.png")
    expected = load_images(settings(tmp_path, folder, source="folder"))
    assert np.array_equal(images.pixels, expected.pixels)


def test_saved_dataset_and_arrow_file_and_imagefolder(tmp_path):
    dataset = make_dataset()
    dataset.save_to_disk(tmp_path / "saved")
    DatasetDict(train=make_dataset(range(12)), val=make_dataset(range(12, 20))).save_to_disk(tmp_path / "saved_splits")
    (tmp_path / "imagefolder" / "train").mkdir(parents=True)
    lines = []
    for i in range(20):
        IMAGES[i].save(tmp_path / "imagefolder" / "train" / f"{i:02d}.png")
        lines.append(json.dumps({"file_name": f"{i:02d}.png", "text": f"image {i}"}))
    (tmp_path / "imagefolder" / "train" / "metadata.jsonl").write_text("\n".join(lines))
    arrow_file = next((tmp_path / "saved").glob("*.arrow"))
    paths = tmp_path / "saved", arrow_file, tmp_path / "saved_splits", tmp_path / "imagefolder"
    results = [load_images(settings(tmp_path, path)) for path in paths]
    assert all(np.array_equal(images.pixels, results[0].pixels) for images in results)
    assert results[2].split.tolist() == [TRAIN] * 12 + [VAL] * 8 and (results[0].split == VAL).sum() == 1
    assert results[3].captions == [[f"image {i}"] for i in range(20)]


def test_columns_and_split_of_choice(tmp_path):
    """Strings, integers and booleans are labels; a part of a split; captions that are missing are empty."""
    rows = range(20)
    dataset = make_dataset(
        breed=(["pug" if i % 2 else "corgi" for i in rows], Value("string")),
        age=([10 - i % 3 for i in rows], Value("int64")),
        good=([i % 4 == 0 for i in rows], Value("bool")),
        note=([None if i == 3 else f"note {i}" for i in rows], Value("string")),
    )
    DatasetDict(train=dataset, extra=make_dataset(range(4))).save_to_disk(tmp_path / "data")
    for column, names, labels in (
        ("breed", ["corgi", "pug"], [i % 2 for i in rows]),
        ("age", ["8", "9", "10"], [2 - i % 3 for i in rows]),
        ("good", ["no", "yes"], [int(i % 4 == 0) for i in rows]),
    ):
        options = dict(split="train", label_column=column, caption_column="note")
        images = load_images(settings(tmp_path, tmp_path / "data", **options))
        assert images.label_names == {column: names} and images.labels[:, 0].tolist() == labels
    assert images.captions[2:5] == [["note 2"], [""], ["note 4"]]
    part = load_images(settings(tmp_path, tmp_path / "data", split="train[4:14]"))
    assert len(part.pixels) == 10 and np.array_equal(part.pixels, images.pixels[4:14])


def test_missing_labels_are_the_null_label(tmp_path, capsys):
    """As in data.source=folder. The plan counts them, except those of a test split, whose labels are never used."""
    label = ClassLabel(names=["a", "b"])
    splits = dict(
        train=make_dataset(label=([i % 2 for i in range(20)], label)), test=make_dataset(range(4), label=([-1] * 4, label))
    )

    def index(name, **options):
        DatasetDict(splits).save_to_disk(tmp_path / name)
        return index_dataset(settings(tmp_path, tmp_path / name, **options))

    without_validation = index("no_validation")  # test is used for validation
    assert without_validation.source.labels[:, 0].tolist() == [i % 2 for i in range(20)] + [2] * 4
    assert "images with the null label: 4 without label, of 24" in without_validation.describe()
    splits["validation"] = make_dataset(range(20, 24), label=([0, 1, 0, 1], label))
    assert not any("null label" in line for line in index("hidden_test").describe())
    splits["train"] = make_dataset(label=([-1, None] + [1] * 18, label))
    partly = index("partly")
    assert partly.load().labels[:20, 0].tolist() == [2, 2] + [1] * 18
    assert "images with the null label: 2 without label, of 24" in partly.describe()
    breeds = [["pug", "corgi", "", None][i % 4] for i in range(20)]
    splits = dict(train=make_dataset(breed=(breeds, Value("string"))))
    breed = index("breeds", label_column="breed").source
    assert breed.label_names == {"breed": ["corgi", "pug"]} and breed.labels[:4, 0].tolist() == [1, 0, 2, 2]
    splits = dict(train=make_dataset(label=([-1] * 20, label), breed=([None] * 20, Value("string"))))
    unlabelled = index("unlabelled")
    assert unlabelled.source.labels is None and unlabelled.source.label_names == {}
    assert "column label is not used as a label, because no image has a value" in capsys.readouterr().out
    for column in ("label", "breed"):
        with pytest.raises(UserError, match=f"data.label_column: no image of .* has a value of {column}"):
            index_dataset(settings(tmp_path, tmp_path / "unlabelled", label_column=column))


def test_rows_without_image_are_reported(tmp_path):
    features = Features({"image": Image()})
    content = [{"bytes": png(IMAGES[0]), "path": None}] * 18 + [None] * 2
    Dataset.from_dict({"image": content}, features=features).save_to_disk(tmp_path / "data")
    with pytest.raises(UserError, match="2 of 20 images cannot be read .*train-00000018: the row has no image"):
        load_images(settings(tmp_path, tmp_path / "data"))


def test_bad_input_is_one_line_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    make_dataset(score=([0.5] * 20, Value("float32"))).save_to_disk(tmp_path / "data")
    Dataset.from_dict({"a": [1] * 20}).save_to_disk(tmp_path / "no_image")
    DatasetDict(a=make_dataset(), b=make_dataset()).save_to_disk(tmp_path / "no_train")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not really")
    (tmp_path / "bad.csv").write_text("a,b")
    cases = [
        (dict(path=tmp_path / "data", image_column="img"), "data.image_column: .* no column 'img'; it has image, score"),
        (dict(path=tmp_path / "data", image_column="score"), "data.image_column: score of .* holds no images"),
        (
            dict(path=tmp_path / "data", label_column="score"),
            "data.label_column: score must hold strings, integers or booleans",
        ),
        (dict(path=tmp_path / "data", caption_column="score"), "data.caption_column: score must hold a string"),
        (dict(path=tmp_path / "data", split="dev"), "data.split: .* has no split 'dev'; it has train"),
        (dict(path=tmp_path / "data", split="train[5%]"), "data.split must look like train or train"),
        (dict(path=tmp_path / "no_image"), "data.image_column must name the column of the images"),
        (dict(path=tmp_path / "no_train"), "data.split: .* has no training split; choose one of a, b"),
        (dict(path=tmp_path / "bad.parquet"), "the datasets library cannot load"),
        (dict(path=tmp_path / "bad.csv"), "supported file types: .parquet"),
        (dict(path="some/missing/folder"), "is neither a path that exists nor a hub id"),
        (dict(path="nobody/nothing"), "the datasets library cannot load nobody/nothing"),
    ]
    for options, message in cases:
        with pytest.raises(UserError, match=message) as raised:
            load_images(settings(tmp_path, **options))
        assert "\n" not in str(raised.value)
    assert not (tmp_path / "runs").exists()
    with pytest.raises(UserError, match="data.path is not set"):
        load_images(load_config(None, ["data.source=huggingface", f"runs_dir={tmp_path}"]))


def test_labels_and_captions_as_in_a_folder(tmp_path, capsys):
    """Labels are NFC-normalized without outer spaces. An empty caption does not hide one in another column."""
    breeds = [["caf\u00e9", "cafe\u0301", " tea", "tea"][i % 4] for i in range(20)], Value("string")
    empty = [[] for _ in range(20)], List(Value("string"))
    text = [f"image {i}" if i else None for i in range(20)], Value("string")
    dataset = make_dataset(breed=breeds, captions=empty, text=text)
    DatasetDict(train=dataset, eval=dataset).save_to_disk(tmp_path / "a")
    source = index_dataset(settings(tmp_path, tmp_path / "a", label_column="breed")).source
    assert source.label_names == {"breed": ["caf\u00e9", "tea"]} and source.labels[:4, 0].tolist() == [0, 0, 1, 1]
    assert source.captions[:2] == [[""], ["image 1"]] and source.split.tolist() == [TRAIN] * 20 + [VAL] * 20
    assert "note: 2 of 40 images have no caption" in capsys.readouterr().out
    make_dataset(captions=empty).save_to_disk(tmp_path / "b")
    assert index_dataset(settings(tmp_path, tmp_path / "b")).source.captions is None


def test_classes_that_differ_between_splits_are_an_error(tmp_path):
    """Otherwise, the class names of the first split would be used for all."""
    splits = {
        name: make_dataset(rows, breed=([0] * len(rows), ClassLabel(names=names)))
        for name, rows, names in (("train", range(12), ["a", "b", "c"]), ("val", range(12, 20), ["a", "c"]))
    }
    DatasetDict(splits).save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError, match="data.label_column: breed has different types or classes in the splits"):
        index_dataset(settings(tmp_path, tmp_path / "saved"))


def test_only_a_column_of_text_is_a_caption_column(tmp_path, capsys):
    label = [i % 2 for i in range(20)], ClassLabel(names=["cat", "dog"])
    make_dataset(text=label, prompt=captions_of(range(20))).to_parquet(tmp_path / "a.parquet")
    source = index_dataset(settings(tmp_path, tmp_path / "a.parquet")).source
    assert source.captions[3] == ["image 3", "noise number 3"] and source.label_names == {"text": ["cat", "dog"]}
    make_dataset(text=label).to_parquet(tmp_path / "b.parquet")
    assert index_dataset(settings(tmp_path, tmp_path / "b.parquet")).source.captions is None
    with pytest.raises(UserError, match="data.caption_column: text must hold a string"):
        index_dataset(settings(tmp_path, tmp_path / "b.parquet", caption_column="text"))

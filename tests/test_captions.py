"""Captions stored with images: captions.jsonl, .txt files and COCO annotations, in folders and zips."""

import json
import zipfile

import pytest
from PIL import Image

from dataset import TRAIN, VAL
from dataset.image_cache import load_images
from utils.errors import UserError
from utils.settings import load_config


def settings(tmp_path, path, source="folder"):
    return load_config(
        None, [f"runs_dir={tmp_path}/runs", f"data.source={source}", f"data.path={path}", "data.image_size=16"]
    )


def as_zip(folder):
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as file:
        for item in sorted(folder.rglob("*")):
            if item.is_file():
                file.write(item, f"{folder.name}/{item.relative_to(folder)}")
    return path


@pytest.mark.parametrize("zipped", [False, True])
def test_jsonl(image_folder, tmp_path, zipped):
    lines = [
        {
            "file_name": f"{i:02d}.jpg",
            "captions": [f"number {i}", " again\n" + str(i)],
            "split": "val" if i == 3 else "train",
        }
        for i in range(20)
    ]
    lines[7] = {"file_name": "07.jpg", "text": "seven"}
    (image_folder / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    images = load_images(settings(tmp_path, as_zip(image_folder) if zipped else image_folder))
    assert images.captions[2] == ["number 2", "again 2"] and images.captions[7] == ["seven"]
    assert (images.split == VAL).sum() == 1 and images.split[3] == VAL


def test_txt_files_and_images_without_caption(image_folder, tmp_path, capsys):
    for i in range(18):
        (image_folder / f"{i:02d}.txt").write_text(f"number {i}\n\n  twice\n")
    (image_folder / "README.txt").write_text("not a caption")
    images = load_images(settings(tmp_path, image_folder))
    assert images.captions[4] == ["number 4", "twice"] and images.captions[19] == [""]
    assert "2 of 20 images have no caption" in capsys.readouterr().out


def test_changed_captions_are_read_again(image_folder, tmp_path):
    for text in ("one", "three"):
        for i in range(20):
            (image_folder / f"{i:02d}.txt").write_text(text)
        assert load_images(settings(tmp_path, image_folder)).captions[0] == [text]


@pytest.mark.parametrize("line, message", [
    ('{"file_name": "99.jpg", "captions": ["x"]}', r"rows for files that do not exist or are not images: 99.jpg \(line 2\); add"),
    ('{"file_name": "01.jpg", "captions": ["x"]', "line 2: not JSON"),
    ('["01.jpg", "x"]', "line 2: expected an object with file_name"),
    ('{"captions": ["x"]}', "line 2: expected the path of an image in file_name"),
])  # fmt: skip
def test_bad_jsonl(image_folder, tmp_path, line, message):
    (image_folder / "captions.jsonl").write_text('{"file_name": "00.jpg", "captions": ["a"]}\n' + line)
    with pytest.raises(UserError, match=message):
        load_images(settings(tmp_path, image_folder))


@pytest.fixture
def coco(tmp_path):
    """COCO's layout with 12 training and 3 validation images, with two captions each."""
    folder = tmp_path / "coco"
    (folder / "annotations").mkdir(parents=True)
    for subset, first, count in (("train2017", 1, 12), ("val2017", 50, 3)):
        (folder / subset).mkdir()
        names = {i: f"{i:012d}.jpg" for i in range(first, first + count)}
        for i, name in names.items():
            Image.new("RGB", (20, 16), (i, i, i)).save(folder / subset / name)
        annotations = [{"image_id": i, "id": 10 * i + k, "caption": f"picture {i} {k}\n"} for i in names for k in range(2)]
        images = [{"id": i, "file_name": name, "height": 16, "width": 20} for i, name in names.items()]
        (folder / "annotations" / f"captions_{subset}.json").write_text(
            json.dumps({"images": images, "annotations": annotations})
        )
    return folder


@pytest.mark.parametrize("zipped", [False, True])
def test_coco(coco, tmp_path, zipped):
    images = load_images(settings(tmp_path, as_zip(coco) if zipped else coco, "coco"))
    assert images.captions[0] == ["picture 1 0", "picture 1 1"] and images.captions[13] == ["picture 51 0", "picture 51 1"]
    assert images.split.tolist() == [TRAIN] * 12 + [VAL] * 3


def test_coco_without_some_images(coco, tmp_path, capsys):
    for path in (coco / "val2017").iterdir():
        path.unlink()
    images = load_images(settings(tmp_path, coco, "coco"))
    assert (
        "captions_val2017.json is ignored: none of its images exist" in capsys.readouterr().out
        and len(images.captions) == 12
    )
    (coco / "train2017" / f"{5:012d}.jpg").unlink()
    with pytest.raises(
        UserError,
        match="captions_train2017.json has captions for files that do not exist or are not images: train2017/000000000005.jpg; add",
    ):
        load_images(settings(tmp_path, coco, "coco"))


@pytest.mark.parametrize(
    "content, message", [("{", "is not a COCO caption file"), ('{"images": []}', "is not a COCO caption file")]
)
def test_damaged_annotations(coco, tmp_path, content, message):
    (coco / "annotations" / "captions_train2017.json").write_text(content)
    with pytest.raises(UserError, match=message):
        load_images(settings(tmp_path, coco, "coco"))


def test_unreadable_caption_files(image_folder, tmp_path):
    (image_folder / "00.txt").write_bytes("a caption".encode("utf-16"))
    with pytest.raises(UserError, match="data.path: 00.txt is not UTF-8"):
        load_images(settings(tmp_path, image_folder))
    (image_folder / "00.txt").write_text("a caption")
    path = as_zip(image_folder)
    content = path.read_bytes()
    position = content.index(b"a caption")
    path.write_bytes(content[:position] + b"A" + content[position + 1 :])
    with pytest.raises(UserError, match="data.path: .*00.txt cannot be read"):
        load_images(settings(tmp_path, path))


def test_no_annotations(image_folder, tmp_path):
    with pytest.raises(UserError, match="no captions_train"):
        load_images(settings(tmp_path, image_folder, "coco"))

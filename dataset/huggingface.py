"""data.source=huggingface: datasets of the Hugging Face hub, or local parquet, arrow and imagefolder files."""

import io
import itertools
import re
import unicodedata
from pathlib import Path

import numpy as np

from config import DataConfig
from dataset import SPLITS, TEST, TRAIN, VAL, evenly_spaced
from dataset.color import NUM_PROBED, check_value_range
from dataset.files import crop_and_resize, decode_image, require_valid_path
from dataset.metadata import CAPTION_COLUMNS, clean_caption
from utils.errors import UserError
from utils.files import first_line

BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset", ".zip": "imagefolder"}
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def load_splits(cfg: DataConfig) -> dict:
    """Load data.path and return split name -> datasets.Dataset. The images stay in memory-mapped files of the library."""
    if cfg.path is None:
        raise UserError("data.path is not set: set it to a hub id, or to a folder or file of a dataset")
    import datasets

    require_valid_path(cfg.path)
    path = Path(cfg.path)
    if not path.exists() and not HUB_ID.fullmatch(cfg.path):
        raise UserError(f"data.path: {cfg.path} is neither a path that exists nor a hub id")
    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            content = datasets.load_from_disk(cfg.path)
            content = content if isinstance(content, dict) else {"train": content}
        elif path.is_file():
            if path.suffix not in BUILDERS:
                raise ValueError(f"supported file types: {', '.join(BUILDERS)}")
            content = datasets.load_dataset(BUILDERS[path.suffix], data_files=cfg.path)
        else:
            content = datasets.load_dataset(cfg.path, cfg.subset)
    except Exception as error:  # no network, unknown id, damaged file: many types from several libraries
        raise UserError(f"data.path: the datasets library cannot load {cfg.path} ({first_line(error)})") from None
    if cfg.split is None:
        return content
    name, _, part = cfg.split.partition("[")
    if name not in content:
        raise UserError(f"data.split: {cfg.path} has no split {name!r}; it has {', '.join(content)}")
    match = re.fullmatch(r"(\d*):(\d*)\]", part)
    if part and not match:
        raise UserError(f"data.split must look like {name} or {name}[:5000] (got {cfg.split})")
    selected = content[name]
    if match:
        start, stop, _ = slice(*(int(end) if end else None for end in match.groups())).indices(len(selected))
        selected = selected.select(range(start, stop))
    return {name: selected}


def split_codes(splits: dict, cfg: DataConfig) -> dict[str, int]:
    """Return split name -> TRAIN, VAL or TEST.

    A single split is TRAIN. If there is no validation split, the test split is VAL. Splits with other names are left out.
    """
    if len(splits) == 1:
        return {name: TRAIN for name in splits}
    codes = {name: SPLITS[name.casefold()] for name in splits if name.casefold() in SPLITS}
    if TRAIN not in codes.values():
        raise UserError(f"data.split: {cfg.path} has no training split; choose one of {', '.join(splits)}")
    if VAL not in codes.values():
        codes = {name: VAL if code == TEST else code for name, code in codes.items()}
    for name in splits.keys() - codes.keys():
        print(f"note: split {name} of {cfg.path} is not used; to use only this split, set data.split={name}")
    return codes


def find_columns(features: dict, cfg: DataConfig) -> tuple[str, list[str], list[str]]:
    """Return the names of the image column, the label columns and the caption columns."""
    import datasets

    for key in ("image_column", "label_column", "caption_column"):
        if (name := getattr(cfg, key)) is not None and name not in features:
            raise UserError(f"data.{key}: {cfg.path} has no column {name!r}; it has {', '.join(features)}")
    images = _columns(features, datasets.Image)
    if cfg.image_column is None and len(images) != 1:
        raise UserError(
            f"data.image_column must name the column of the images ({len(images)} columns of {cfg.path} are images); "
            f"the columns are {', '.join(features)}"
        )
    labels = [cfg.label_column] if cfg.label_column else _columns(features, datasets.ClassLabel)
    texts = [name for name in CAPTION_COLUMNS if name in features and _holds_text(features[name])]
    return cfg.image_column or images[0], labels, [cfg.caption_column] if cfg.caption_column else texts


def _holds_text(feature) -> bool:
    """Return whether a column holds strings or lists of strings."""
    feature = getattr(feature, "feature", feature[0] if isinstance(feature, list) else feature)
    return getattr(feature, "dtype", None) in ("string", "large_string")


def _columns(features: dict, kind: type) -> list[str]:
    """Return the names of the columns whose feature has this type."""
    return [name for name, feature in features.items() if isinstance(feature, kind)]


def read_labels(column: list, feature, name: str) -> tuple[np.ndarray, list[str]]:
    """Return (N,) int64 indices and the names of the values. A missing value becomes the null label."""
    import datasets

    if isinstance(feature, datasets.ClassLabel):
        names = list(feature.names)
        labels = np.array([-1 if value is None else value for value in column], dtype=np.int64)  # -1: no label
    else:
        if any(isinstance(value, (float, list, dict, bytes)) for value in column):
            raise UserError(f"data.label_column: {name} must hold strings, integers or booleans (it has type {feature})")
        column = [unicodedata.normalize("NFC", value).strip() if isinstance(value, str) else value for value in column]
        values = sorted({value for value in column if value not in (None, "")})
        index = {value: i for i, value in enumerate(values)}
        names = [{True: "yes", False: "no"}[v] if isinstance(v, bool) else str(v) for v in values]
        labels = np.array([index.get(value, -1) for value in column], dtype=np.int64)
    return np.where(labels < 0, len(names), labels), names


def read_captions(column: list, name: str) -> list[list[str]]:
    """Return the captions of each image, [""] if it has none."""
    captions = []
    for value in column:
        texts = [value] if value is None or isinstance(value, str) else value
        if not isinstance(texts, list) or not all(text is None or isinstance(text, str) for text in texts):
            raise UserError(f"data.caption_column: {name} must hold a string or a list of strings (got {str(value)[:60]!r})")
        captions.append([clean_caption(text) for text in texts if text and text.strip()] or [""])
    return captions


def image_content(entry) -> bytes | None:
    """Return the bytes of an image file. The entry holds these bytes, or is a dictionary with `bytes` or `path`."""
    return entry if isinstance(entry, bytes) else entry and (entry.get("bytes") or Path(entry["path"]).read_bytes())


def image_reader(parts: list, column: str, cfg: DataConfig):
    """Return read(indices), which gives a decoded image or an error message for each index.

    parts: the datasets of the splits. Indices refer to their concatenation.
    """
    starts = np.cumsum([0, *map(len, parts)])

    def decode(entry) -> np.ndarray | str:
        try:
            content = image_content(entry)
            if not content:
                return "the row has no image"
            return crop_and_resize(decode_image(content, cfg.channels, cfg.value_range), cfg.crop_name, cfg.size)
        except Exception as error:  # Pillow raises many exception types on damaged files
            return f"{type(error).__name__}: {error}"

    def read(indices: list[int]) -> list[np.ndarray | str]:
        part_of_index = np.searchsorted(starts, indices, side="right") - 1
        images: dict[int, np.ndarray | str] = {}
        for p in np.unique(part_of_index):
            rows = [int(i) for i in np.asarray(indices)[part_of_index == p]]
            entries = parts[p][[row - int(starts[p]) for row in rows]][column]
            images |= zip(rows, map(decode, entries))
        return [images[i] for i in indices]

    return read


def read_dataset(cfg: DataConfig) -> dict:
    """Load the dataset and return the keyword arguments of sources.Source."""
    import datasets

    splits = load_splits(cfg)
    codes = split_codes(splits, cfg)
    features = splits[next(iter(codes))].features
    for name in codes:
        if set(splits[name].features) != set(features):
            raise UserError(f"data.path: the splits of {cfg.path} have different columns; choose one with data.split")
    image_column, label_columns, caption_columns = find_columns(features, cfg)
    for name, column in itertools.product(codes, label_columns):
        if splits[name].features[column] != features[column]:
            raise UserError(f"data.label_column: {column} has different types or classes in the splits of {cfg.path}")
    try:
        parts = [splits[name].cast_column(image_column, datasets.Image(decode=False)) for name in codes]
    except Exception as error:  # the column holds no image files; the exception type varies
        raise UserError(f"data.image_column: {image_column} of {cfg.path} holds no images ({first_line(error)})") from None
    sample = evenly_spaced(np.arange(len(parts[0])), NUM_PROBED)
    open_file = lambda i: io.BytesIO(image_content(parts[0][int(i)][image_column]))
    check_value_range(sample, open_file, known=cfg.value_range is not None)
    split = np.repeat(list(codes.values()), [len(part) for part in parts]).astype(np.uint8)

    def column(name: str) -> list:
        return [value for part in parts for value in part[name]]

    labels, label_names = [], {}
    for name in label_columns:
        indices, names = read_labels(column(name), features[name], name)
        if (indices < len(names)).any():
            labels.append(indices)
            label_names[name] = names
        elif cfg.label_column:
            raise UserError(f"data.label_column: no image of {cfg.path} has a value of {name}")
        else:
            print(f"note: column {name} is not used as a label, because no image has a value")
    captions = None
    for name in caption_columns:  # as with data.source=folder, each image uses the first column in which it has a caption
        texts = read_captions(column(name), name)
        captions = texts if captions is None else [first if first != [""] else t for first, t in zip(captions, texts)]
    if captions and all(texts == [""] for texts in captions):
        if cfg.caption_column:
            raise UserError(f"data.caption_column: no image of {cfg.path} has a value of {cfg.caption_column}")
        captions = None
    return dict(
        names=[f"{name}-{i:08d}" for name, part in zip(codes, parts) for i in range(len(part))],
        read=image_reader(parts, image_column, cfg),
        cache_key=[
            [[name, len(splits[name]), splits[name]._fingerprint] for name in codes],
            [image_column, label_columns, caption_columns, cfg.value_range],
        ],
        split=split if len(codes) > 1 else None,
        labels=np.stack(labels, axis=1) if labels else None,
        label_names=label_names,
        captions=captions,
    )

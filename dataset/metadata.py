"""Captions, splits and labels in metadata.csv, metadata.jsonl and captions.jsonl (Hugging Face's imagefolder convention)."""

import csv
import io
import json
import posixpath
import re
import unicodedata
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Iterable, Iterator

import numpy as np

from config import DataConfig
from dataset import SPLITS, split_id
from dataset.files import Files
from utils.errors import UserError
from utils.files import listed, printable

TABLE_NAMES = ("metadata.csv", "metadata.jsonl", "captions.jsonl")
CAPTION_COLUMNS = ("captions", "caption", "text", "prompt")  # a row uses the first that is not empty
KNOWN_COLUMNS = ("file_name", "split", *CAPTION_COLUMNS)
MAX_CLASSES = 1000  # distinct values of a label
# Values in a CSV file, in lower case, that stand for a missing value
MISSING_CSV_VALUES = ("", "nan", "<na>", "n/a", "#n/a")
MIN_IMAGES_PER_CLASS = 2  # on average; a column with fewer images per value holds free text or numbers, not labels


@dataclass
class Metadata:
    """Content of all metadata files."""

    texts: dict[str, list[str]] = field(default_factory=dict)  # image -> captions
    splits: dict[str, int] = field(default_factory=dict)  # image -> split id
    columns: dict[str, dict[str, object]] = field(default_factory=dict)  # other column -> image -> value
    file_stats: list = field(default_factory=list)  # [path, [size, modification time or CRC]] of each file


def read_tables(files: Files, cfg: DataConfig) -> Metadata:
    """Read all metadata files. Paths in a file are relative to its folder. An image may have several rows with captions."""
    metadata, known_columns = Metadata(), set()
    images = {unicodedata.normalize("NFC", name): name for name in files.images} | {name: name for name in files.images}
    for table in files.file_stats:
        if PurePosixPath(table).name.casefold() not in TABLE_NAMES:
            continue
        metadata.file_stats.append([table, files.file_stats[table]])
        missing = []
        for line, row in _rows(files, table):
            where = f"data.path: {table}, line {line}"
            row = _normalize_column_names(row, cfg, where)
            known_columns |= row.keys()
            image = _find_image(row.get("file_name"), table, images, where)
            if image is None:
                missing.append(f"{row['file_name']} (line {line})")
            else:
                _add_row(metadata, image, row, cfg, where)
        reject_missing(missing, table, "rows")
    for key in ("caption_column", "label_column"):
        if (column := getattr(cfg, key)) is not None and column not in known_columns:
            columns = ", ".join(sorted(known_columns))
            reason = f"existing columns: {columns}" if columns else "there is no metadata.csv or metadata.jsonl"
            raise UserError(f"data.{key}: no metadata file has a column {column!r} ({reason})")
    return metadata


def _rows(files: Files, table: str) -> Iterator[tuple[int, dict]]:
    """Yield (line number, column -> value) for each row."""
    content = files.read_text(table)
    if table.casefold().endswith(".csv"):
        header = content.split("\n", 1)[0]
        # In countries with a decimal comma, spreadsheet programs separate columns by semicolons.
        delimiter = next((d for d in ",;\t|" if re.search(f'(^|[{d}])\\s*"?file_name"?\\s*([{d}\r]|$)', header, re.I)), ",")
        # strict: wrong quotation marks are errors; otherwise, all rows after an unclosed one would become one caption
        reader = csv.DictReader(io.StringIO(content, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
        try:
            columns = reader.fieldnames = [column.strip() for column in reader.fieldnames or []]
            if repeated := [column for i, column in enumerate(columns) if column and column in columns[:i]]:
                raise UserError(f"data.path: {table}: column {repeated[0]!r} is repeated")
            for row in reader:
                if None in row:
                    where = f"data.path: {table}, line {reader.line_num}"
                    raise UserError(f"{where}: more values than the {len(columns)} columns")
                row = {
                    column: value
                    for column, value in row.items()
                    if value and value.strip().casefold() not in MISSING_CSV_VALUES
                }
                if row:  # spreadsheet programs may write rows of empty cells
                    yield reader.line_num, dict.fromkeys(columns) | row
        except csv.Error as error:
            hint = ": a quotation mark is not closed" if "end of data" in str(error) else ""
            line = reader.line_num + 1  # line_num is that of the last complete row
            raise UserError(f"data.path: {table}, line {line}: {error}{hint}") from None
        return
    # Not splitlines(), which would also split at Unicode line separators inside strings.
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, parse_constant=lambda _: None)  # pandas writes NaN for missing values
        except ValueError as error:
            raise UserError(f"data.path: {table}, line {number}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise UserError(f"data.path: {table}, line {number}: expected an object with file_name (got {line[:40]})")
        yield number, row


def _normalize_column_names(row: dict, cfg: DataConfig, where: str) -> dict:
    """Rename columns that match KNOWN_COLUMNS except for case ("Split" -> "split")."""
    renamed = {column: column.casefold() for column in row if column not in (cfg.caption_column, cfg.label_column)}
    renamed = {column: name for column, name in renamed.items() if name in KNOWN_COLUMNS and name not in row}
    if len(set(renamed.values())) < len(renamed):
        raise UserError(f"{where}: columns whose names differ only in case: {', '.join(renamed)}")
    return {renamed.get(column, column): value for column, value in row.items()}


def _find_image(file_name, table: str, images: dict[str, str], where: str) -> str | None:
    if not isinstance(file_name, str):
        raise UserError(f"{where}: expected the path of an image in file_name (got {file_name!r})")
    for path in (file_name, file_name.strip().replace("\\", "/")):
        name = printable(posixpath.normpath(PurePosixPath(table).parent / path))
        if image := images.get(name) or images.get(unicodedata.normalize("NFC", name)):
            return image
    return None


def _add_row(metadata: Metadata, image: str, row: dict, cfg: DataConfig, where: str) -> None:
    row = {column: value for column, value in row.items() if not _is_empty(value)}
    candidates = CAPTION_COLUMNS if cfg.caption_column is None else (cfg.caption_column,)
    caption_column = next((column for column in candidates if column in row), None)
    texts = row.get(caption_column, [])
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{where}: {caption_column} must be a string or a list of strings (got {str(texts)[:60]})")
    if texts := [clean_caption(text) for text in texts if text.strip()]:
        metadata.texts.setdefault(image, []).extend(texts)
    split = row.get("split")
    if split is not None:
        code = split_id(split.strip()) if isinstance(split, str) else None
        if code is None:
            raise UserError(f"{where}: split must be one of {', '.join(SPLITS)} (got {split!r})")
        if metadata.splits.setdefault(image, code) != code:
            raise UserError(f"{where}: split of {image} is {split!r} here, but differs in another row")
    for column in row.keys() - {"file_name", "split"}:
        if column != caption_column or column == cfg.label_column:
            values = metadata.columns.setdefault(column, {})
            # None marks a value that differs between several rows of the same image.
            values[image] = row[column] if values.get(image, row[column]) == row[column] else None


def _is_empty(value) -> bool:
    """Return whether a value is null, a blank string, an empty list, or a list of blank strings."""
    if isinstance(value, list):
        return all(isinstance(item, str) and not item.strip() for item in value)
    return value is None or (isinstance(value, str) and not value.strip())


def clean_caption(text: str) -> str:
    """Join lines and replace lone surrogates, which JSON can contain (half of an emoji), by "?"."""
    return " ".join(text.split()).encode("utf-8", "replace").decode()


def reject_missing(missing: list[str], name: str, what: str) -> None:
    if missing:
        raise UserError(
            f"data.path: {name} has {what} for files that do not exist or are not images: {listed(missing)}; add the "
            f"images or remove their {what}"
        )


def label_columns(metadata: Metadata, cfg: DataConfig, names: list[str]) -> tuple[np.ndarray | None, dict[str, list[str]]]:
    """Return labels (N, K) int64 of the images and the names of their values. A missing value becomes the null label.

    Labels are the columns with few distinct values (strings, integers or booleans), or data.label_column alone.
    """
    labels, label_names, ignored = [], {}, []
    columns = metadata.columns
    if cfg.label_column is not None:
        columns = {cfg.label_column: columns.get(cfg.label_column, {})}
    for column, by_image in sorted(columns.items()):
        values = [by_image.get(name, "") for name in names]
        texts, problem = _label_texts(values)
        present = {text for text in texts if text is not None}
        if problem is None and not present:
            problem = "no image has a value"
        if problem is None and cfg.label_column is None:
            if len(present) > MAX_CLASSES:
                problem = f"more than {MAX_CLASSES:,} values"
            elif len(present) * MIN_IMAGES_PER_CLASS > sum(text is not None for text in texts):
                problem = "text"
            elif len(present) < 2:
                problem = "one value"
        if problem is not None:
            ignored.append(f"{column} ({problem})")
            continue
        ordered = sorted(present, key=lambda text: (int(text), text) if are_integers(present) else (0, text))
        index = {text: i for i, text in enumerate(ordered)}
        labels.append([index.get(text, len(ordered)) for text in texts])
        label_names[column] = ordered
    if ignored and cfg.label_column is not None:
        raise UserError(
            f"data.label_column: {ignored[0]} cannot be a label: each image needs one string, integer or boolean, or no value, "
            f"and at least one image needs a value"
        )
    if ignored:
        print(f"note: columns that are not used as labels: {', '.join(ignored)}")
    return (np.array(labels, dtype=np.int64).T if labels else None), label_names


def are_integers(texts: Iterable[str]) -> bool:
    return all(re.fullmatch(r"-?\d+", text) for text in texts)


def _label_texts(values: list) -> tuple[list[str | None], str | None]:
    """Return (values as text, None), or ([], reason) if the values cannot be labels. The text of a missing value is None."""
    if any(value is None for value in values):
        return [], "differs between rows of one image"
    if any(isinstance(value, (dict, list)) for value in values):
        return [], "lists or objects"
    texts = [str(value).strip() for value in values]
    present = {text for text in texts if text}
    if any(isinstance(value, float) for value in values) or (not are_integers(present) and all(map(_is_number, present))):
        return [], "numbers with fractions"
    if {text.lower() for text in present} <= {"true", "false"}:
        texts = [{"true": "yes", "false": "no"}.get(text.lower(), "") for text in texts]
    return [unicodedata.normalize("NFC", text) or None for text in texts], None


def _is_number(text: str) -> bool:
    try:
        float(text)
        return True
    except ValueError:
        return False

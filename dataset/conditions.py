"""Labels or captions of the training and validation images, as conditions for the U-Net."""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Callable

import torch
from torch import Tensor

from config import Config
from dataset import VAL, evenly_spaced
from dataset.encodings import LatentDataset
from dataset.text_encoder import TextEncoder
from models.conditioning import Cond, Conditioner, LabelEmbedder, TextEmbedder, WordEncoder, split_words
from utils.device import copy_to
from utils.errors import UserError

MIN_WORD_COUNT = 2  # a word that occurs in fewer captions is treated as unknown
MAX_VOCABULARY = 10_000  # maximum number of words, and of word pairs
REMEDY = (
    "run create_encodings.py with the original data.* and text.* settings, or train_diffusion.py with another diffusion.name"
)


@dataclass
class Conditions:
    """Conditions of a set of images: the labels or one of the captions of each image."""

    choose: Callable[[Tensor], Tensor]  # image indices (B,) -> condition indices (B,): a random caption of each image
    look_up: Callable[[Tensor], Cond]  # condition indices (B,) on the CPU -> conditions on the device
    titles: Callable[[Tensor], list[str]]  # condition indices (B,) -> captions or label values as text
    fingerprint: str  # of the labels or captions

    def gather(self, rows: Tensor) -> Cond:
        """Image indices (B,) on the CPU -> conditions on the device, with a random caption of each image."""
        return self.look_up(self.choose(rows))


def conditioning_settings(config: Config, dataset: LatentDataset) -> dict | None:
    """Return the arguments of make_conditioner(); None if diffusion.condition=none."""
    cfg, path = config.diffusion, config.run_dir / "encodings.pt"
    if cfg.condition == "none":
        return None
    names = dataset.label_names
    check_condition(config, names, dataset.captions, str(path))
    if cfg.condition == "class":
        return {"kind": "labels", "names": {name: names[name] for name in cfg.labels or names}}
    if config.text.encoder == "words":
        vocabulary, pairs = build_vocabulary(dataset.captions)
        num_long = sum(len(split_words(text)) > config.text.max_words for text in chain.from_iterable(dataset.captions))
        if num_long:
            print(f"note: {num_long:,} captions are longer than text.max_words={config.text.max_words} and are truncated")
        sizes = dict(width=config.text.width, layers=config.text.layers, max_words=config.text.max_words)
        return dict(kind="words", vocabulary=vocabulary, pairs=pairs, **sizes)
    text, model = dataset.text, config.text.model
    if "model" in config.text.model_fields_set and model != text.model:  # the same encoder in another folder is allowed
        if TextEncoder(model, torch.device("cpu")).fingerprint != text.fingerprint:
            raise UserError(
                f"{path}: the captions were embedded by {text.model}, but text.model={model} has other weights: run "
                f"create_encodings.py again, or restore text.model"
            )
    return dict(
        kind="text",
        model=text.model,
        fingerprint=text.fingerprint,
        pooling=text.pooling,
        token_dim=text.dim,
        null_length=len(text.null()),
    )


def check_condition(
    config: Config, label_names: dict[str, list[str]], captions: list[list[str]] | None, origin: str
) -> None:
    """Raise UserError if the images lack the labels or captions that diffusion.condition needs.

    origin: source or file of the images, for the error message
    """
    cfg = config.diffusion
    if cfg.condition == "class":
        if not label_names:
            raise UserError(
                f"diffusion.condition=class: the images of {origin} have no labels; train with diffusion.condition=none"
            )
        unknown = [name for name in cfg.labels or [] if name not in label_names]
        if unknown:
            raise UserError(f"diffusion.labels: unknown label {unknown[0]!r}; {origin} has: {', '.join(label_names)}")
    if cfg.condition == "text":
        if captions is None:
            raise UserError(
                f"diffusion.condition=text: the images of {origin} have no captions; train with diffusion.condition=none"
            )
        counts = Counter()
        for caption in chain.from_iterable(captions):
            counts.update(words := set(split_words(caption)))
            if any(counts[word] >= MIN_WORD_COUNT for word in words):
                return
        if not any(chain.from_iterable(captions)):
            raise UserError(f"diffusion.condition=text: all training captions of {origin} are empty")
        if config.text.encoder == "words":
            raise UserError(f"text.encoder=words: no word occurs in at least {MIN_WORD_COUNT} captions of {origin}")


def build_vocabulary(captions: list[list[str]]) -> tuple[list[str], list[str]]:
    """Return the most frequent words, and the most frequent pairs of adjacent words ("red shirt"), sorted alphabetically."""
    word_counts, pair_counts = Counter(), Counter()
    for caption in chain.from_iterable(captions):
        words = split_words(caption)
        word_counts.update(set(words))
        pair_counts.update(set(pairwise(words)))
    vocabulary = _most_frequent(word_counts)
    known = set(vocabulary)
    return vocabulary, [f"{a} {b}" for a, b in _most_frequent(pair_counts) if a in known and b in known]


def _most_frequent(counts: Counter) -> list:
    items = sorted((item for item, n in counts.items() if n >= MIN_WORD_COUNT), key=lambda item: (-counts[item], item))
    return sorted(items[:MAX_VOCABULARY])


def conditions_for_split(conditioner: Conditioner, dataset: LatentDataset, split: int, device: torch.device) -> Conditions:
    """Return the conditions of the TRAIN or VAL images.

    Raises UserError if the dataset has other labels or another text encoder than the model was trained with.
    """
    if isinstance(conditioner, LabelEmbedder):
        for name, values in conditioner.names.items():
            if dataset.label_names.get(name) != values:
                dataset_values = ", ".join(dataset.label_names.get(name, ["none"])[:10])
                raise UserError(
                    f"encodings.pt has other values of the label {name} ({dataset_values}) than the model was trained with: "
                    f"{REMEDY}"
                )
        columns = [list(dataset.label_names).index(name) for name in conditioner.names]
        labels = (dataset.val_labels if split == VAL else dataset.labels)[:, columns]
        return _label_conditions(conditioner, labels, device)
    captions = dataset.val_captions if split == VAL else dataset.captions
    if captions is None:
        raise UserError(f"encodings.pt holds no captions, but the model was trained with captions: {REMEDY}")
    if isinstance(conditioner, WordEncoder):
        return _caption_conditions(captions, _word_token_ids(conditioner, captions, device))
    if dataset.text is None or dataset.text.fingerprint != conditioner.fingerprint:
        encoder = dataset.text.model if dataset.text else "no text encoder"
        raise UserError(
            f"the captions of encodings.pt were embedded by {encoder}, "
            f"but the model was trained with {conditioner.model}: {REMEDY}"
        )
    offset = sum(map(len, dataset.captions)) if split == VAL else 0  # dataset.text holds the training captions first
    return _caption_conditions(captions, lambda i: dataset.text.tokens(i + offset, device))


def val_conditions(conditioner: Conditioner | None, dataset: LatentDataset, n: int, device: torch.device) -> Cond:
    """Return the conditions of n validation images; () for an unconditional model.

    The images are evenly spaced, and repeated if there are fewer than n. Every call picks the same captions.
    """
    return () if conditioner is None else titled_val_conditions(conditioner, dataset, n, device)[0]


def titled_val_conditions(
    conditioner: Conditioner, dataset: LatentDataset, n: int, device: torch.device
) -> tuple[Cond, list[str]]:
    """Return val_conditions() and their captions or label values as text."""
    rows = evenly_spaced(torch.arange(len(dataset.val_mean)), n)
    rows = rows[torch.arange(n) % len(rows)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        conditions = conditions_for_split(conditioner, dataset, VAL, device)
        chosen = conditions.choose(rows)
        return conditions.look_up(chosen), conditions.titles(chosen)


def _label_conditions(conditioner: LabelEmbedder, labels: Tensor, device: torch.device) -> Conditions:
    device_labels = labels.to(device)
    fingerprint = hashlib.sha256(labels.contiguous().numpy().tobytes()).hexdigest()[:16]

    def look_up(rows: Tensor) -> Cond:
        return (device_labels[copy_to(rows, device)],)

    def titles(rows: Tensor) -> list[str]:
        return [conditioner.title(row) for row in labels[rows].tolist()]

    return Conditions(lambda rows: rows, look_up, titles, fingerprint)


def _word_token_ids(conditioner: WordEncoder, captions: list[list[str]], device: torch.device) -> Callable[[Tensor], Cond]:
    token_ids = conditioner.encode(list(chain.from_iterable(captions)))[0]
    max_length = int((token_ids != WordEncoder.PADDING).sum(dim=1).max())
    token_ids = token_ids[:, :max_length].to(device)
    return lambda i: (token_ids[copy_to(i, device)],)


def _caption_conditions(captions: list[list[str]], look_up: Callable[[Tensor], Cond]) -> Conditions:
    """Return the conditions of images that have captions. captions[i] lists the captions of image i.

    look_up: indices into the concatenated captions of all images -> conditions
    """
    counts = torch.tensor([len(image_captions) for image_captions in captions])
    starts = counts.cumsum(0) - counts

    def choose(rows: Tensor) -> Tensor:
        return starts[rows] + (torch.rand(len(rows)) * counts[rows]).long()

    def titles(indices: Tensor) -> list[str]:
        flat = list(chain.from_iterable(captions))
        return [flat[i] for i in indices.tolist()]

    return Conditions(choose, look_up, titles, hashlib.sha256(json.dumps(captions).encode()).hexdigest()[:16])


def describe(conditioner: Conditioner) -> str:
    if isinstance(conditioner, LabelEmbedder):
        return f"conditioned on {', '.join(f'{name} ({len(values)})' for name, values in conditioner.names.items())}"
    if isinstance(conditioner, WordEncoder):
        return f"conditioned on captions, vocabulary of {len(conditioner.vocabulary):,} words"
    assert isinstance(conditioner, TextEmbedder)
    return f"conditioned on captions, embedded by {conditioner.model}"

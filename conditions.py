"""Where conditions come from: the labels and captions of the training images, and what the user asks infer.py for."""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import Callable

import numpy as np
import torch
from torch import Tensor

from config import Config, Sampling
from data import spread
from lab.errors import UserError
from latent_cache import CaptionEmbeddings, Encodings
from models.conditioning import Conditioner, Labels, Raw, Text, Words, words_of
from sources.clip import ClipText

RARE = 2  # words that fewer training captions hold are unknown words
MOST_WORDS = 10_000
REMEDY = "run create_encodings.py with the data.* and text.* of then, or train_diffusion.py under another diffusion.name"


@dataclass
class Conditions:
    """The raw conditions of a set of images; `fingerprint` says what they were made of."""

    # Indices of images (B,), on the CPU -> their raw conditions, on the device; one caption of each is drawn by chance.
    take: Callable[[Tensor], Raw]
    fingerprint: str


# Of the training and the held-out images


def settings_for(config: Config, encodings: Encodings) -> dict | None:
    """What `make_conditioner` is to build for this experiment. Raises UserError where the data lacks what is asked for."""
    s, path = config.diffusion, config.run_dir / "encodings.pt"
    if s.condition == "none":
        return None
    if s.condition == "class":
        if encodings.labels is None:
            raise UserError(f"diffusion.condition=class: the images of {path} have no labels")
        names = encodings.label_names
        unknown = [name for name in s.labels or [] if name not in names]
        if unknown:
            raise UserError(f"diffusion.labels: {unknown[0]!r} is not among the labels of {path}: {', '.join(names)}")
        return {"kind": "labels", "names": {name: names[name] for name in s.labels or names}}
    if encodings.captions is None:
        raise UserError(f"diffusion.condition=text: the images of {path} have no captions")
    if config.text.encoder == "words":
        vocabulary, pairs = vocabulary_of(encodings.captions)
        if not vocabulary:
            raise UserError(f"text.encoder=words: no word of the captions of {path} occurs in {RARE} of them")
        long = sum(len(words_of(text)) > config.text.max_words for text in chain.from_iterable(encodings.captions))
        if long:
            print(f"note: {long:,} captions are longer than text.max_words={config.text.max_words} words and are cut")
        sizes = dict(width=config.text.width, layers=config.text.layers, max_words=config.text.max_words)
        return dict(kind="words", vocabulary=vocabulary, pairs=pairs, **sizes)
    text = encodings.text
    return dict(
        kind="text", model=text.model, fingerprint=text.fingerprint, token_dim=text.width, null_length=len(text.null())
    )


def vocabulary_of(captions: list[list[str]]) -> tuple[list[str], list[str]]:
    """The words, and the pairs of words side by side ("red shirt"), that occur in at least RARE captions, in the order of the
    alphabet; the most frequent MOST_WORDS of either."""
    words, pairs = Counter(), Counter()
    for text in chain.from_iterable(captions):
        said = words_of(text)
        words.update(set(said))
        pairs.update(set(pairwise(said)))
    vocabulary = _frequent(words)
    known = set(vocabulary)
    return vocabulary, [f"{a} {b}" for a, b in _frequent(pairs) if a in known and b in known]


def _frequent(counts: Counter) -> list:
    kept = sorted((item for item, n in counts.items() if n >= RARE), key=lambda item: (-counts[item], item))
    return sorted(kept[:MOST_WORDS])


def of_split(conditioner: Conditioner, encodings: Encodings, held_out: bool, device: torch.device) -> Conditions:
    """Conditions of the training or of the held-out images, for this conditioner. Raises UserError where the encodings hold other
    labels, or captions by another text encoder, than it was made for."""
    if isinstance(conditioner, Labels):
        for name, values in conditioner.names.items():
            if encodings.label_names.get(name) != values:
                there = ", ".join(encodings.label_names.get(name, ["no such label"])[:10])
                raise UserError(
                    f"the labels of encodings.pt are not those the model was trained with ({name}: {there}): {REMEDY}"
                )
        columns = [list(encodings.label_names).index(name) for name in conditioner.names]
        return _of_labels((encodings.held_out_labels if held_out else encodings.labels)[:, columns], device)
    texts = encodings.held_out_captions if held_out else encodings.captions
    if texts is None:
        raise UserError(f"encodings.pt holds no captions, and the model was trained with some: {REMEDY}")
    if isinstance(conditioner, Words):
        return _of_captions(texts, _numbers(conditioner, texts, device))
    if encodings.text is None or encodings.text.fingerprint != conditioner.fingerprint:
        there = encodings.text.model if encodings.text else "no text encoder"
        raise UserError(
            f"the captions of encodings.pt were embedded by {there}, the model was trained with {conditioner.model}: {REMEDY}"
        )
    first = sum(map(len, encodings.captions)) if held_out else 0
    return _of_captions(texts, lambda rows: encodings.text.take(rows + first, device))


def of_held_out(conditioner: Conditioner | None, encodings: Encodings, n: int, device: torch.device) -> Raw | None:
    """What n held-out images show, spread evenly over all of them (from the first again where they are fewer), the same captions
    every time; None for an unconditional model."""
    if conditioner is None:
        return None
    rows = spread(torch.arange(len(encodings.held_out)), n)
    rows = rows[torch.arange(n) % len(rows)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return of_split(conditioner, encodings, held_out=True, device=device).take(rows)


def _of_labels(labels: Tensor, device) -> Conditions:
    there = labels.to(device)
    fingerprint = hashlib.sha256(labels.contiguous().numpy().tobytes()).hexdigest()[:16]
    return Conditions(lambda rows: (there[rows.to(device, non_blocking=True)],), fingerprint)


def _numbers(conditioner: Words, texts: list[list[str]], device) -> Callable[[Tensor], Raw]:
    numbers = conditioner.encode([text for of_image in texts for text in of_image])[0]
    longest = int((numbers != Words.PADDING).sum(dim=1).max())
    numbers = numbers[:, :longest].to(device)
    return lambda rows: (numbers[rows.to(device, non_blocking=True)],)


def _of_captions(texts: list[list[str]], look_up: Callable[[Tensor], Raw]) -> Conditions:
    counts = torch.tensor([len(of_image) for of_image in texts])
    first = counts.cumsum(0) - counts

    def take(rows: Tensor) -> Raw:
        return look_up(first[rows] + (torch.rand(len(rows)) * counts[rows]).long())

    return Conditions(take, hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16])


# Of the user


@dataclass
class Requests:
    """What to draw, one entry per row of the grid: titles, and their raw conditions (none for an unconditional model)."""

    titles: list[str]
    raw: Raw | None
    warnings: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return 0 if self.raw is None else len(self.raw[0])

    def take(self, rows: list[int]) -> Raw | None:
        return None if self.raw is None else tuple(r[rows] for r in self.raw)


def requested(config: Config, conditioner: Conditioner | None, device: torch.device) -> Requests:
    """Read sampling.labels or sampling.prompts for this model. Raises UserError for what it does not know.

    Without either: every class in turn where there is one kind of label (of more than sampling.rows, so many at even distances), else
    the null condition, as an untitled row.
    """
    s = config.sampling
    if conditioner is None:
        if s.labels is not None or s.prompts is not None:
            key, condition = ("labels", "class") if s.labels is not None else ("prompts", "text")
            raise UserError(f"sampling.{key}: this model is unconditional; train one with diffusion.condition={condition}")
        return Requests([], None)
    if isinstance(conditioner, Labels):
        if s.prompts is not None:
            raise UserError("sampling.prompts: this model was trained on labels, not on captions; use sampling.labels")
        return _asked_by_label(s, conditioner, device)
    if s.labels is not None:
        raise UserError("sampling.labels: this model was trained on captions, not on labels; use sampling.prompts")
    prompts = s.prompts if s.prompts is not None else [""]
    titles = [] if s.prompts is None else prompts
    if isinstance(conditioner, Words):
        numbers, unknown = conditioner.encode(prompts)
        warnings = [f"warning: the model knows no word {word!r}" for word in sorted(unknown)]
        return Requests(titles, (numbers.to(device),), warnings)
    named = "model" in config.text.model_fields_set  # else where it lay in training
    encoder = ClipText(config.text.model if named else conditioner.model, device)
    if encoder.fingerprint != conditioner.fingerprint:
        raise UserError(
            f"text.model: {encoder.model} has other weights than {conditioner.model}, which the model was trained with"
        )
    embeddings = CaptionEmbeddings.of(encoder, encoder.encode(prompts))
    warnings = (
        [f"warning: {encoder.cut} prompts are longer than {encoder.longest} tokens and were cut"] if encoder.cut else []
    )
    return Requests(titles, embeddings.take(torch.arange(len(prompts)), device), warnings)


def _asked_by_label(s: Sampling, conditioner: Labels, device) -> Requests:
    names, asked = conditioner.names, s.labels
    if asked is None and len(names) == 1:
        asked = spread(np.array(next(iter(names.values())), dtype=object), s.rows).tolist()
    if asked is None:
        return Requests([], (conditioner.null[None].to(device),))
    rows, titles = [], []
    for entry in asked:
        row = conditioner.null.tolist()
        for name, value in _pairs(entry, names):
            row[list(names).index(name)] = _index(name, value, names[name])
        rows.append(row)
        said = [(name, names[name][v]) for name, v in zip(names, row) if v < len(names[name])]
        titles.append(", ".join(value if len(names) == 1 else f"{name} {value}" for name, value in said) or "anything")
    return Requests(titles, (torch.tensor(rows, device=device),))


def _pairs(entry, names: dict[str, list[str]]) -> list[tuple[str, object]]:
    """An entry of sampling.labels as (label, value): 3 or "cat" for a single kind of label, {hat: beanie, glasses: yes} for more."""
    if isinstance(entry, dict):
        for name in entry:
            if name not in names:
                raise UserError(f"sampling.labels: {name!r} is not a label of this model; there are: {', '.join(names)}")
        return list(entry.items())
    if len(names) > 1:
        raise UserError(
            f"sampling.labels: {entry!r}: this model has the labels {', '.join(names)}; say which, as in "
            f"{{{next(iter(names))}: {entry}}}"
        )
    return [(next(iter(names)), entry)]


def _index(name: str, value, values: list[str]) -> int:
    value = {True: "yes", False: "no"}[value] if isinstance(value, bool) else value  # YAML reads a bare yes as true
    if str(value) in values:  # before the numbers: a class may be called 10
        return values.index(str(value))
    if isinstance(value, int) and 0 <= value < len(values):
        return value
    known = ", ".join(f"{i} {v}" for i, v in enumerate(values[:20])) + (" …" if len(values) > 20 else "")
    raise UserError(f"sampling.labels: {name} has no {value!r}; there are: {known}")


def as_text(conditioner: Conditioner) -> str:
    """For the plan of a stage."""
    if isinstance(conditioner, Labels):
        return f"conditioned on {', '.join(f'{name} ({len(values)})' for name, values in conditioner.names.items())}"
    if isinstance(conditioner, Words):
        return f"conditioned on captions by {len(conditioner.vocabulary):,} words"
    assert isinstance(conditioner, Text)
    return f"conditioned on captions by {conditioner.model}"

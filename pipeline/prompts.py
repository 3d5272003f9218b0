"""Convert sampling.labels or sampling.prompts to conditions, one per row of the grid."""

import unicodedata
from dataclasses import dataclass, field

import numpy as np
import torch

from config import Config, SamplingConfig
from dataset import evenly_spaced
from dataset.encodings import CaptionEmbeddings
from dataset.metadata import are_integers
from dataset.text_encoder import TextEncoder
from models.conditioning import Cond, Conditioner, LabelEmbedder, WordEncoder, split_words
from utils.errors import UserError

MAX_LISTED = 20  # label values or words that a message lists
# Other spellings of the values of a yes/no label.
YES_NO = {"true": "yes", "on": "yes", "false": "no", "off": "no"}


@dataclass
class Prompts:
    """Conditions and titles of the grid's rows.

    There are no titles if all images have the null condition or the model is unconditional.
    """

    titles: list[str] = field(default_factory=list)  # text above each row of the grid
    cond: Cond = ()  # tensors with one row per title; () for an unconditional model
    warnings: list[str] = field(default_factory=list)


def read_prompts(config: Config, conditioner: Conditioner | None, device: torch.device) -> Prompts:
    """Return the conditions for sampling.labels or sampling.prompts. Raises UserError if they do not fit the model.

    If neither is set, a model conditioned on a single label gets one condition per class, for at most sampling.rows evenly
    spaced classes. Other conditional models get the null condition.
    """
    cfg = config.sampling
    if conditioner is None:
        if cfg.labels is not None or cfg.prompts is not None:
            key, condition = ("labels", "class") if cfg.labels is not None else ("prompts", "text")
            raise UserError(
                f"sampling.{key}: this model is unconditional; remove the setting, or train with "
                f"diffusion.condition={condition}"
            )
        return Prompts()
    if isinstance(conditioner, LabelEmbedder):
        if cfg.prompts is not None:
            raise UserError("sampling.prompts: this model was trained on labels, not on captions; use sampling.labels")
        return _from_labels(cfg, conditioner, device)
    if cfg.labels is not None:
        raise UserError("sampling.labels: this model was trained on captions, not on labels; use sampling.prompts")
    prompts = cfg.prompts if cfg.prompts is not None else [""]
    titles = [] if cfg.prompts is None else prompts
    if isinstance(conditioner, WordEncoder):
        token_ids, unknown_words = conditioner.encode(prompts)
        warnings = [f"warning: {word!r} is not in the model's vocabulary" for word in sorted(unknown_words)[:MAX_LISTED]]
        if len(unknown_words) > MAX_LISTED:
            warnings.append(f"warning: {len(unknown_words) - MAX_LISTED:,} more words are not in the model's vocabulary")
        num_long = sum(len(split_words(prompt)) > conditioner.max_words for prompt in prompts)
        if num_long:
            warnings.append(f"warning: {num_long} prompts are longer than {conditioner.max_words} words and were truncated")
        return Prompts(titles, (token_ids.to(device),), warnings)
    explicit = "model" in config.text.model_fields_set  # if not set, use the encoder from training
    encoder = TextEncoder(config.text.model if explicit else conditioner.model, device)
    if encoder.fingerprint != conditioner.fingerprint:
        raise UserError(f"text.model: {encoder.model} has other weights than {conditioner.model} had in training")
    embeddings = CaptionEmbeddings.from_encoder(encoder, encoder.encode(prompts))
    truncated = f"warning: {encoder.num_truncated} prompts are longer than {encoder.max_length} tokens and were truncated"
    warnings = [truncated] if encoder.num_truncated else []
    return Prompts(titles, embeddings.tokens(torch.arange(len(prompts)), device), warnings)


def _from_labels(cfg: SamplingConfig, conditioner: LabelEmbedder, device) -> Prompts:
    label_names, requested_labels = conditioner.names, cfg.labels
    if requested_labels is None and len(label_names) == 1:
        classes = np.array(next(iter(label_names.values())), dtype=object)
        requested_labels = evenly_spaced(classes, cfg.rows).tolist()
    if requested_labels is None:
        return Prompts(cond=(conditioner.null[None].to(device),))
    rows, titles = [], []
    for entry in requested_labels:
        row = conditioner.null.tolist()
        for label, value in _parse_label(entry, label_names):
            row[list(label_names).index(label)] = _class_index(label, value, label_names[label])
        rows.append(row)
        titles.append(conditioner.title(row))
    return Prompts(titles, (torch.tensor(rows, device=device),))


def _parse_label(entry: str | dict[str, str], label_names: dict[str, list[str]]) -> list[tuple[str, str]]:
    """Return the (label, value) pairs of an entry of sampling.labels.

    The entry is a mapping label -> value or, for a model with a single label, just a value such as "3" or "cat".
    """
    if isinstance(entry, dict):
        for label in entry:
            if label not in label_names:
                raise UserError(
                    f"sampling.labels: {label!r} is not a label of this model; its labels are {', '.join(label_names)}"
                )
        return list(entry.items())
    if len(label_names) > 1:
        raise UserError(
            f"sampling.labels: {entry!r} must name its label, for example {{{next(iter(label_names))}: {entry}}}; "
            f"the model has {', '.join(label_names)}"
        )
    return [(next(iter(label_names)), entry)]


def _class_index(label: str, value: str, classes: list[str]) -> int:
    value, names = unicodedata.normalize("NFC", value), {unicodedata.normalize("NFC", c): i for i, c in enumerate(classes)}
    # Try class names before indices, because a class may be named "10". Indices are compared as text: "010" is not index 10.
    for name in (value, YES_NO.get(value.lower())):
        if name in names:
            return names[name]
    # If all class names are integers, a number is always a name: 1 means "001", even if its index is 0.
    no_indices = are_integers(classes)
    accepted = [str(int(name)) if no_indices else str(i) for i, name in enumerate(classes)]
    if accepted.count(value) == 1:
        return accepted.index(value)
    listed = ", ".join(name if no_indices else f"{i} {name}" for i, name in enumerate(classes[:MAX_LISTED]))
    more = " …" if len(classes) > MAX_LISTED else ""
    raise UserError(f"sampling.labels: {label} has no value {value!r}; its values are {listed}{more}")

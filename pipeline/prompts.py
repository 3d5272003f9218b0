"""Requested labels and prompts -> conditions, one per row of the grid."""

import unicodedata
from dataclasses import dataclass, field

import numpy as np
import torch

from config import Config, SamplingConfig
from dataset.encodings import CaptionEmbeddings
from dataset.image_cache import evenly_spaced
from dataset.text_encoder import TextEncoder
from models.conditioning import Cond, Conditioner, LabelEmbedder, WordEncoder, split_words
from utils.errors import UserError

MAX_LISTED = 20  # values listed in an error message
YES_NO = {"true": "yes", "on": "yes", "false": "no", "off": "no"}


@dataclass
class Prompts:
    """One condition per row of the grid, with row titles. Without titles, all images have the same condition, or none."""

    titles: list[str] = field(default_factory=list)
    cond: Cond = ()  # one row per title; () for an unconditional model
    warnings: list[str] = field(default_factory=list)


def read_prompts(config: Config, conditioner: Conditioner | None, device: torch.device) -> Prompts:
    """Conditions for sampling.labels or sampling.prompts. Refuses labels and prompts that this model does not know.

    If neither is set: one row per class for a model with one kind of label (evenly spaced ones if there are more than
    sampling.rows classes), else the null condition.
    """
    cfg = config.sampling
    if conditioner is None:
        if cfg.labels is not None or cfg.prompts is not None:
            key, condition = ("labels", "class") if cfg.labels is not None else ("prompts", "text")
            raise UserError(
                f"sampling.{key}: this model is unconditional; remove the setting, or train with diffusion.condition={condition}"
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
    explicit = "model" in config.text.model_fields_set  # else use the encoder of training
    encoder = TextEncoder(config.text.model if explicit else conditioner.model, device)
    if encoder.fingerprint != conditioner.fingerprint:
        raise UserError(f"text.model: {encoder.model} has other weights than {conditioner.model}, used in training")
    embeddings = CaptionEmbeddings.from_encoder(encoder, encoder.encode(prompts))
    cut = f"warning: {encoder.num_truncated} prompts are longer than {encoder.max_length} tokens and were truncated"
    return Prompts(titles, embeddings.tokens(torch.arange(len(prompts)), device), [cut] if encoder.num_truncated else [])


def _from_labels(cfg: SamplingConfig, conditioner: LabelEmbedder, device) -> Prompts:
    kinds, requested_labels = conditioner.names, cfg.labels
    if requested_labels is None and len(kinds) == 1:
        classes = np.array(next(iter(kinds.values())), dtype=object)
        requested_labels = evenly_spaced(classes, cfg.rows).tolist()
    if requested_labels is None:
        return Prompts(cond=(conditioner.null[None].to(device),))
    rows, titles = [], []
    for entry in requested_labels:
        row = conditioner.null.tolist()
        for kind, value in _parse_label(entry, kinds):
            row[list(kinds).index(kind)] = _class_index(kind, value, kinds[kind])
        rows.append(row)
        chosen = [(kind, kinds[kind][v]) for kind, v in zip(kinds, row) if v < len(kinds[kind])]
        titles.append(", ".join(value if len(kinds) == 1 else f"{kind} {value}" for kind, value in chosen) or "any")
    return Prompts(titles, (torch.tensor(rows, device=device),))


def _parse_label(entry: str | dict[str, str], kinds: dict[str, list[str]]) -> list[tuple[str, str]]:
    """An entry of sampling.labels -> (kind, value) pairs: "3" or "cat" if there is one kind of label, a mapping if more."""
    if isinstance(entry, dict):
        for kind in entry:
            if kind not in kinds:
                raise UserError(f"sampling.labels: {kind!r} is not a label of this model; its labels are {', '.join(kinds)}")
        return list(entry.items())
    if len(kinds) > 1:
        raise UserError(
            f"sampling.labels: {entry!r} must name its kind of label, for example {{{next(iter(kinds))}: {entry}}}; "
            f"the model has {', '.join(kinds)}"
        )
    return [(next(iter(kinds)), entry)]


def _class_index(kind: str, value: str, classes: list[str]) -> int:
    value, names = unicodedata.normalize("NFC", value), {unicodedata.normalize("NFC", c): i for i, c in enumerate(classes)}
    # Names before indices: a class may be named 10, and 010 is not 10.
    for name in (value, YES_NO.get(value.lower())):
        if name in names:
            return names[name]
    if value in (indices := [str(i) for i in range(len(classes))]):
        return indices.index(value)
    listed = ", ".join(f"{i} {name}" for i, name in enumerate(classes[:MAX_LISTED]))
    more = " …" if len(classes) > MAX_LISTED else ""
    raise UserError(f"sampling.labels: {kind} has no value {value!r}; its values are {listed}{more}")

"""runs/<name>/encodings.pt: what stage 2 hands to stage 3."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from config import Config
from lab.artifacts import fingerprint, load_plain, save_plain
from lab.errors import UserError
from lab.feed import Feed
from models.latents import Normaliser
from sources.clip import ClipText

OPTIONAL = ("mean_flipped", "labels", "held_out_labels", "captions", "held_out_captions", "text")


@dataclass
class CaptionEmbeddings:
    """Token embeddings of captions of any length, one behind the other, without padding. The last caption is the empty one."""

    model: str  # the text encoder's name or folder
    fingerprint: str  # of its weights
    values: Tensor  # (sum of lengths, D) float16
    lengths: Tensor  # (M,) int64

    def __post_init__(self):
        self._first = self.lengths.cumsum(0) - self.lengths
        self._longest = int(self.lengths.max())
        self._feed: Feed | None = None

    @classmethod
    def of(cls, encoder: ClipText, embeddings: list[Tensor]) -> "CaptionEmbeddings":
        """From (L_i, D) each, as this encoder made them."""
        values, lengths = torch.cat(embeddings).half(), torch.tensor([len(e) for e in embeddings])
        return cls(encoder.model, encoder.fingerprint, values, lengths)

    @property
    def width(self) -> int:
        return self.values.shape[1]

    def feed(self, device) -> Feed:
        """For training: from now on batches are gathered on the device, if all values fit there."""
        self._feed = Feed([self.values], device)
        return self._feed

    def null(self) -> Tensor:
        """(L, D) float32 of the empty caption."""
        return self.values[int(self._first[-1]) :].float()

    def take(self, captions: Tensor, device) -> tuple[Tensor, Tensor]:
        """Tokens (B, L, D) float32, zero where padded to the longest of all captions, and mask (B, L)."""
        places = torch.arange(self._longest)
        mask = places < self.lengths[captions, None]
        rows = torch.where(mask, self._first[captions, None] + places, 0)
        tokens = self._feed.take(rows) if self._feed else self.values[rows].to(device)
        mask = mask.to(device, non_blocking=True)
        return tokens.float() * mask[:, :, None], mask


@dataclass
class Encodings:
    """What stage 2 hands to stage 3: VAE means of training and held-out images, their normaliser, and where they come from."""

    mean: Tensor  # (N, C, h, w) as stored
    mean_flipped: Tensor | None  # the encodings of the mirrored images, not mirrored latents
    held_out: Tensor  # (M, C, h, w)
    normaliser: Normaliser
    labels: Tensor | None  # (N, K)
    held_out_labels: Tensor | None
    label_names: dict[str, list[str]]
    captions: list[list[str]] | None  # of each training image, at least one
    held_out_captions: list[list[str]] | None
    text: CaptionEmbeddings | None  # of all captions in this order, and of the empty one
    vae_fingerprint: str
    data_fingerprint: str

    def differences(self, config: Config) -> list[str]:
        """What of config.encodings and config.data.flip these encodings were not made with."""
        kind = "global" if (self.normaliser.shift == 0).all() else "per_channel"
        made_with = {
            "encodings.normalise": (kind, config.encodings.normalise),
            "encodings.dtype": (str(self.mean.dtype).removeprefix("torch."), config.encodings.dtype),
            "data.flip": (self.mean_flipped is not None, config.data.flip),
        }
        if config.text.encoder == "clip" and self.captions is not None:
            made_with["text.encoder"] = ("clip" if self.text else "none", "clip")  # which one is told by its weights
        return [f"{name} was {was}, now {now}" for name, (was, now) in made_with.items() if was != now]

    @property
    def fingerprint(self) -> str:
        """What a U-Net's world is made of: the VAE, the images, and how latents are scaled."""
        return f"{self.vae_fingerprint}-{self.data_fingerprint}-{fingerprint(self.normaliser.state_dict())}"

    def save(self, path: Path) -> None:
        content = {k: v for k, v in vars(self).items() if k not in ("normaliser", "text") and v is not None}
        if self.text is not None:
            content["text"] = {k: getattr(self.text, k) for k in ("model", "fingerprint", "values", "lengths")}
        save_plain(path, {"kind": "encodings", **content, **self.normaliser.state_dict("normaliser.")})

    @classmethod
    def load(cls, path: Path) -> "Encodings":
        """Raises UserError for a missing, damaged or foreign file."""
        if not path.is_file():
            raise UserError(f"{path} does not exist: run create_encodings.py first")
        content = load_plain(path, "run create_encodings.py again after removing it", mmap=True)
        if content.pop("kind", None) != "encodings":
            raise UserError(f"{path} holds no encodings: run create_encodings.py")
        try:
            normaliser = Normaliser.from_state_dict(content, "normaliser.")
            fields = {k: v for k, v in content.items() if not k.startswith("normaliser.")}
            optional = {k: fields.get(k) for k in OPTIONAL}
            if optional["captions"] and isinstance(optional["captions"][0], str):
                raise TypeError("one caption per image")
            if optional["text"] is not None:
                optional["text"] = CaptionEmbeddings(**optional["text"])
            return cls(normaliser=normaliser, **{**fields, **optional})
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{path} is not as this version writes it ({error}): run create_encodings.py again after removing it"
            ) from None

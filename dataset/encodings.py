"""encodings.pt: the latents, labels and captions that the U-Net is trained on."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from config import Config
from dataset.loader import BatchLoader
from dataset.text_encoder import TextEncoder
from models.normalizer import Normalizer
from utils.checkpoints import fingerprint, load_tensors, save_tensors
from utils.device import copy_to
from utils.errors import UserError

OPTIONAL = ("mean_flipped", "labels", "val_labels", "captions", "val_captions", "text")
TEXT_FIELDS = ("model", "fingerprint", "pooling", "values", "lengths")


@dataclass
class CaptionEmbeddings:
    """Token embeddings of M captions, concatenated without padding. The last one is the empty caption."""

    model: str  # name or folder of the text encoder
    fingerprint: str  # of the text encoder's weights
    pooling: str  # last or mean: how TextEmbedder pools the tokens of a caption
    values: Tensor  # (sum of lengths, D) float16
    lengths: Tensor  # (M,) int64

    def __post_init__(self):
        self._starts = self.lengths.cumsum(0) - self.lengths
        self._max_length = int(self.lengths.max())
        self._loader: BatchLoader | None = None

    @classmethod
    def from_encoder(cls, encoder: TextEncoder, embeddings: list[Tensor]) -> "CaptionEmbeddings":
        """Concatenate the (L_i, D) outputs of encoder.encode()."""
        values, lengths = torch.cat(embeddings).half(), torch.tensor([len(e) for e in embeddings])
        return cls(encoder.model, encoder.fingerprint, encoder.pooling, values, lengths)

    @property
    def dim(self) -> int:
        return self.values.shape[1]

    def loader(self, device: torch.device) -> BatchLoader:
        """Create the loader that tokens() uses from now on, and return it."""
        self._loader = BatchLoader([self.values], device)
        return self._loader

    def null(self) -> Tensor:
        """Return the token embeddings of the empty caption, (L, D) float32."""
        return self.values[int(self._starts[-1]) :].float()

    def tokens(self, i: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the embeddings (B, L, D) float32 and the mask (B, L) of captions i (B,).

        L is the length of the longest of all captions; shorter ones are padded with zeros.
        """
        positions = torch.arange(self._max_length)
        mask = positions < self.lengths[i, None]
        rows = torch.where(mask, self._starts[i, None] + positions, 0)
        tokens = self._loader.batch(rows) if self._loader else self.values[rows].to(device)
        mask = copy_to(mask, device)
        return tokens.float() * mask[:, :, None], mask


@dataclass
class LatentDataset:
    """Latents of the training and validation images, with labels, captions and the fingerprints of VAE and images."""

    mean: Tensor  # posterior means (N, C, h, w) of the training images, float16 or bfloat16, not normalized
    mean_flipped: Tensor | None  # means of the mirrored images (N, C, h, w); they differ from mirroring `mean`
    val_mean: Tensor  # (M, C, h, w) of the validation images
    normalizer: Normalizer
    labels: Tensor | None  # (N, K) int64, K labels per image
    val_labels: Tensor | None  # (M, K)
    label_names: dict[str, list[str]]
    captions: list[list[str]] | None  # at least one per training image
    val_captions: list[list[str]] | None
    text: CaptionEmbeddings | None  # of the training captions, the validation captions and one empty caption, in this order
    vae_fingerprint: str
    data_fingerprint: str

    def differences(self, config: Config) -> list[str]:
        """Describe the settings in `config` that differ from those with which this dataset was encoded."""
        normalization = "global" if (self.normalizer.shift == 0).all() else "per_channel"
        settings = {  # name -> (value in this dataset, value in config)
            "encodings.normalization": (normalization, config.encodings.normalization),
            "encodings.dtype": (str(self.mean.dtype).removeprefix("torch."), config.encodings.dtype),
            "data.flip": (self.mean_flipped is not None, config.data.flip),
        }
        if config.text.encoder == "pretrained" and self.captions is not None:
            # Only check that embeddings exist. create_encodings.py checks by text.fingerprint that this encoder made them.
            settings["text.encoder"] = ("pretrained" if self.text else "none", "pretrained")
        return [f"{name} was {old}, now {new}" for name, (old, new) in settings.items() if old != new]

    @property
    def fingerprint(self) -> str:
        """Identifier of the VAE, the images and the normalizer, which together determine the normalized latents."""
        return f"{self.vae_fingerprint}-{self.data_fingerprint}-{fingerprint(self.normalizer.state_dict())}"

    def save(self, path: Path) -> None:
        content = {k: v for k, v in vars(self).items() if k not in ("normalizer", "text") and v is not None}
        if self.text is not None:
            content["text"] = {k: getattr(self.text, k) for k in TEXT_FIELDS}
        save_tensors(path, {"kind": "encodings", **content, **self.normalizer.state_dict("normalizer.")})

    @classmethod
    def load(cls, path: Path, verify: bool = True) -> "LatentDataset":
        if not path.exists():
            raise UserError(f"{path} does not exist: run create_encodings.py first")
        remedy = "remove it and run create_encodings.py again"
        content = load_tensors(path, remedy, mmap=True, verify=verify)
        if content.pop("kind", None) != "encodings":
            raise UserError(f"{path} is not an encodings file: {remedy}")
        try:
            normalizer = Normalizer.from_state_dict(content, "normalizer.")
            fields = {k: v for k, v in content.items() if not k.startswith("normalizer.")}
            optional = {k: fields.get(k) for k in OPTIONAL}
            if optional["captions"] and isinstance(optional["captions"][0], str):
                raise TypeError("one caption per image")
            if optional["text"] is not None:
                optional["text"] = CaptionEmbeddings(**optional["text"])
            return cls(normalizer=normalizer, **{**fields, **optional})
        except Exception as error:  # in a file of another version, keys, types and shapes may all be wrong
            raise UserError(f"{path} was written by another version of nanoLDM ({error}): {remedy}") from None

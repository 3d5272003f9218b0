"""Conditioners: modules that embed labels or captions for the U-Net.

The input of a conditioner is a condition: a tuple of tensors with one row per image, such as label indices or word ids. Only
the conditioner knows what the tensors mean. It also defines the null condition for classifier-free guidance.
"""

import unicodedata
from dataclasses import dataclass

import regex
import torch
from torch import Tensor, nn

from models.layers import num_heads, zero_init
from models.transformer import EncoderBlock

Cond = tuple[Tensor, ...]  # () if unconditional


@dataclass
class Condition:
    """Output of a conditioner: an embedding to add to the timestep embedding, and tokens for cross-attention."""

    emb: Tensor  # (B, emb_dim)
    tokens: Tensor | None = None  # (B, L, token_dim)
    mask: Tensor | None = None  # (B, L) bool, False for padding


class Conditioner(nn.Module):
    """Base class. forward(*cond) takes the tensors of a condition and returns their embeddings, a `Condition`."""

    token_dim: int | None = None  # channels of a token; None: this conditioner returns no tokens
    trains_null_condition = False  # True if `drop` sometimes returns the null condition even with prob=0

    def null_like(self, cond: Cond) -> Cond:
        """Return the null condition, repeated to the shape of `cond`."""
        raise NotImplementedError

    def drop(self, cond: Cond, prob: float) -> Cond:
        """Replace conditions by the null condition with probability `prob` (Ho & Salimans 2021, Algorithm 1)."""
        dropped = torch.rand(len(cond[0]), device=cond[0].device) < prob
        return tuple(
            torch.where(dropped.view(-1, *[1] * (x.dim() - 1)), null, x) for x, null in zip(cond, self.null_like(cond))
        )


class LabelEmbedder(Conditioner):
    """Sum of label embeddings. Labels are (B, K) int64, one column per label name (class, hair, …).

    A label with n possible values has the indices 0 … n-1 and the null index n. With several columns, `drop` first sets a
    random subset of each image's labels to null, then all labels of some images.
    """

    def __init__(self, names: dict[str, list[str]], emb_dim: int):
        super().__init__()
        self.names, self.trains_null_condition = names, len(names) > 1
        num_values = torch.tensor([len(values) for values in names.values()])
        self.register_buffer("null", num_values, persistent=False)  # (K,)
        self.register_buffer("offsets", torch.cumsum(num_values + 1, 0) - (num_values + 1), persistent=False)
        self.table = nn.Embedding(sum(len(values) + 1 for values in names.values()), emb_dim)
        nn.init.normal_(self.table.weight, std=0.1)

    def title(self, labels: list[int]) -> str:
        """Return the labels of one image as text: "cat" or, if there are several label names, "hair brown, glasses yes".

        Null labels are left out. If all labels are null, the text is "any".
        """
        known = [(name, values[i]) for (name, values), i in zip(self.names.items(), labels) if i < len(values)]
        return ", ".join(value if len(self.names) == 1 else f"{name} {value}" for name, value in known) or "any"

    def forward(self, labels: Tensor) -> Condition:
        return Condition(self.table(labels + self.offsets).sum(dim=1))

    def null_like(self, cond: Cond) -> Cond:
        return (self.null.expand_as(cond[0]),)

    def drop(self, cond: Cond, prob: float) -> Cond:
        (labels,) = cond
        if labels.shape[1] > 1:
            omitted = torch.rand(labels.shape, device=labels.device) < torch.rand(len(labels), 1, device=labels.device)
            labels = torch.where(omitted, self.null, labels)
        return super().drop((labels,), prob)


class WordEncoder(Conditioner):
    """Transformer on word ids (B, L) int64, trained with the U-Net. The null condition is the empty caption.

    `emb` is a projection of the mean output token, plus a learned vector for each word and each pair of adjacent words (bag
    of n-grams: Joulin et al. 2017, §2). A pair in `pairs`, such as "red shirt", has its own vector. Other pairs share one.
    """

    PADDING, START, UNKNOWN, FIRST_WORD = 0, 1, 2, 3

    def __init__(
        self,
        vocabulary: list[str],
        emb_dim: int,
        *,
        width: int = 128,
        layers: int = 2,
        max_words: int = 32,
        pairs: list[str] = (),
    ):
        super().__init__()
        self.vocabulary, self.max_words, self.token_dim = vocabulary, max_words, width
        self.word_to_id = {word: i for i, word in enumerate(vocabulary, start=self.FIRST_WORD)}
        self.num_tokens = self.FIRST_WORD + len(vocabulary)
        self.table = nn.Embedding(self.num_tokens, width)
        self.positions = nn.Parameter(0.02 * torch.randn(max_words + 1, width))
        self.blocks = nn.ModuleList(EncoderBlock(width, num_heads(width, 64)) for _ in range(layers))
        self.norm, self.to_emb = nn.LayerNorm(width), nn.Linear(width, emb_dim)
        nn.init.normal_(self.table.weight, std=0.1)
        # One row per token id, one row per pair in `pairs`, and one row that all other pairs share.
        self.ngram_table = zero_init(nn.Embedding(self.num_tokens + len(pairs) + 1, emb_dim))
        keys = [self._pair_key(*(self.word_to_id[word] for word in pair.split())) for pair in pairs]
        keys.append(self.num_tokens**2)  # larger than any key, so that searchsorted stays in range
        pair_keys, order = torch.tensor(keys).sort()
        self.register_buffer("pair_keys", pair_keys, persistent=False)
        self.register_buffer("pair_rows", self.num_tokens + order, persistent=False)

    def forward(self, token_ids: Tensor) -> Condition:
        mask = token_ids != self.PADDING
        tokens = self.table(token_ids) + self.positions[: token_ids.shape[1]]
        for block in self.blocks:
            tokens = block(tokens, mask)
        tokens = self.norm(tokens)
        weights = mask[:, :, None] / mask.sum(dim=1)[:, None, None]
        emb = self.to_emb((tokens * weights).sum(dim=1))
        for rows, valid in ((token_ids, mask), (self._pair_rows(token_ids), mask[:, 1:])):
            emb = emb + (self.ngram_table(rows) * valid[:, :, None]).sum(dim=1)
        return Condition(emb, tokens, mask)

    def _pair_key(self, first, second):
        return first * self.num_tokens + second

    def _pair_rows(self, token_ids: Tensor) -> Tensor:
        """Rows of ngram_table for the pairs of adjacent tokens, (B, L) -> (B, L - 1)."""
        keys = self._pair_key(token_ids[:, :-1], token_ids[:, 1:])
        index = torch.searchsorted(self.pair_keys, keys)
        return torch.where(self.pair_keys[index] == keys, self.pair_rows[index], self.ngram_table.num_embeddings - 1)

    def null_like(self, cond: Cond) -> Cond:
        null = torch.full_like(cond[0], self.PADDING)
        null[:, 0] = self.START
        return (null,)

    def encode(self, captions: list[str]) -> tuple[Tensor, set[str]]:
        """Return token ids (B, 1 + max_words) of the captions, truncated or padded, and the words not in the vocabulary."""
        token_ids, unknown_words = torch.full((len(captions), 1 + self.max_words), self.PADDING), set()
        for i, caption in enumerate(captions):
            words = split_words(caption)
            unknown_words |= {word for word in words if word not in self.word_to_id}
            row = [self.START, *(self.word_to_id.get(word, self.UNKNOWN) for word in words)][: 1 + self.max_words]
            token_ids[i, : len(row)] = torch.tensor(row)
        return token_ids, unknown_words


class TextEmbedder(Conditioner):
    """Conditioner on token embeddings (B, L, token_dim) of a frozen text encoder and their mask (B, L).

    `emb` is a projection of one vector per caption. pooling="last" takes the last unmasked token, which summarizes the
    caption in CLIP. pooling="mean" takes the mean over unmasked tokens, for BERT and T5. The null condition is the embedding
    of the empty caption, which train_diffusion.py writes to `null_tokens`.
    """

    def __init__(
        self, *, model: str, token_dim: int, null_length: int, emb_dim: int, pooling: str = "last", fingerprint: str = ""
    ):
        super().__init__()
        self.model, self.fingerprint, self.token_dim, self.pooling = model, fingerprint, token_dim, pooling
        self.register_buffer("null_tokens", torch.zeros(null_length, token_dim))
        self.to_emb = nn.Linear(token_dim, emb_dim)

    def forward(self, tokens: Tensor, mask: Tensor) -> Condition:
        lengths = mask.sum(dim=1)
        if self.pooling == "last":
            pooled = tokens[torch.arange(len(tokens), device=tokens.device), lengths - 1]
        else:
            pooled = (tokens * mask[:, :, None]).sum(dim=1) / lengths[:, None]
        return Condition(self.to_emb(pooled), tokens, mask)

    def null_like(self, cond: Cond) -> Cond:
        tokens, mask = torch.zeros_like(cond[0]), torch.zeros_like(cond[1])
        length = len(self.null_tokens)
        tokens[:, :length], mask[:, :length] = self.null_tokens.to(tokens.dtype), True
        return tokens, mask


# In scripts without spaces between words, each grapheme (a character with its combining marks) is a word.
UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Javanese}\p{Balinese}"
UNSPACED += r"\p{Tai_Le}\p{New_Tai_Lue}\p{Tai_Tham}\p{Tai_Viet}"
# In other scripts, a word is a run of letters, digits, vowel signs (Mn, Mc) and joiners. Variation selectors (which follow
# emoji) also belong to category Mn, but words do not include them.
LETTERS = rf"[[\p{{L}}\p{{N}}]--[{UNSPACED}]][[\p{{L}}\p{{N}}\p{{Mn}}\p{{Mc}}\u200c\u200d]--[{UNSPACED}\uFE00-\uFE0F]]*"
WORD = regex.compile(rf"(?=[[{UNSPACED}]&&[\p{{L}}\p{{N}}]])\X\p{{M}}*|{LETTERS}(?:'{LETTERS})?", regex.V1)


def split_words(caption: str) -> list[str]:
    """Lowercase words and numbers of any script, NFC-normalized."""
    return WORD.findall(unicodedata.normalize("NFC", caption).lower())


CONDITIONERS = {"labels": LabelEmbedder, "words": WordEncoder, "text": TextEmbedder}


def make_conditioner(settings: dict, emb_dim: int) -> Conditioner:
    """Build a conditioner of the class settings["kind"] with the arguments emb_dim and all other settings."""
    arguments = {name: value for name, value in settings.items() if name != "kind"}
    return CONDITIONERS[settings["kind"]](**arguments, emb_dim=emb_dim)

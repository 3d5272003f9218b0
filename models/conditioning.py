"""What a picture is to show: labels or captions -> what the U-Net adds to time, and what it attends to.

A *raw condition* is a tuple of tensors with a row per image, as the data holds it or the user asks for it. A conditioner
turns it into a Condition and knows its own null: what is said when nothing is. The U-Net, training and guidance know
nothing else of classes and captions.
"""

import re
import unicodedata
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.layers import heads_of, zero
from models.transformer import EncoderBlock

Raw = tuple[Tensor, ...]


@dataclass
class Condition:
    emb: Tensor  # (B, emb_dim), added to the embedding of time
    tokens: Tensor | None = None  # (B, L, token_dim), for cross-attention
    mask: Tensor | None = None  # (B, L) bool: true for what is no padding


class Conditioner(nn.Module):
    """forward(*raw) -> Condition. `token_dim` is None where there is nothing to attend to."""

    token_dim: int | None = None
    drops_by_itself = False  # is the null condition trained on even where no share of conditions is dropped?

    def null_like(self, raw: Raw) -> Raw:
        """The null condition, as many times and as long as `raw`."""
        raise NotImplementedError

    def drop(self, raw: Raw, share: float) -> Raw:
        """Replace a share of the images' conditions with the null one, by chance (Ho & Salimans 2021, Algorithm 1)."""
        dropped = torch.rand(len(raw[0]), device=raw[0].device) < share
        return tuple(
            torch.where(dropped.view(-1, *[1] * (r.dim() - 1)), null, r) for r, null in zip(raw, self.null_like(raw))
        )


class Labels(Conditioner):
    """Labels (B, K) int64, one column per name -> the sum of their embeddings. The value after a column's last is its null.

    With several columns any of them may be left unsaid: `drop` then leaves out a random share of each image's too.
    """

    def __init__(self, names: dict[str, list[str]], emb_dim: int):
        super().__init__()
        self.names, self.drops_by_itself = names, len(names) > 1
        sizes = torch.tensor([len(values) for values in names.values()])
        self.register_buffer("null", sizes, persistent=False)  # (K,)
        self.register_buffer("offsets", torch.cumsum(sizes + 1, 0) - (sizes + 1), persistent=False)
        self.table = nn.Embedding(int((sizes + 1).sum()), emb_dim)
        nn.init.normal_(self.table.weight, std=0.1)

    def forward(self, labels: Tensor) -> Condition:
        return Condition(self.table(labels + self.offsets).sum(dim=1))

    def null_like(self, raw: Raw) -> Raw:
        return (self.null.expand_as(raw[0]),)

    def drop(self, raw: Raw, share: float) -> Raw:
        (labels,) = raw
        if labels.shape[1] > 1:
            unsaid = torch.rand(labels.shape, device=labels.device) < torch.rand(len(labels), 1, device=labels.device)
            labels = torch.where(unsaid, self.null, labels)
        return super().drop((labels,), share)


class Words(Conditioner):
    """Captions as numbers of words (B, L) int64 -> tokens by a small transformer, trained with the U-Net.

    0 is padding, which nothing attends to, 1 the start of every caption, 2 a word that is not in the vocabulary. The null
    is the caption without words. To time goes what the transformer makes of the whole, and directly a vector for each word and
    for each of `pairs`, "red shirt", that stands in the caption (as fastText reads a text: Joulin et al. 2017, §2).
    """

    PADDING, START, UNKNOWN, FIRST_WORD = 0, 1, 2, 3

    def __init__(
        self,
        vocabulary: list[str],
        emb_dim: int,
        width: int = 128,
        layers: int = 2,
        max_words: int = 32,
        pairs: list[str] = (),
    ):
        super().__init__()
        self.vocabulary, self.max_words, self.token_dim = vocabulary, max_words, width
        self.numbers = {word: i for i, word in enumerate(vocabulary, start=self.FIRST_WORD)}
        self.size = self.FIRST_WORD + len(vocabulary)
        self.table = nn.Embedding(self.size, width)
        self.positions = nn.Parameter(0.02 * torch.randn(max_words + 1, width))
        self.blocks = nn.ModuleList(EncoderBlock(width, heads_of(width, 64)) for _ in range(layers))
        self.norm, self.to_emb = nn.LayerNorm(width), nn.Linear(width, emb_dim)
        nn.init.normal_(self.table.weight, std=0.1)
        self.direct = zero(nn.Embedding(self.size + len(pairs) + 1, emb_dim))  # words, pairs, and any other pair
        firsts, seconds = zip(*(pair.split() for pair in pairs)) if pairs else ((), ())
        keys = torch.tensor(
            [self.numbers[a] * self.size + self.numbers[b] for a, b in zip(firsts, seconds)] + [self.size**2]
        )
        keys, order = keys.sort()  # the last is no pair of words
        self.register_buffer("pair_keys", keys, persistent=False)
        self.register_buffer("pair_rows", self.size + order, persistent=False)

    def forward(self, numbers: Tensor) -> Condition:
        mask = numbers != self.PADDING
        tokens = self.table(numbers) + self.positions[: numbers.shape[1]]
        for block in self.blocks:
            tokens = block(tokens, mask)
        tokens = self.norm(tokens)
        share = mask[:, :, None] / mask.sum(dim=1)[:, None, None]
        emb = self.to_emb((tokens * share).sum(dim=1))
        for rows, there in ((numbers, mask), (self._rows_of_pairs(numbers), mask[:, 1:])):
            emb = emb + (self.direct(rows) * there[:, :, None]).sum(dim=1)
        return Condition(emb, tokens, mask)

    def _rows_of_pairs(self, numbers: Tensor) -> Tensor:
        """(B, L) -> (B, L - 1), the row in the direct table of each word with the one before it."""
        keys = numbers[:, :-1] * self.size + numbers[:, 1:]
        places = torch.searchsorted(self.pair_keys, keys)
        return torch.where(self.pair_keys[places] == keys, self.pair_rows[places], self.direct.num_embeddings - 1)

    def null_like(self, raw: Raw) -> Raw:
        null = torch.full_like(raw[0], self.PADDING)
        null[:, 0] = self.START
        return (null,)

    def encode(self, captions: list[str]) -> tuple[Tensor, set[str]]:
        """Numbers (B, 1 + max_words) and the words that are not in the vocabulary. What is longer is cut."""
        numbers, unknown = torch.full((len(captions), 1 + self.max_words), self.PADDING), set()
        for i, caption in enumerate(captions):
            words = words_of(caption)
            unknown |= {word for word in words if word not in self.numbers}
            row = [self.START, *(self.numbers.get(word, self.UNKNOWN) for word in words)][: 1 + self.max_words]
            numbers[i, : len(row)] = torch.tensor(row)
        return numbers, unknown


class Text(Conditioner):
    """Token embeddings of a frozen text encoder (B, L, token_dim) and their mask (B, L) -> the same tokens; the last one that
    is no padding, where CLIP puts what it knows of the whole, goes to time. The null is the empty caption's embedding."""

    def __init__(self, model: str, token_dim: int, null_length: int, emb_dim: int, fingerprint: str = ""):
        super().__init__()
        self.model, self.fingerprint, self.token_dim = model, fingerprint, token_dim
        self.register_buffer("null_tokens", torch.zeros(null_length, token_dim))
        self.to_emb = nn.Linear(token_dim, emb_dim)

    def forward(self, tokens: Tensor, mask: Tensor) -> Condition:
        last = tokens[torch.arange(len(tokens), device=tokens.device), mask.sum(dim=1) - 1]
        return Condition(self.to_emb(last), tokens, mask)

    def null_like(self, raw: Raw) -> Raw:
        tokens, mask = torch.zeros_like(raw[0]), torch.zeros_like(raw[1])
        length = len(self.null_tokens)
        tokens[:, :length], mask[:, :length] = self.null_tokens.to(tokens.dtype), True
        return tokens, mask


def words_of(caption: str) -> list[str]:
    """Lower-case words and numbers of any alphabet, é one letter however it is stored; everything else only separates."""
    return re.findall(r"[^\W_]+(?:'[^\W_]+)?", unicodedata.normalize("NFC", caption).lower())


KINDS = {"labels": Labels, "words": Words, "text": Text}


def make_conditioner(settings: dict, emb_dim: int) -> Conditioner:
    """From what a weights file keeps: {"kind": …, and the arguments of that class but emb_dim}."""
    arguments = {name: value for name, value in settings.items() if name != "kind"}
    return KINDS[settings["kind"]](**arguments, emb_dim=emb_dim)

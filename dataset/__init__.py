"""Datasets: image sources, image cache, latents with their labels and captions, and batch loading."""

import re

import numpy as np

TRAIN, VAL, TEST = 0, 1, 2  # split ids
SPLITS = {  # name of a split (a folder, or a value of a `split` column) in lower case -> split id
    **dict.fromkeys(("train", "training"), TRAIN),
    **dict.fromkeys(("val", "valid", "validation", "dev", "eval", "evaluation"), VAL),
    **dict.fromkeys(("test", "testing"), TEST),
}


def split_id(name: str) -> int | None:
    """Return the split id of a name such as "Train", "test_set" or "val2017"; None if it is not the name of a split."""
    return SPLITS.get(re.sub(r"[\W_]*(set|images|data)?[\W_\d]*$", "", name.casefold()))


def use_test_if_no_val(split: np.ndarray) -> np.ndarray:
    """Return split ids (N,). If no image is in VAL, the TEST images become VAL."""
    return split if (split == VAL).any() else np.where(split == TEST, VAL, split).astype(np.uint8)


def evenly_spaced(items, n: int | None):
    """Return n evenly spaced items of an array or tensor; all items if n is None or exceeds their number."""
    if n is None or n >= len(items):
        return items
    return items[np.linspace(0, len(items) - 1, n).round().astype(int)]

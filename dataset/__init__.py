"""Image sources, cached pixels and latents, their conditions, and batch loading."""

import numpy as np

TRAIN, VAL, TEST = 0, 1, 2  # split ids
SPLITS = {  # folder names and values of `split`, in any case
    **dict.fromkeys(("train", "training"), TRAIN),
    **dict.fromkeys(("val", "valid", "validation", "dev"), VAL),
    **dict.fromkeys(("test", "testing"), TEST),
}


def without_unused_test(split: np.ndarray) -> np.ndarray:
    """Return a split (N,) whose test images are VAL if there are no other validation images."""
    return split if (split == VAL).any() else np.where(split == TEST, VAL, split).astype(np.uint8)


def evenly_spaced(items, n: int | None):
    """Return n evenly spaced items of an array or tensor; all of them if n is None or too large."""
    if n is None or n >= len(items):
        return items
    return items[np.linspace(0, len(items) - 1, n).round().astype(int)]

"""Image sources, cached pixels and latents, their conditions, and batch loading."""

import numpy as np

TRAIN, VAL, TEST = 0, 1, 2  # split ids


def evenly_spaced(items, n: int | None):
    """Return n evenly spaced items of an array or tensor; all of them if n is None or too large."""
    if n is None or n >= len(items):
        return items
    return items[np.linspace(0, len(items) - 1, n).round().astype(int)]

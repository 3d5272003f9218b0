"""Pixel values of any bit depth and color profile -> 8 bits per channel in sRGB."""

import functools
import io
from typing import BinaryIO, Callable, Iterable, Sequence

import numpy as np
from PIL import Image, ImageCms

from utils.errors import UserError

BITS_PER_SAMPLE = 258  # TIFF tag
OVERSHOOT = 0.1  # of float images beyond 0 … 1, left by resampling filters
AMBIGUOUS_BITS = 14  # 16-bit images without larger values probably hold 10, 12 or 14 bits
NUM_PROBED = 32  # images of a set for check_value_range()
REMEDY = "set data.value_range=[black, white]"
SRGB = ImageCms.createProfile("sRGB")


def stored_range(image: Image.Image) -> tuple[float, float] | None:
    """Values of black and white in a gray image of more than 8 bits, by its file format; None if unknown."""
    if image.mode == "F":
        return 0.0, 1.0
    if image.mode == "I" and image.format in ("PNG", "PPM"):  # Pillow scales PPM to 16 bits
        return 0.0, 65535.0
    if image.mode.startswith("I;16"):
        bits = image.tag_v2.get(BITS_PER_SAMPLE, (16,))[0] if image.format == "TIFF" else 16
        return 0.0, 2.0**bits - 1
    return None


def to_8_bit_srgb(image: Image.Image, value_range: Sequence[float] | None) -> Image.Image:
    """Scale gray images of more than 8 bits; convert Lab and embedded color profiles to sRGB. Keeps transparency.

    value_range is that of data.value_range; None: the range of the file format. A damaged profile, or one of another color space than the image, is ignored.
    """
    if image.mode.startswith("I") or image.mode == "F":
        image = scale_to_8_bit(image, value_range)
    if image.mode == "LAB":
        return ImageCms.buildTransform(ImageCms.createProfile("LAB"), SRGB, "LAB", "RGB").apply(image)
    profile = image.info.get("icc_profile")
    if not profile:
        return image
    if image.mode in ("P", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
    alpha = image.getchannel("A") if image.mode in ("LA", "RGBA") else None
    colors = image if image.mode in ("L", "RGB", "CMYK") else image.convert("L" if image.mode == "LA" else "RGB")
    transform = srgb_transform(profile, colors.mode)
    if transform is None:
        return image
    colors = transform.apply(colors)
    if alpha is not None:
        colors.putalpha(alpha)
    return colors


def scale_to_8_bit(image: Image.Image, value_range: Sequence[float] | None) -> Image.Image:
    """Map value_range to 0 … 255. Raises ValueError if it is None and the format does not determine the range."""
    low, high = value_range or stored_range(image) or (None, None)
    if low is None:
        raise ValueError(f"the range of its 32-bit values is unknown: {REMEDY}")
    values = np.asarray(image, dtype=np.float64)
    if np.isnan(values).any():
        raise ValueError("it contains NaN")
    if image.mode == "F" and value_range is None and not -OVERSHOOT <= values.min() <= values.max() <= 1 + OVERSHOOT:
        raise ValueError(f"its float values, {values.min():g} to {values.max():g}, are not in 0 to 1: {REMEDY}")
    scaled = Image.fromarray(np.rint((values - low) / (high - low) * 255).clip(0, 255).astype(np.uint8))
    scaled.info = {key: value for key, value in image.info.items() if key != "transparency"}
    return scaled


@functools.lru_cache(maxsize=64)
def srgb_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Conversion from an ICC profile to sRGB; None if there is nothing to convert or the profile does not fit the mode."""
    try:
        transform = ImageCms.buildTransform(ImageCms.ImageCmsProfile(io.BytesIO(profile)), SRGB, mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None
    if mode == "RGB":  # most embedded profiles are sRGB: keep the exact values
        levels = np.arange(0, 256, 51, dtype=np.uint8)
        cube = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(6, 36, 3)
        difference = np.asarray(transform.apply(Image.fromarray(cube))).astype(int) - cube
        return transform if np.abs(difference).max() > 2 else None
    return transform


def check_value_range(names: Iterable[str], open_file: Callable[[str], BinaryIO], known: bool) -> None:
    """Raise UserError if the pixel value of white is unknown, as in some 16-bit and float images.

    names: some files of the dataset, whose images must all have the same range of values
    known: whether data.value_range is set
    """
    num_16_bit, highest, suggestion = 0, 0, ""
    for name in names:
        try:
            with open_file(name) as file, Image.open(file) as image:
                is_color = ";16" in str(image.tile) and not image.mode.startswith("I")  # Pillow drops the lower 8 bits
                if known and not is_color or not (is_color or image.mode.startswith("I") or image.mode == "F"):
                    continue
                values = np.asarray(image)
        except Exception:  # damaged: reported when all images are read
            continue
        if is_color or stored_range(image) == (0, 65535):
            num_16_bit, highest = num_16_bit + 1, max(highest, int(values.max()) * (256 if is_color else 1))
            suggestion = "convert them to 8 bits" if is_color else suggestion
            continue
        try:
            scale_to_8_bit(image, None)
        except ValueError as error:
            raise UserError(f"data.path: image {name}: {error}") from None
    if num_16_bit and highest < 2**AMBIGUOUS_BITS:
        bits = max(8, highest.bit_length())
        suggestion = suggestion or (
            f"set data.value_range=[0, {2**bits - 1}] if they hold {bits} bits, or [0, 65535] to leave them dark"
        )
        raise UserError(f"data.path: no value in {num_16_bit} 16-bit images is above {highest}: {suggestion}")

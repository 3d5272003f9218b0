"""Convert images of any bit depth and color profile to 8 bits per channel in sRGB."""

import functools
import io
from typing import BinaryIO, Callable, Iterable, Sequence

import numpy as np
from PIL import Image, ImageCms

from utils.errors import UserError

BITS_PER_SAMPLE, PHOTOMETRIC_INTERPRETATION = 258, 262  # TIFF tags
OVERSHOOT = 0.1  # tolerance for float values outside 0 … 1: resampling filters overshoot at edges
AMBIGUOUS_BITS = 14  # 16-bit files whose values all fit in 14 bits may hold 10-, 12- or 14-bit images
NUM_PROBED = 32  # images of a dataset that check_value_range() reads
REMEDY = "set data.value_range=[black, white]"
SRGB = ImageCms.createProfile("sRGB")


def stored_range(image: Image.Image) -> tuple[float, float] | None:
    """Return the values of black and white in a gray image of more than 8 bits, as its file format defines them.

    Return None for other images, and for formats that do not define these values.
    """
    if image.mode == "F":
        return 0.0, 1.0
    if image.mode == "I" and image.format in ("PNG", "PPM"):  # Pillow scales PPM to 16 bits
        return 0.0, 65535.0
    if image.mode.startswith("I;16"):
        bits = image.tag_v2.get(BITS_PER_SAMPLE, (16,))[0] if image.format == "TIFF" else 16
        return 0.0, 2.0**bits - 1
    return None


def to_8_bit_srgb(image: Image.Image, value_range: Sequence[float] | None) -> Image.Image:
    """Convert an image to 8 bits per channel and to sRGB. Transparency is preserved.

    A color profile is ignored if it is damaged or does not match the image's color space.

    value_range: data.value_range, the values of black and white in gray images of more than 8 bits; None: as defined by the
                 file format
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
    """Map the values of black and white to 0 and 255. Raises ValueError if neither value_range nor the format gives them."""
    low, high = value_range or stored_range(image) or (None, None)
    if low is None:
        raise ValueError(f"the range of its 32-bit values is unknown: {REMEDY}")
    # In WhiteIsZero TIFFs, 0 is white. Pillow inverts them only up to 8 bits, so deeper images are inverted here.
    if value_range is None and image.format == "TIFF" and image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == 0:
        low, high = high, low
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
    """Return the conversion from an ICC profile to sRGB; None if the profile is sRGB, damaged, or made for another mode."""
    try:
        transform = ImageCms.buildTransform(ImageCms.ImageCmsProfile(io.BytesIO(profile)), SRGB, mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None
    if mode == "RGB":  # most embedded profiles are sRGB: recognize them by test colors, and keep the exact pixel values
        levels = np.arange(0, 256, 51, dtype=np.uint8)
        cube = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(6, 36, 3)
        difference = np.asarray(transform.apply(Image.fromarray(cube))).astype(int) - cube
        return transform if np.abs(difference).max() > 2 else None
    return transform


def check_value_range(names: Iterable[str], open_file: Callable[[str], BinaryIO], known: bool) -> None:
    """Raise UserError if it is unclear which pixel value is white, as in some 16-bit and float images.

    names: a sample of the dataset's files; one value range applies to all images
    known: whether data.value_range is set
    """
    num_16_bit, highest, suggestion = 0, 0, ""
    for name in names:
        try:
            with open_file(name) as file, Image.open(file) as image:
                # 16 bits per color channel, of which Pillow reads the upper 8
                is_color = ";16" in str(image.tile) and not image.mode.startswith("I")
                if known and not is_color or not (is_color or image.mode.startswith("I") or image.mode == "F"):
                    continue
                values = np.asarray(image)
        except Exception:  # damaged images are reported when the whole dataset is read
            continue
        if is_color or stored_range(image) == (0, 65535):
            num_16_bit, highest = num_16_bit + 1, max(highest, int(values.max()) * (256 if is_color else 1))
            suggestion = "convert the images to 8 bits per channel" if is_color else suggestion
            continue
        try:
            scale_to_8_bit(image, None)
        except ValueError as error:
            raise UserError(f"data.path: image {name}: {error}") from None
    if num_16_bit and highest < 2**AMBIGUOUS_BITS:
        bits = max(8, highest.bit_length())
        suggestion = suggestion or (
            f"set data.value_range=[0, {2**bits - 1}] if white is {2**bits - 1}, or [0, 65535] if the images are really dark"
        )
        raise UserError(f"data.path: the largest value in {num_16_bit} 16-bit images is only {highest}: {suggestion}")

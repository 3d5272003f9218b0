"""Image grids, PNG and GIF files, and conversion between pixels and tensors."""

import json
import textwrap
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from torch import Tensor

from utils.files import write_atomically

FONT_SIZE, LINE_HEIGHT, MAX_CHAR_WIDTH = 11, 14, 6  # pixels
MAX_TITLE_LINES = 20  # longer titles are shortened
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # number of channels -> image mode of Pillow


def over_white(image: Image.Image) -> Image.Image:
    """Composite an RGBA image over white and convert it to RGB. Images of other modes are returned unchanged."""
    if image.mode != "RGBA":
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def image_grid(images: np.ndarray, cols: int, gap: int = 2, titles: list[str] = ()) -> Image.Image:
    """Arrange gray, RGB or RGBA images, uint8 (N, H, W, C), in a grid of `cols` columns, with titles[i] above row i.

    RGBA images stay transparent; gaps and titles are opaque white.
    """
    n, h, w, channels = images.shape
    rows, width = -(-n // cols), cols * (w + gap) - gap
    wrap = textwrap.TextWrapper(max(8, width // MAX_CHAR_WIDTH), max_lines=MAX_TITLE_LINES, placeholder=" …").wrap
    wrapped = [wrap(title) or [""] for title in titles]
    title_height = LINE_HEIGHT * max(map(len, wrapped), default=0)
    row_height = title_height + h + gap
    canvas = Image.new(MODES[channels], (width, rows * row_height - gap), "white")
    for i, image in enumerate(images):
        tile = Image.fromarray(image[:, :, 0] if channels == 1 else image)
        canvas.paste(tile, ((i % cols) * (w + gap), title_height + (i // cols) * row_height))
    draw = ImageDraw.Draw(canvas)
    for row, lines in enumerate(wrapped[:rows]):
        top = row * row_height + title_height - LINE_HEIGHT * len(lines)
        font = ImageFont.load_default(FONT_SIZE)
        draw.multiline_text((1, top), "\n".join(lines), "black", font, spacing=LINE_HEIGHT - FONT_SIZE)
    return canvas


def comparison_grid(originals: np.ndarray, reconstructions: np.ndarray, cols: int = 8) -> Image.Image:
    """Grid in which each row of originals is followed by a row of their reconstructions, both uint8 (N, H, W, C)."""
    rows = []
    for i in range(0, len(originals), cols):
        padding = [np.full_like(originals[:1], 255)] * (cols - len(originals[i : i + cols]))
        for images in (originals, reconstructions):
            rows += [*(image[None] for image in images[i : i + cols]), *padding]
    return image_grid(np.concatenate(rows), cols)


def save_png(image: Image.Image, path: Path, settings: dict | None = None) -> None:
    """Write a PNG file with each entry of `settings` as a text chunk. Values that are not strings are stored as JSON."""
    info = PngImagePlugin.PngInfo()
    for name, value in (settings or {}).items():
        info.add_itxt(name, value if isinstance(value, str) else json.dumps(value))
    write_atomically(path, lambda temporary: image.save(temporary, format="PNG", pnginfo=info))


def save_gif(frames: list[Image.Image], path: Path) -> None:
    """Write a looping GIF that pauses on its last frame. RGBA frames are composited over white."""
    frames = [over_white(frame) for frame in frames]
    durations = [160] * (len(frames) - 1) + [1600]  # ms
    options = dict(save_all=True, append_images=frames[1:], duration=durations, loop=0)
    write_atomically(path, lambda temporary: frames[0].save(temporary, format="GIF", **options))


def to_float(pixels: Tensor) -> Tensor:
    """uint8 (B, H, W, C) -> float32 (B, C, H, W) in [-1, 1], channels_last in memory."""
    return pixels.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def to_uint8(images: Tensor) -> np.ndarray:
    """Float (B, C, H, W) -> uint8 (B, H, W, C). Values outside [-1, 1] are clipped."""
    return images.float().add(1.0).mul(127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()

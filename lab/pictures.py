"""Pictures for people: grids of images as PNG with their settings inside, and curves of a run."""

import contextlib
import json
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from lab.artifacts import write_atomically

TITLE_SIZE, TITLE_LINE, TITLE_ADVANCE = 11, 14, 6  # pixels: of a letter, of a line, of a letter's step to the right at most


def grid(images: np.ndarray, cols: int, gap: int = 2, titles: list[str] = ()) -> Image.Image:
    """uint8 (N, H, W, 3) -> one picture, row by row, `cols` to a row, with a white gap between; a title above each row."""
    n, h, w, _ = images.shape
    rows, width = -(-n // cols), cols * (w + gap) - gap
    wrapped = [textwrap.wrap(title, max(8, width // TITLE_ADVANCE)) or [""] for title in titles]
    band = TITLE_LINE * max(map(len, wrapped), default=0)
    canvas = Image.new("RGB", (width, rows * (band + h + gap) - gap), "white")
    for i, image in enumerate(images):
        canvas.paste(Image.fromarray(image), ((i % cols) * (w + gap), band + (i // cols) * (band + h + gap)))
    draw = ImageDraw.Draw(canvas)
    for row, lines in enumerate(wrapped[:rows]):
        top = row * (band + h + gap) + band - TITLE_LINE * len(lines)
        draw.multiline_text(
            (1, top), "\n".join(lines), "black", ImageFont.load_default(TITLE_SIZE), spacing=TITLE_LINE - TITLE_SIZE
        )
    return canvas


def pairs(above: np.ndarray, below: np.ndarray, cols: int = 8) -> Image.Image:
    """Originals over their reconstructions, `cols` to a row: two uint8 (N, H, W, 3) of equal shape."""
    rows = []
    for i in range(0, len(above), cols):
        pad = [np.full_like(above[:1], 255)] * (cols - len(above[i : i + cols]))
        rows += [*(x[None] for x in above[i : i + cols]), *pad, *(x[None] for x in below[i : i + cols]), *pad]
    return grid(np.concatenate(rows), cols)


def save_png(image: Image.Image, path: Path, settings: dict | None = None) -> None:
    """Write a PNG; `settings` go into its text chunks: strings as they are, everything else as JSON."""
    info = PngImagePlugin.PngInfo()
    for name, value in (settings or {}).items():
        info.add_itxt(name, value if isinstance(value, str) else json.dumps(value))
    write_atomically(path, lambda temporary: image.save(temporary, format="PNG", pnginfo=info))


def save_gif(frames: list[Image.Image], path: Path) -> None:
    """An endless GIF, six frames a second, that rests on its last frame."""
    times = [160] * (len(frames) - 1) + [1600]  # ms
    write_atomically(
        path,
        lambda temporary: frames[0].save(
            temporary, format="GIF", save_all=True, append_images=frames[1:], duration=times, loop=0
        ),
    )


def plot_curves(folder: Path) -> Path | None:
    """folder/metrics.jsonl -> folder/curves.png, if there is anything to show; one panel per figure, training and held-out in the same one."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lines = []
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        with contextlib.suppress(ValueError):  # a line that a full disk cut off
            lines.append(json.loads(line))
    series: dict[str, dict[str, list]] = {}  # panel -> train | held_out | "" -> [(step, value), …]
    for line in lines:
        for name, value in line.items():
            if name not in ("step", "images_seen", "minutes", "seconds_to_first_step"):
                origin, _, panel = name.rpartition("/")
                series.setdefault(panel, {}).setdefault(origin, []).append((line["step"], value))
    if not series:  # stopped before the first line
        return None
    cols = 3
    rows = -(-len(series) // cols)
    figure, axes = plt.subplots(rows, cols, figsize=(5 * cols, 3 * rows), squeeze=False)
    for axis, (panel, by_origin) in zip(axes.flat, series.items()):
        for origin, points in by_origin.items():
            axis.plot(*zip(*points), label=origin or None, marker="." if len(points) < 30 else None)
        if panel in ("loss", "reconstruction"):
            axis.set_yscale("log")
        axis.set_title(panel)
        axis.set_xlabel("step")
        if any(by_origin):
            axis.legend()
    for axis in axes.flat[len(series) :]:
        axis.axis("off")
    figure.tight_layout()
    path = folder / "curves.png"
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=80))
    plt.close(figure)
    return path

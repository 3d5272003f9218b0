"""Files in a folder or zip, and image decoding and cropping."""

import io
import zipfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from utils.errors import UserError
from utils.files import first_line

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
CELEBA_SIZE = (178, 218)
CELEBA_BOXES = {"ddim": (25, 57, 153, 185), "center140": (19, 39, 159, 179)}  # left, top, right, bottom of 178×218


class Files:
    """All files of a folder or zip, by relative path. At least one must be an image."""

    def __init__(self, path: str | None):
        if path is None:
            raise UserError("data.path is not set: set it to a folder or zip of images")
        self.path = Path(path)
        self.file_stats: dict[str, list[int]]  # path -> [size, mtime], or [size, CRC] in a zip
        if self.path.is_dir():
            self.zip = None
            files = sorted(p for p in self.path.rglob("*") if p.is_file())
            self.file_stats = {p.relative_to(self.path).as_posix(): [p.stat().st_size, p.stat().st_mtime_ns] for p in files}
        elif zipfile.is_zipfile(self.path):
            try:
                self.zip = zipfile.ZipFile(self.path)
            except (zipfile.BadZipFile, OSError, ValueError) as error:
                raise UserError(f"data.path: {path} is a damaged zip ({first_line(error)})") from None
            entries = sorted(self.zip.infolist(), key=lambda entry: entry.filename)
            self.file_stats = {entry.filename: [entry.file_size, entry.CRC] for entry in entries if not entry.is_dir()}
        else:
            problem = "is not a folder or a zip" if self.path.exists() else "does not exist"
            raise UserError(f"data.path: {path} {problem}")
        if not self.file_stats:
            raise UserError(f"data.path: {path} is empty")
        # macOS adds a "__MACOSX/._name.jpg" to zips for every image.
        self.images = [
            n for n in self.file_stats if Path(n).suffix.lower() in IMAGE_SUFFIXES and not Path(n).name.startswith("._")
        ]
        if not self.images:
            suffixes = sorted({Path(n).suffix.lower() or "no suffix" for n in self.file_stats})
            raise UserError(
                f"data.path: {path} has {len(self.file_stats)} files but no image ({', '.join(suffixes[:5])}); "
                f"supported: {', '.join(sorted(IMAGE_SUFFIXES))}"
            )

    def read(self, name: str) -> bytes:
        return self.zip.read(name) if self.zip else (self.path / name).read_bytes()

    def read_text(self, name: str) -> str:
        """Return a UTF-8 file without its byte order mark."""
        try:
            return self.read(name).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"data.path: {name} is not UTF-8 ({error})") from None
        except (OSError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:  # no permission, encrypted, damaged
            raise UserError(f"data.path: {name} cannot be read ({first_line(error)})") from None

    def find_lines(self, basename: str) -> list[str] | None:
        """Return the lines of the first file with this name, in any folder."""
        for name in self.file_stats:
            if Path(name).name == basename:
                return self.read_text(name).splitlines()
        return None


def decode_image(content: bytes) -> Image.Image:
    """Decode to RGB: upright (EXIF), transparency over white, first frame of an animation."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit gray, which PIL would clip to 8 bits
        values = np.asarray(image, dtype=np.float32)
        return Image.fromarray((values / (256 if values.max() > 255 else 1)).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def crop_and_resize(image: Image.Image, crop: str, size: int) -> np.ndarray:
    """Crop to a square and resize to (size, size, 3) uint8; the CelebA crop boxes, defined for 178x218 images, scale with the image."""
    width, height = image.size
    if crop in CELEBA_BOXES:
        scale = width / CELEBA_SIZE[0]
        if abs(height - scale * CELEBA_SIZE[1]) > 1:
            raise ValueError(
                f"data.crop={crop} requires CelebA's aligned {CELEBA_SIZE[0]}x{CELEBA_SIZE[1]} images (got {width}x{height})"
            )
        left, top, right, bottom = (int(edge * scale) for edge in CELEBA_BOXES[crop])
    else:
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        right, bottom = left + side, top + side
    if (right - left, bottom - top) == (size, size):
        return np.asarray(image.crop((left, top, right, bottom)))
    return np.asarray(image.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, right, bottom)))

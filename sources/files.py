"""Files of a folder or a zip, and what of them becomes a square of pixels. Bad input raises UserError."""

import io
import zipfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from lab.artifacts import first_line
from lab.errors import UserError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
CELEBA_SIZE = (178, 218)
CELEBA_BOXES = {"ddim": (25, 57, 153, 185), "center140": (19, 39, 159, 179)}  # left, top, right, bottom of 178×218


class Files:
    """The files below a folder or in a zip, by relative name. Raises UserError if there is nothing there."""

    def __init__(self, path: str | None):
        if path is None:
            raise UserError("data.path is not set: name a folder or a zip of images")
        self.path = Path(path)
        if self.path.is_dir():
            self.zip = None
            found = sorted(p for p in self.path.rglob("*") if p.is_file())
            self.stamps = {p.relative_to(self.path).as_posix(): [p.stat().st_size, p.stat().st_mtime_ns] for p in found}
        elif zipfile.is_zipfile(self.path):
            try:
                self.zip = zipfile.ZipFile(self.path)
            except (zipfile.BadZipFile, OSError, ValueError) as error:
                raise UserError(f"data.path: {path} is a damaged zip ({first_line(error)})") from None
            self.stamps = {
                i.filename: [i.file_size, i.CRC]
                for i in sorted(self.zip.infolist(), key=lambda i: i.filename)
                if not i.is_dir()
            }
        else:
            raise UserError(
                f"data.path: {path} is not a folder or a zip" if self.path.exists() else f"data.path: {path} does not exist"
            )
        if not self.stamps:
            raise UserError(f"data.path: {path} is empty")
        # macOS puts a "__MACOSX/._name.jpg" beside every picture of a zip.
        self.images = [
            n for n in self.stamps if Path(n).suffix.lower() in IMAGE_SUFFIXES and not Path(n).name.startswith("._")
        ]
        if not self.images:
            kinds = sorted({Path(n).suffix.lower() or "no suffix" for n in self.stamps})
            raise UserError(
                f"data.path: {path} holds {len(self.stamps)} files and no image ({', '.join(kinds[:5])}); "
                f"images are {', '.join(sorted(IMAGE_SUFFIXES))}"
            )

    def read(self, name: str) -> bytes:
        return self.zip.read(name) if self.zip else (self.path / name).read_bytes()

    def read_text(self, name: str) -> str:
        """A file in UTF-8, with or without its mark. Raises UserError."""
        try:
            return self.read(name).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"data.path: {name} is not UTF-8 ({error})") from None
        except (OSError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:  # no right to, encrypted, damaged
            raise UserError(f"data.path: {name} cannot be read ({first_line(error)})") from None

    def find_text(self, basename: str) -> list[str] | None:
        """Lines of the file of this name, wherever it lies; None if there is none."""
        for name in self.stamps:
            if Path(name).name == basename:
                return self.read_text(name).splitlines()
        return None


def decode(content: bytes) -> Image.Image:
    """Bytes of any picture -> RGB, upright (EXIF), transparency over white, the first frame of an animation."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit grey: PIL's own conversion to 8 bits clips
        values = np.asarray(image, dtype=np.float32)
        return Image.fromarray((values / (256 if values.max() > 255 else 1)).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def crop_and_resize(image: Image.Image, crop: str, size: int) -> np.ndarray:
    """RGB -> (size, size, 3) uint8. A named CelebA crop is scaled with the picture; a crop of the right size is not resampled."""
    width, height = image.size
    if crop in CELEBA_BOXES:
        scale = width / CELEBA_SIZE[0]
        if abs(height - scale * CELEBA_SIZE[1]) > 1:
            raise ValueError(
                f"data.crop={crop} is for CelebA's aligned {CELEBA_SIZE[0]}x{CELEBA_SIZE[1]} pictures, this one is {width}x{height}"
            )
        left, top, right, bottom = (int(edge * scale) for edge in CELEBA_BOXES[crop])
    else:
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        right, bottom = left + side, top + side
    if (right - left, bottom - top) == (size, size):
        return np.asarray(image.crop((left, top, right, bottom)))
    return np.asarray(image.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, right, bottom)))

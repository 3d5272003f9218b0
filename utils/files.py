"""Files and disk space. Files are written under a temporary name, flushed and renamed: readers never see a partial file."""

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
import unicodedata
from itertools import count
from pathlib import Path
from typing import Any, Callable, Sequence

from utils.errors import UserError

DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# If the disk is full, torch and safetensors raise errors without errno. torch's message then contains "unexpected pos".
DISK_FULL_TEXTS = ("unexpected pos", *(f"os error {number}" for number in DISK_FULL_ERRNOS))
TEMPORARY = re.compile(r"\..+\.[0-9a-f]+\.tmp")  # names of temporary files


class NoSpaceError(OSError):
    """The disk is full. The previous version of the file is unchanged."""


@contextlib.contextmanager
def raise_no_space(path: Path):
    """Convert any error caused by a full disk to NoSpaceError."""
    try:
        yield
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in DISK_FULL_ERRNOS
        full = full or any(text in str(error) for text in DISK_FULL_TEXTS)
        if full or (path.parent.exists() and shutil.disk_usage(path.parent).free < 1_000_000):
            raise NoSpaceError(errno.ENOSPC, "no space left on device", str(path)) from error
        raise


@contextlib.contextmanager
def warn_if_disk_full(what: str):
    """Turn NoSpaceError into a warning. `what` names the file that could not be saved."""
    try:
        yield
    except NoSpaceError:
        from tqdm import tqdm  # imported late, after utils/cli.py has set TQDM_DISABLE

        tqdm.write(f"warning: no space left on disk for {what}; the last saved files stay and training continues")


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Call write(temporary) and rename the temporary file to `path`. If there is an error, `path` is unchanged."""
    make_dir(path.parent)
    if path.is_dir():
        raise UserError(f"{path} cannot be written because it is a folder: remove it")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with raise_no_space(path), open(temporary, "wb") as lock:
            with contextlib.suppress(OSError):  # some file systems have no locks
                # Until the file is closed, the lock keeps other processes from deleting it in remove_leftovers().
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            write(temporary)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path, pattern: str = "*") -> None:
    """Remove the temporary files that killed processes left in a folder. Files in use are locked and stay."""
    for path in folder.glob(pattern):
        if TEMPORARY.fullmatch(path.name) and path.is_file():
            with contextlib.suppress(OSError), open(path, "rb+") as file:  # NFS locks only writable files
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()


def keep_old_version(folder: Path, name: str, suffixes: tuple[str, ...]) -> None:
    """Rename the files <name><suffix> in a folder to <name>-<n><suffix>, with the smallest n >= 2 that is not in use."""
    n = next(n for n in count(2) if not any((folder / f"{name}-{n}{suffix}").exists() for suffix in suffixes))
    for suffix in suffixes:
        if (folder / f"{name}{suffix}").exists():
            (folder / f"{name}{suffix}").rename(folder / f"{name}-{n}{suffix}")
    print(f"note: {folder / name}{suffixes[0]} was made with other settings or weights: renamed to {name}-{n}{suffixes[0]}")


def make_dir(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise UserError(f"folder {folder} cannot be created ({error.strerror})") from None


def require_space(folder: Path, needed_bytes: int) -> None:
    """Check that the folder is writable and its disk has enough free space."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    if not os.access(existing, os.W_OK):
        raise UserError(f"{folder} cannot be written: no write permission for {existing}")
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise UserError(f"{folder} needs {needed_bytes / 1e6:,.0f} MB of disk space, but only {free / 1e6:,.0f} MB are free")


def printable(name: str) -> str:
    """Return a file name as one line of valid UTF-8, in which invalid bytes and control characters are escaped."""
    # Replace surrogates that do not stand for invalid bytes (surrogateescape uses only DC80–DCFF). They come from JSON.
    name = re.sub("[\ud800-\udc7f\udd00-\udfff]", "\ufffd", name)
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(repr(c)[1:-1] if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in text)


def listed(names: Sequence[str], at_most: int = 1) -> str:
    """Return "a, b and 3 others" for five names if at_most = 2."""
    rest = len(names) - at_most
    return ", ".join(names[:at_most]) + (f" and {rest:,} other{'s' * (rest > 1)}" if rest > 0 else "")


def first_line(error: Exception) -> str:
    """Return the first line of an error message, at most 160 characters."""
    text = str(error).strip() or type(error).__name__
    # Cut off torch.load's advice to disable weights_only.
    return text.splitlines()[0].split(". This file can still be loaded")[0][:160]

"""File locks (flock) for Linux and macOS. The kernel releases them when the process ends, even if the process is killed."""

import contextlib
import fcntl
import os
import socket
from pathlib import Path
from typing import Iterator

from utils import distributed
from utils.errors import UserError
from utils.files import make_dir

_held: list[tuple[Path, int]] = []  # lock files of lock_folder() and their descriptors


def lock_folder(folder: Path) -> None:
    """Lock a folder against other processes until release_all(). Raise UserError if another process has locked it.

    Only rank 0 locks.
    """
    if not distributed.is_main():
        return
    make_dir(folder)
    path = folder / ".lock"
    try:
        _held.append((path, _acquire(path)))
    except BlockingIOError:
        owner = path.read_text(errors="replace") if path.is_file() else ""
        raise UserError(
            f"{folder} is in use by another run ({owner or 'starting'}): wait until it ends, stop it, or choose another name"
        ) from None


def release_all() -> None:
    while _held:
        _release(*_held.pop())


@contextlib.contextmanager
def locked(path: Path, waiting: str) -> Iterator[None]:
    """Hold the lock of a file. If another process holds it, print the message `waiting` and wait."""
    make_dir(path.parent)
    try:
        descriptor = _acquire(path)
    except BlockingIOError:
        print(waiting)
        descriptor = _acquire(path, wait=True)
    try:
        yield
    finally:
        _release(path, descriptor)


def _acquire(path: Path, wait: bool = False) -> int:
    """Create and lock a file and return its descriptor. If another process holds it, wait or raise BlockingIOError."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except (IsADirectoryError, PermissionError) as error:
            raise UserError(f"{path} cannot be locked ({error.strerror}): make it writable or remove it") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(descriptor)
            raise
        except OSError as error:
            print(f"note: the file system has no locks ({error.strerror}): do not start a second run in {path.parent}")
            return descriptor
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                path.write_text(f"process {os.getpid()} on {socket.gethostname()}")
                return descriptor
        os.close(descriptor)  # the previous owner has removed the file: try again


def _release(path: Path, descriptor: int) -> None:
    path.unlink(missing_ok=True)
    os.close(descriptor)

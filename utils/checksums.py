"""Checksums stored inside the files: XXH3-128 of all bytes except the checksum itself, as 32 hex digits.

A .pt file is a zip archive; its checksum is the archive comment at the end of the file. The checksum of a .safetensors
file is in its metadata. torch.load and safetensors can still read these files.
"""

import os
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import BinaryIO, Callable

import xxhash

KEY = "xxh3_128"  # key of the checksum in the metadata of a safetensors file
UNSET = "0" * 32  # placeholder that add_checksum() overwrites
BUFFER_SIZE = 1 << 20  # bytes


def checksum(content: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(content)


def add_checksum(path: Path) -> None:
    """Add the checksum to a file that has none: a .pt file, or a .safetensors file with {KEY: UNSET} in its metadata."""
    with open(path, "rb+") as file:
        if file.read(2) == b"PK":
            file.seek(-2, os.SEEK_END)
            file.write(len(UNSET).to_bytes(2, "little") + UNSET.encode())  # length of the archive comment, then the comment
            file.flush()
        position = _position(file)
        digest = _digest_without(file, position)
        file.seek(position)
        file.write(digest)


def verify(path: Path) -> None:
    """Raise ValueError if the checksum is missing or does not match, and OSError if the file cannot be read."""
    if not path.is_file():
        raise ValueError("it is not a file")
    with open(path, "rb") as file:
        position = _position(file)
        file.seek(position)
        stored = file.read(len(UNSET))
        if stored != _digest_without(file, position):
            raise ValueError("its checksum does not match")


def is_intact(path: Path) -> bool:
    try:
        verify(path)
    except (OSError, ValueError):
        return False
    return True


def in_background(check: Callable[[], None]) -> Future:
    """Run `check` in a daemon thread. result() of the future waits for it and raises its error."""
    future = Future()

    def run() -> None:
        try:
            future.set_result(check())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _position(file: BinaryIO) -> int:
    """Return the byte offset of the checksum. Raises ValueError if the file has none."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    start = file.read(8)  # a zip signature, or the length of a safetensors header
    if start[:2] == b"PK":
        position = size - len(UNSET)
        file.seek(max(0, position - 22))
        end = file.read(22)  # the zip archive's end-of-central-directory record, just before the archive comment
        if end[:4] == b"PK\5\6" and end[20:] == len(UNSET).to_bytes(2, "little"):
            return position
    elif (length := int.from_bytes(start, "little")) < size:
        # The search can find only the key, because JSON escapes quotes inside strings.
        key = f'"{KEY}":"'.encode()
        index = file.read(length).find(key)
        if index >= 0:
            return 8 + index + len(key)
    raise ValueError("it has no checksum" if size else "it is empty")


def _digest_without(file: BinaryIO, position: int) -> bytes:
    """Return the digest of all bytes of a file except the checksum at `position`."""
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(BUFFER_SIZE))
    size = file.seek(0, os.SEEK_END)
    # The file is read instead of memory-mapped: a disk error in mapped memory would kill the process (SIGBUS).
    for start, stop in ((0, position), (position + len(UNSET), size)):
        file.seek(start)
        while start < stop and (n := file.readinto(buffer[: stop - start])):
            digest.update(buffer[:n])
            start += n
    return digest.hexdigest().encode()

"""Checksums inside files: XXH3-128 of all other bytes of the file, as 32 hex digits.

A .pt file has it in the comment of the zip archive, at the end of the file; a .safetensors file has it in its metadata. Both
stay readable by torch.load and safetensors.
"""

import os
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import BinaryIO, Callable

import xxhash

KEY = "xxh3_128"  # in the metadata of a safetensors file
UNSET = "0" * 32
BUFFER_SIZE = 1 << 20  # bytes


def checksum(content: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(content)


def add_checksum(path: Path) -> None:
    """Fill in the checksum of a new .pt file, or of a .safetensors file with {KEY: UNSET} in its metadata."""
    with open(path, "rb+") as file:
        if file.read(2) == b"PK":
            file.seek(-2, os.SEEK_END)
            file.write(len(UNSET).to_bytes(2, "little") + UNSET.encode())  # length of the comment, and the comment
            file.flush()
        position = _position(file)
        digest = _digest_without(file, position)
        file.seek(position)
        file.write(digest)


def verify(path: Path) -> None:
    """Raises ValueError if the file has no checksum or another content, OSError if it cannot be read."""
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
    """Run a check in a thread that does not outlive the script. result() waits for it and raises its error."""
    future = Future()

    def run() -> None:
        try:
            future.set_result(check())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _position(file: BinaryIO) -> int:
    """Offset of the checksum. Raises ValueError if there is none."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    start = file.read(8)  # a zip signature, or the length of a safetensors header
    if start[:2] == b"PK":
        position = size - len(UNSET)
        file.seek(max(0, position - 22))
        end = file.read(22)  # of the zip archive, before its comment
        if end[:4] == b"PK\5\6" and end[20:] == len(UNSET).to_bytes(2, "little"):
            return position
    elif (length := int.from_bytes(start, "little")) < size:
        # In JSON, a quote inside a string is escaped: this is the key itself.
        key = f'"{KEY}":"'.encode()
        found = file.read(length).find(key)
        if found >= 0:
            return 8 + found + len(key)
    raise ValueError("it has no checksum" if size else "it is empty")


def _digest_without(file: BinaryIO, position: int) -> bytes:
    """Digest of a file without the checksum at `position`."""
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(BUFFER_SIZE))
    size = file.seek(0, os.SEEK_END)
    # Not mapped into memory: a read error of the disk would end the process.
    for start, stop in ((0, position), (position + len(UNSET), size)):
        file.seek(start)
        while start < stop and (n := file.readinto(buffer[: stop - start])):
            digest.update(buffer[:n])
            start += n
    return digest.hexdigest().encode()

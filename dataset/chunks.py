"""Resumable encoding: tensors are computed in chunks, each is written to its own file, and the files are joined."""

import hashlib
import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable

import torch
from torch import Tensor
from tqdm import tqdm

from utils import distributed
from utils.checkpoints import load_tensors, save_tensors
from utils.checksums import is_intact
from utils.files import raise_no_space

CHUNK = 8192  # images or captions per temporary file; an interrupted run continues after the last complete file

# encode_chunk(item indices, advance) -> named tensors. It calls advance(n) after every n items to move the progress bar.
EncodeChunk = Callable[[range, Callable[[int], object]], dict[str, Tensor]]


def chunk_folder(run_dir: Path, inputs: str) -> Path:
    """Return the folder for chunks. `inputs` is text that identifies the VAE, the images, the precision and the captions."""
    return run_dir / f"encodings.chunks-{hashlib.sha256(inputs.encode()).hexdigest()[:16]}"


def remove_other_chunks(folder: Path) -> None:
    """Remove chunks that an interrupted run with another VAE, dataset or precision left behind."""
    if distributed.is_main():
        for other in folder.parent.glob("encodings.chunks-*"):
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)


def encode_in_chunks(folder: Path, title: str, unit: str, n: int, encode_chunk: EncodeChunk) -> list[Path]:
    """Encode items 0 … n-1 in chunks, write one file per chunk, and return all files in order.

    The processes share the chunks. Chunks that already have an intact file are skipped. A background thread writes each
    chunk while the device encodes the next one.
    """
    chunk_size = min(CHUNK, -(-n // distributed.world_size()))
    chunks = [range(start, min(start + chunk_size, n)) for start in range(0, n, chunk_size)]
    files = [folder / f"{title.replace(' ', '-')}-{chunk.start:09d}-{chunk.stop:09d}.pt" for chunk in chunks]
    own = list(zip(chunks, files))[distributed.rank() :: distributed.world_size()]
    pending = None
    with ThreadPoolExecutor(1) as writer, tqdm(total=sum(len(chunk) for chunk, _ in own), desc=title, unit=unit) as bar:
        for chunk, file in own:
            if is_intact(file):
                bar.update(len(chunk))
                continue
            content = encode_chunk(chunk, bar.update)
            if pending:
                pending.result()  # raises errors of the writer thread
            pending = writer.submit(save_tensors, file, content)
        if pending:
            pending.result()
    return files


def join_chunks(files: list[Path], key: str) -> Tensor:
    """Concatenate the tensor `key` of all chunk files. The result is memory-mapped, because it may not fit in memory."""
    parts = [load_tensors(file, f"remove {file.parent}", mmap=True)[key] for file in files]
    shape = sum(map(len, parts)), *parts[0].shape[1:]
    joined_file = files[0].with_suffix(f".{key}.joined")
    # Do not copy the parts into a memory-mapped file: if the disk is full, the copy kills the process (SIGBUS).
    with raise_no_space(joined_file), open(joined_file, "wb") as file:
        for part in parts:
            file.write(part.contiguous().view(torch.uint8).numpy())
    return torch.from_file(str(joined_file), shared=False, size=math.prod(shape), dtype=parts[0].dtype).view(shape)

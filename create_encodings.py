"""Stage 2: VAE -> runs/<name>/encodings.pt.

Encodes every training and held-out image to its posterior mean, the mirrored image too where data.flip is on, measures
the normaliser and stores all with labels, captions, their embeddings where text.encoder is clip, and fingerprints. Does
nothing where the file is up to date, and goes on where it was interrupted.
"""

from lab import cli

if __name__ == "__main__":
    cli.answer_early(__doc__)

import hashlib
import shutil
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Callable

import torch
from torch import Tensor
from tqdm import tqdm

from config import Config
from data import Images, to_float
from lab import parallel
from lab.artifacts import fingerprint, load_plain, require_space, save_plain
from lab.errors import UserError
from lab.feed import Feed
from latent_cache import CaptionEmbeddings, Encodings
from latent_diffusion import images_of, load_vae, note_if_stopped, vae_path
from models.latents import Normaliser
from sources import HELD_OUT, TRAIN
from sources.clip import ClipText
from training import autocast, compile_networks, pick_device, pick_precision

PART = 8192  # images or captions between two writes: what an interruption can cost
TOKENS = 15  # of a caption, about


def encode(config: Config, dry_run: bool) -> None:
    s, device = config.encodings, pick_device(config.device)
    dtype = pick_precision(config.precision, device)
    path = config.run_dir / "encodings.pt"
    vae, header = load_vae(config, device)
    vae_fingerprint = fingerprint(vae.state_dict())
    images = images_of(config, header)
    note_if_stopped(vae_path(config), header, "train_vae.py")
    rows = {split: images.rows(split) for split in (TRAIN, HELD_OUT)}
    side = header["image_size"] // vae.downsampling
    per_image = side * side * vae.latent_channels * 2  # bytes
    stored = len(rows[TRAIN]) * (2 if config.data.flip else 1) + len(rows[HELD_OUT])
    require_space(config.run_dir, 2 * stored * per_image)  # the parts, and the whole made of them

    print(
        f"encodings: {len(rows[TRAIN]):,} training images{' and their mirrors' if config.data.flip else ''}, {len(rows[HELD_OUT]):,} held out, "
        f"{side}x{side}x{vae.latent_channels} each, on {device} in {str(dtype)[6:]}\nfiles: {path} ({stored * per_image / 1e6:,.0f} MB)"
    )
    captions = {split: [images.captions[i] for i in rows[split]] if images.captions is not None else None for split in rows}
    labels = {split: torch.from_numpy(images.labels[rows[split]]) if images.labels is not None else None for split in rows}
    encoder, texts = None, []
    if config.text.encoder == "clip" and images.captions is not None:
        encoder = ClipText(config.text.model, device)
        texts = [text for split in rows for theirs in captions[split] for text in theirs] + [""]  # the null condition
    if is_current(path, vae_fingerprint, images, captions, labels, encoder, config):
        print(f"{path}: up to date")
        return
    if encoder:
        embedded = len(texts) * TOKENS * encoder.width * 2  # bytes
        require_space(config.run_dir, 2 * (stored * per_image + embedded))
        print(f"captions: {len(texts) - 1:,} through {encoder.model}, about {embedded / 1e6:,.0f} MB")
    if dry_run:
        return

    made_of = hashlib.sha256(
        f"{vae_fingerprint}{images.fingerprint}{s.dtype}{encoder and encoder.fingerprint}{texts}".encode()
    )
    scratch = config.run_dir / f"encodings.parts-{made_of.hexdigest()[:16]}"
    if parallel.leads():
        for other in config.run_dir.glob("encodings.parts-*"):
            if other != scratch:  # an interrupted pass of another VAE or other images
                shutil.rmtree(other)
    if config.compile is True:  # a pass is over before compiling pays
        compile_networks(True, device, vae.encoder)
    pixels = Feed([torch.from_numpy(images.pixels)], device)
    print(f"pixels: {pixels}")

    def latents(split: int, flip: bool) -> Callable[[range, Callable], dict]:
        def make(part: range, advance: Callable[[int], object]) -> dict[str, Tensor]:
            means = torch.empty(len(part), vae.latent_channels, side, side, dtype=getattr(torch, s.dtype), device=device)
            batches = torch.from_numpy(rows[split][part.start : part.stop]).split(s.batch_size)
            for first, batch, then in zip(count(0, s.batch_size), batches, [*batches[1:], None]):
                x = to_float(pixels.take(batch, then))
                with torch.no_grad(), autocast(device, dtype):
                    mean = vae.encode((x.flip(3) if flip else x).contiguous(memory_format=torch.channels_last)).mean
                means[first : first + len(x)] = mean.to(means.dtype)
                advance(len(x))
            if not torch.isfinite(means).all():
                raise UserError(
                    f"{vae_path(config)} gives latents that {s.dtype} cannot hold: use encodings.dtype=bfloat16, or train the VAE with more KL"
                )
            return {"mean": means.cpu()}

        return make

    parts = {
        "mean": in_parts(scratch, "encoding", "img", len(rows[TRAIN]), latents(TRAIN, flip=False)),
        "held out": in_parts(scratch, "encoding held out", "img", len(rows[HELD_OUT]), latents(HELD_OUT, flip=False)),
    }
    if config.data.flip:
        parts["mirrored"] = in_parts(scratch, "encoding mirrored", "img", len(rows[TRAIN]), latents(TRAIN, flip=True))
    if encoder:
        parts["text"] = in_parts(
            scratch, "embedding captions", "caption", len(texts), embedding(encoder, texts, s.batch_size)
        )
    parallel.wait()
    if not parallel.leads():
        return

    def joined(which: str, key: str = "mean") -> Tensor:
        return torch.cat([load_plain(file, f"remove {scratch}", mmap=True)[key] for file in parts[which]])

    mean = joined("mean")
    try:
        normaliser = Normaliser.measure(mean, s.normalise)
    except ValueError as error:
        raise UserError(f"{vae_path(config)}: {error}") from None
    text = None
    if encoder:
        text = CaptionEmbeddings(encoder.model, encoder.fingerprint, joined("text", "values"), joined("text", "lengths"))
        cut = int(joined("text", "cut").sum())
        if cut:
            print(f"note: {cut:,} captions are longer than {encoder.longest} tokens and were cut")
    Encodings(
        mean,
        joined("mirrored") if config.data.flip else None,
        joined("held out"),
        normaliser,
        labels[TRAIN],
        labels[HELD_OUT],
        images.label_names,
        captions[TRAIN],
        captions[HELD_OUT],
        text,
        vae_fingerprint,
        images.fingerprint,
    ).save(path)
    shutil.rmtree(scratch)
    print(card(normaliser))
    print(f"done: {path}")


def in_parts(folder: Path, title: str, unit: str, n: int, make: Callable[[range, Callable], dict]) -> list[Path]:
    """What make(part, advance) gives for each PART of 0 … n-1, a file for each part, made by the process it falls to. A part that an
    interrupted pass has left is not made again."""
    at_once = min(PART, -(-n // parallel.size()))  # shared by all processes
    parts = [range(start, min(start + at_once, n)) for start in range(0, n, at_once)]
    files = [folder / f"{title.replace(' ', '-')}-{part.start:09d}-{part.stop:09d}.pt" for part in parts]
    mine = list(zip(parts, files))[parallel.rank() :: parallel.size()]
    total, writing = sum(len(part) for part, _ in mine), None
    with ThreadPoolExecutor(1) as writer, tqdm(total=total, desc=title, unit=unit) as bar:
        for part, file in mine:
            if file.exists():
                bar.update(len(part))
                continue
            content = make(part, bar.update)
            if writing:
                writing.result()  # raises what went wrong
            writing = writer.submit(save_plain, file, content)  # while the device makes the next
        if writing:
            writing.result()
    return files


def embedding(encoder: ClipText, captions: list[str], batch_size: int) -> Callable[[range, Callable], dict]:
    """For in_parts: the token embeddings of a part of the captions."""

    def make(part: range, advance: Callable[[int], object]) -> dict[str, Tensor]:
        embeddings, cut_before = {}, encoder.cut
        order = sorted(part, key=lambda i: len(captions[i]))  # so that little of a batch is padding
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            embeddings |= zip(batch, (e.half() for e in encoder.encode([captions[i] for i in batch])))
            advance(len(batch))
        ragged = CaptionEmbeddings.of(encoder, [embeddings[i] for i in part])
        return {"values": ragged.values, "lengths": ragged.lengths, "cut": torch.tensor([encoder.cut - cut_before])}

    return make


def is_current(
    path: Path,
    vae_fingerprint: str,
    images: Images,
    captions: dict,
    labels: dict,
    encoder: ClipText | None,
    config: Config,
) -> bool:
    """Does the file hold what this run would write? A damaged one does not."""
    try:
        there = Encodings.load(path)
    except UserError:
        return False
    return (
        (there.vae_fingerprint, there.data_fingerprint) == (vae_fingerprint, images.fingerprint)
        and (there.captions, there.held_out_captions) == (captions[TRAIN], captions[HELD_OUT])
        and there.label_names == images.label_names
        and (there.labels is None or torch.equal(there.labels, labels[TRAIN]))
        and (there.held_out_labels is None or torch.equal(there.held_out_labels, labels[HELD_OUT]))
        and (encoder is None or (there.text is not None and there.text.fingerprint == encoder.fingerprint))
        and not there.differences(config)
    )


def card(n: Normaliser) -> str:
    """A line per channel of the scaled latents."""
    lines = [
        f"scaled latents: overall std {n.overall_std():.3f}",
        "channel   shift    scale     mean     std  kurtosis   range",
    ]
    for c in range(len(n.std)):
        lines.append(
            f"{c:7d} {n.shift[c]:7.3f} {n.scale[c]:8.3f} {n.mean[c]:8.3f} {n.std[c]:7.3f} {n.kurtosis[c]:9.2f}   {n.low[c]:.2f} … {n.high[c]:.2f}"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    return cli.run(encode, __doc__, argv)


if __name__ == "__main__":
    raise SystemExit(main())
